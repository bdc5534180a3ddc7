"""No growth, no cycles, no hooks: what a process must not share with other tests.

``test_long_runs.py`` runs this file in a process of its own: what other tests leave in
memory would be counted too.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from benchmarks import endurance
from torch import Tensor, nn

import hbp


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Whatever dies, dies by itself; what only the collector finds is in gc.garbage."""
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()
    gc.collect()


def test_nothing_accumulates() -> None:
    training = endurance.Training()
    training.run(4 * len(endurance.WAYS))
    before = endurance.census()
    training.run(18 * len(endurance.WAYS))
    after = endurance.census()
    assert (after.tensors, after.tensor_bytes) == (before.tensors, before.tensor_bytes)
    # Measured: 1 more from step 100 to 1,000. One for each step would be 162.
    assert after.objects <= before.objects + 50


def things_of(training: endurance.Training, outputs: Tensor) -> list[Any]:
    """What a step made, and what it was made with."""
    model, parameters = training.model, list(training.model.parameters())
    records = [r for m in model.modules() if (r := vars(m).get("last_record"))]
    assert len(records) >= 9
    blocks = [p.hessian for p in parameters]
    return [
        training,
        model,
        training.optimizer,
        outputs,
        *parameters,
        *records,
        *blocks,
    ]


def found_by_the_collector() -> list[Any]:
    """Unreachable things of torch and hbp that did not die by themselves."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return [thing for thing in gc.garbage if is_ours(thing) or is_tensor(thing)]


def is_ours(thing: Any) -> bool:
    """Whether a thing is of hbp, or a function or a frame of it."""
    frame = getattr(thing, "f_globals", {}).get("__name__", "")
    names = [type(thing).__module__, getattr(thing, "__module__", None), frame]
    return any(str(name).split(".")[0] in ("hbp", "benchmarks") for name in names)


def is_tensor(thing: Any) -> bool:
    return issubclass(type(thing), Tensor | nn.Module | torch.optim.Optimizer)


@pytest.mark.parametrize("way", endurance.WAYS, ids=str)
def test_no_reference_cycles(way: endurance.Way, no_collector: None) -> None:
    """Not in the model with its curvature, not in what was computed on the way."""
    training = endurance.Training()
    images, labels = training.batch()
    training.step(way, images, labels)
    outputs = training.model(images)
    loss = endurance.LOSS(outputs, labels)
    form = hbp.per_sample_hessian if way.exact else hbp.batch_summed_hessian
    hessian = form(loss, outputs)
    training.optimizer.zero_grad()
    loss.backward()
    # A step would use it up.
    training.model.backward_hessian(hessian, modify_2nd_order_terms=way.treatment)
    del loss, hessian
    references = [weakref.ref(thing) for thing in things_of(training, outputs)]
    assert all(reference() is not None for reference in references)
    del training, images, labels, outputs
    assert [reference() for reference in references if reference() is not None] == []
    assert found_by_the_collector() == []


def test_a_cycle_would_be_found(no_collector: None) -> None:
    training = endurance.Training()
    training.model[0].weight.hessian = training.model
    reference = weakref.ref(training.model)
    del training
    assert reference() is not None
    assert any(isinstance(thing, Tensor) for thing in found_by_the_collector())


def test_no_reference_cycles_after_errors(no_collector: None) -> None:
    training = endurance.Training()
    images, labels = training.batch()
    # Not by pytest.raises, which keeps the traceback.
    try:
        training.step(endurance.Way(), images * torch.nan, labels)
        pytest.fail("NaN went unnoticed")
    except (ArithmeticError, ValueError):
        pass
    references = [weakref.ref(p) for p in training.model.parameters()]
    del training, images, labels
    assert [reference() for reference in references if reference() is not None] == []
    assert found_by_the_collector() == []


def test_no_reference_cycles_through_every_other_layer(no_collector: None) -> None:
    model = hbp.HBPSequential(
        hbp.HBPConvTranspose2d(1, 2, 2),
        hbp.HBPBatchNorm2d(2).eval(),
        hbp.HBPGELU(),
        hbp.HBPAvgPool2d(3),
        hbp.HBPFlatten(),
        hbp.HBPLayerNorm(18),
        hbp.HBPDropout(0.1),
        hbp.HBPLinear(18, 3),
    )
    outputs = model(torch.rand(4, 1, 8, 8))
    loss = endurance.LOSS(outputs, torch.arange(4) % 3)
    hessian = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessian, modify_2nd_order_terms="abs")
    parameters = list(model.parameters())
    things = [model, outputs, *parameters, *(p.hessian for p in parameters)]
    references = [weakref.ref(thing) for thing in things]
    del model, outputs, loss, hessian, parameters, things
    assert [reference() for reference in references if reference() is not None] == []
    assert found_by_the_collector() == []


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def test_no_hooks_are_left() -> None:
    """The one hook there is sits on the outputs of a pass, and goes with them."""
    others = live_tensors()  # Some belong to other tests.
    training = endurance.Training()
    training.run(len(endurance.WAYS))
    for module in training.model.modules():
        hooks = [name for name in vars(module) if "hooks" in name]
        assert len(hooks) > 5
        for name in hooks:
            assert not getattr(module, name), name
    for tensor in [*training.model.parameters(), training.images]:
        assert not tensor._backward_hooks
        assert not getattr(tensor, "_post_accumulate_grad_hooks", None)
    # No graph outlives its pass, and so none of the outputs with their hooks.
    known = {id(t) for t in [*others, *training.model.parameters()]}
    left = [tensor for tensor in live_tensors() if id(tensor) not in known]
    assert [tensor.shape for tensor in left if tensor.grad_fn is not None] == []
