"""A compiled, exported or traced model: the curvature of this very pass, or none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from helpers import close, randn, small_batch, small_net
from torch import Tensor

import hbp


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def network() -> hbp.HBPSequential:
    """In-place activations, views, a shortcut, a mask and autograd's own rule."""
    return hbp.HBPSequential(
        hbp.HBPConv2d(1, 2, 3),
        hbp.HBPReLU(inplace=True),
        hbp.HBPMaxPool2d(2),
        hbp.HBPFlatten(),
        hbp.HBPResidual(hbp.HBPLinear(8, 8)),
        hbp.HBPLayerNorm(8),
        hbp.HBPDropout(0.5),
        hbp.HBPSigmoid(),
        hbp.HBPLinear(8, 3),
    ).double()


def step(
    model: Any, optimizer: hbp.CGNewton, x: Tensor, labels: Tensor
) -> list[Tensor]:
    """A training step; blocks, gradients, and the parameters after it."""
    torch.manual_seed(3)  # The same mask.
    outputs = model(x)
    loss = F.cross_entropy(outputs, labels)
    optimizer.zero_grad()
    H = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(H, modify_2nd_order_terms="abs")
    parameters = list(model.parameters())
    left = [p.hessian.to_dense().clone() for p in parameters]
    left += [p.grad.clone() for p in parameters]
    optimizer.step()
    return left + [p.detach().clone() for p in parameters]


def steps(
    make: Callable[[hbp.HBPModule], Any], start: hbp.HBPModule, count: int = 2
) -> list[Tensor]:
    model = copy.deepcopy(start)
    optimizer = hbp.CGNewton(model.parameters(), lr=0.3, alpha=0.1)
    compiled = make(model)
    torch.manual_seed(1)
    left: list[Tensor] = []
    for i in range(count):  # A smaller batch at the end, as in an epoch.
        samples = 6 - 2 * (i == count - 1)
        left += step(
            compiled, optimizer, randn(samples, 1, 6, 6), torch.arange(samples) % 3
        )
    return left


@pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"]
)
def test_a_compiled_model_trains_as_the_model_itself(backend: str) -> None:
    """backward_hessian through the wrapper; two batches, so nothing is stale."""
    start = network()
    expected = steps(lambda model: model, start)
    with warnings.catch_warnings():
        # What torch cannot trace is not tried.
        warnings.filterwarnings("error", message=".*not know how to trace")
        found = steps(lambda model: torch.compile(model, backend=backend), start)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


def test_the_original_is_the_compiled_model() -> None:
    """Its curvature is that of the latest pass, whichever of the two ran it."""
    model, (x, labels) = small_net(), small_batch()
    compiled = torch.compile(model, backend="eager")
    optimizer = hbp.CGNewton(model.parameters(), lr=0.0, alpha=0.1)
    for inputs in (x, x + 1):
        expected = step(model, optimizer, inputs, labels)
        found = step(compiled, optimizer, inputs, labels)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    compiled(x)
    with pytest.raises(RuntimeError, match=r"before loss\.backward"):
        model.backward_hessian(torch.eye(3).double())


def test_one_graph_without_gradients() -> None:
    """Nothing is recorded there, so nothing ends a graph."""
    model, (x, _) = small_net(), small_batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(x), model(x))
    assert not any("last_record" in vars(layer) for layer in model)


def test_fullgraph_with_gradients_is_refused_by_torch() -> None:
    model, (x, _) = small_net(), small_batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        compiled(x)


def test_what_is_exported_or_traced_leaves_no_record() -> None:
    """The programs compute what the model does; the record of its own pass stays."""
    model, (x, _) = small_net(), small_batch()
    outputs = model(x)
    records = [layer.last_record for layer in model]
    for program in (
        torch.export.export(model, (x,), strict=False).module(),
        torch.fx.symbolic_trace(model),
    ):
        assert torch.equal(program(x), outputs)
        assert all(a.last_record is b for a, b in zip(model, records, strict=True))
