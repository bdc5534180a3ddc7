"""Curvature is float32 or float64 throughout, whatever the forward pass computes in."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks import precision
from helpers import ROOT, SCHEMES, TREATMENTS, all_equal, close, randn, values
from test_layers import LAYERS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hbp
from hbp import reference
from hbp.operators import SymmetricOperator

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


class Dtypes(TorchDispatchMode):
    """Notes the floating-point dtype of all that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.seen.setdefault(leaf.dtype, set()).add(str(func))
        return result


def network(double: bool = False) -> hbp.HBPSequential:
    """Every kind of rule: bilinear, elementwise, pooling, general, residual."""
    model = hbp.HBPSequential(
        hbp.HBPConv2d(1, 2, 3),
        hbp.HBPTanh(),
        hbp.HBPMaxPool2d(2),
        hbp.HBPBatchNorm2d(2).eval(),
        hbp.HBPFlatten(),
        hbp.HBPLayerNorm(8),
        hbp.HBPLinear(8, 6),
        hbp.HBPGELU(),
        hbp.HBPResidual(hbp.HBPLinear(6, 6)),
        hbp.HBPSigmoid(),
        hbp.HBPLinear(6, 4),
    )
    return model.double() if double else model


def batch(double: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 1, 6, 6, dtype=torch.float64)
    return x if double else x.float(), torch.arange(12) % 4


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def curvature(
    model: hbp.HBPModule,
    x: Tensor,
    labels: Tensor,
    *,
    half: torch.dtype | None = None,
    inside: bool = False,
    exact: bool = False,
    treatment: str | None = "abs",
    scale: float = 1.0,
    told: bool = True,
) -> list[SymmetricOperator]:
    """A pass with its forward in ``half``; the rest inside of autocast, or not."""
    make = hbp.per_sample_hessian if exact else hbp.batch_summed_hessian
    model.zero_grad()
    with autocast(half):
        outputs = model(x)
        loss = F.cross_entropy(outputs, labels)
    with autocast(half if inside else None):
        output_hessian = make(loss, outputs)
        (loss * scale).backward()
        model.backward_hessian(
            output_hessian,
            modify_2nd_order_terms=treatment,
            loss_scale=scale if told else 1.0,
        )
    return [p.hessian for p in model.parameters()]


def matrices(operators: list[SymmetricOperator]) -> list[Tensor]:
    return [operator.to_dense().clone() for operator in operators]


def error(found: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative error of a block."""
    pairs = zip(found, right, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


# --------------------------------------------------------------------------------------
# float64: nothing drops to float32 on the way.
# --------------------------------------------------------------------------------------


def below_a_head(name: str) -> tuple[hbp.HBPSequential, Tensor, Tensor]:
    """A layer with a linear one on top, inputs and labels, in float64."""
    make, shape = LAYERS[name]
    layer, x = make().double(), randn(*shape)
    with torch.no_grad():
        features = layer(x)[0].numel()
    head = hbp.HBPSequential(hbp.HBPFlatten(), hbp.HBPLinear(features, 3))
    model = hbp.HBPSequential(layer, head).double()
    return model, x.requires_grad_(), torch.arange(shape[0]) % 3


@pytest.mark.parametrize("name", LAYERS)
def test_float64_from_the_layer_to_the_step(name: str) -> None:
    """All that torch computes, for averaged, averaged-product and exact curvature."""
    model, x, labels = below_a_head(name)
    optimizer = hbp.CGNewton(model.parameters(), lr=0.1, alpha=0.1, cg_maxiter=3)
    for scheme, exact in [(True, False), (False, False), (True, True)]:
        model.set_hbp_approximation(scheme, scheme)
        with Dtypes() as dtypes:
            curvature(model, x, labels, exact=exact)
            optimizer.step()
        assert set(dtypes.seen) == {torch.float64}, dtypes.seen


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_float64_blocks_to_the_last_digits(
    scheme: tuple[bool, bool], treatment: str | None
) -> None:
    """Measured: 2e-15 of each block at most. In float32 it would be 1e-7."""
    model = hbp.HBPSequential(
        hbp.HBPLinear(5, 6), hbp.HBPSigmoid(), hbp.HBPLinear(6, 4), hbp.HBPTanh()
    ).double()
    model.set_hbp_approximation(*scheme)
    x, labels = randn(7, 5), torch.arange(7) % 4
    found = matrices(curvature(model, x, labels, treatment=treatment))
    expected = reference.batch_blocks(
        model,
        nn.CrossEntropyLoss(),
        x,
        labels,
        modify_2nd_order_terms=treatment,
        average_input_jacobian=scheme[0],
        average_parameter_jacobian=scheme[1],
    )
    right = [expected.parameters[name] for name, _ in model.named_parameters()]
    assert error(found, right) < 1e-12


# --------------------------------------------------------------------------------------
# Autocast: a forward pass in half precision, curvature in float32.
# --------------------------------------------------------------------------------------

# Of bfloat16's 8 and float16's 11 binary digits, a few are lost on the way through a
# dozen roundings. Measured over the cases below, relative to the block in float64:
# 0.021 and 0.0034; and 0.14 and 0.011 with "none", whose terms cancel in a block of a
# thirtieth of the size that it has with "abs".
AUTOCAST = {torch.bfloat16: 0.04, torch.float16: 0.007}


@HALVES
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("treatment", ["none", "zero", "abs"])
def test_blocks_of_a_forward_pass_in_half(
    half: torch.dtype, exact: bool, treatment: str
) -> None:
    model, (x, labels) = network(), batch()
    double = network(double=True)
    double.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"exact": exact, "treatment": treatment}
    right = matrices(curvature(double, x.double(), labels, **options))
    outside = matrices(curvature(model, x, labels, half=half, **options))
    inside = matrices(curvature(model, x, labels, half=half, inside=True, **options))
    assert {block.dtype for block in outside} == {torch.float32}
    bound = AUTOCAST[half] * (6 if treatment == "none" else 1)
    assert 1e-5 < error(outside, right) < bound
    assert all_equal(inside, outside)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_under_autocast(name: str) -> None:
    """float32 out, and near float64's; measured: at most 0.03 in norm."""
    model, x, labels = below_a_head(name)
    right = matrices(curvature(model, x, labels))
    single = x.detach().float().requires_grad_()
    found = matrices(curvature(model.float(), single, labels, half=torch.bfloat16))
    assert {block.dtype for block in found} == {torch.float32}
    assert error(found, right) < 0.06


def questions(operator: SymmetricOperator) -> list[Tensor]:
    v = torch.linspace(-1, 1, operator.shape[0])
    return [
        operator @ v,
        operator.diagonal(),
        operator.trace(),
        operator.eigvalsh(),
        operator.solve(v, alpha=0.1),
        operator.to_dense(),
        hbp.cg(operator, v, maxiter=3).x,
    ]


@pytest.mark.parametrize("scheme", [True, False])
def test_operators_answer_in_float32_under_autocast(scheme: bool) -> None:
    """Asked there for the first time, they would keep what they found."""
    model, (x, labels) = network(), batch()
    model.set_hbp_approximation(scheme, scheme)
    model[6].set_hbp_blocks(sub_blocks=3)
    model[10].set_hbp_blocks(sub_blocks=2)
    outside = [questions(H) for H in curvature(model, x, labels)]
    with autocast(torch.bfloat16):
        again = model.float()
    operators = curvature(again, x, labels)
    with autocast(torch.bfloat16):
        inside = [questions(H) for H in operators]
    for ours, theirs in zip(inside, outside, strict=True):
        assert {answer.dtype for answer in ours} == {torch.float32}
        assert all_equal(ours, theirs)


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_a_step_under_autocast_is_the_same_step(solver: Any) -> None:
    model, (x, labels) = network(), batch()
    start, after = values(model), []
    for half in (None, torch.bfloat16):
        torch.nn.utils.vector_to_parameters(
            torch.cat([p.flatten() for p in start]), model.parameters()
        )
        optimizer = hbp.CGNewton(model.parameters(), 0.1, 0.1, solver=solver)
        curvature(model, x, labels)
        with autocast(half):
            optimizer.step()
        after.append(values(model))
    assert all_equal(*after)
    assert not all_equal(after[0], start)


def test_nothing_of_the_pass_itself_is_in_half() -> None:
    model, (x, labels) = network(), batch()
    optimizer = hbp.CGNewton(model.parameters(), 0.1, 0.1)
    with autocast(torch.bfloat16):
        outputs = model(x)
        loss = F.cross_entropy(outputs, labels)
        H = hbp.batch_summed_hessian(loss, outputs)
        loss.backward()
        with Dtypes() as dtypes:
            model.backward_hessian(H, modify_2nd_order_terms="abs")
            optimizer.step()
    views = {"aten.detach.default", "aten.view.default", "aten.alias.default"}
    assert dtypes.seen.get(torch.bfloat16, set()) <= views


# --------------------------------------------------------------------------------------
# Output Hessians of logits in half precision.
# --------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("make", [hbp.batch_summed_hessian, hbp.per_sample_hessian])
def test_output_hessian_of_the_widened_logits(
    half: torch.dtype, make: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Not of logits and products that are rounded; two terms of the loss, two casts."""
    logits = (3 * torch.randn(300, 5)).to(half).requires_grad_()
    labels, target = torch.arange(300) % 5, torch.rand(300, 5)
    with autocast(half):
        outputs = logits * 1
        loss = F.cross_entropy(outputs, labels) + F.mse_loss(outputs, target)
        found = make(loss, outputs)
    wide = logits.detach().double().requires_grad_()
    right = F.cross_entropy(wide, labels) + F.mse_loss(wide, target.double())
    assert found.dtype == torch.float32
    close(found.double(), make(right, wide), rtol=1e-5, atol=1e-7)


@HALVES
def test_output_hessian_where_the_loss_is_in_half(half: torch.dtype) -> None:
    """Its own roundings are in it, and no more. Measured: 2e-3 and 7e-4."""
    outputs = torch.randn(64, 5).to(half).requires_grad_()
    labels = torch.arange(64) % 5
    found = hbp.batch_summed_hessian(F.cross_entropy(outputs, labels), outputs)
    wide = outputs.detach().double().requires_grad_()
    right = hbp.batch_summed_hessian(F.cross_entropy(wide, labels), wide)
    assert found.dtype == torch.float32
    assert error([found], [right]) < {torch.bfloat16: 5e-3, torch.float16: 2e-3}[half]
    formula = hbp.output_hessian(nn.CrossEntropyLoss(), outputs, labels)
    assert formula.dtype == torch.float32
    close(formula.double(), right, rtol=1e-5, atol=1e-7)
    function = hbp.output_hessian(F.cross_entropy, outputs, labels)
    close(function.double(), right, rtol=1e-5, atol=1e-7)


def test_a_loss_that_also_reads_the_logits_in_half() -> None:
    """Then there is no one place where all of them are wide."""
    outputs = torch.randn(8, 3).bfloat16().requires_grad_()
    loss = F.cross_entropy(outputs.float(), torch.arange(8) % 3)
    loss = loss + (outputs * outputs).sum().float()
    found = hbp.batch_summed_hessian(loss, outputs)
    alone = hbp.output_hessian(nn.CrossEntropyLoss(), outputs, torch.arange(8) % 3)
    # Entries of about 16: 8 bits resolve 0.06.
    close(found, alone + 16 * torch.eye(3), rtol=0.0, atol=0.06)


# --------------------------------------------------------------------------------------
# Scaled losses.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("treatment", ["none", "abs", "clip", "zero"])
def test_the_scale_of_the_loss_leaves_the_curvature(
    treatment: str, exact: bool
) -> None:
    model, (x, labels) = network(double=True), batch(double=True)
    options: dict[str, Any] = {"treatment": treatment, "exact": exact}
    right = matrices(curvature(model, x, labels, **options))
    found = matrices(curvature(model, x, labels, scale=2.0**16, **options))
    assert error(found, right) < 1e-12
    with pytest.raises(ValueError, match="sent 8 times the gradient"):
        curvature(model, x, labels, scale=8.0, told=False, **options)


def test_training_with_a_grad_scaler() -> None:
    """As the page has it: passes that overflow are skipped, by both."""
    model, (x, labels) = network(), batch()
    optimizer = hbp.CGNewton(model.parameters(), lr=0.2, alpha=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    losses, skipped = [], []
    for _ in range(16):
        with autocast(torch.float16):
            outputs = model(x)
            loss = F.cross_entropy(outputs, labels)
        optimizer.zero_grad()
        H = hbp.batch_summed_hessian(loss, outputs)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if all(p.grad.isfinite().all() for p in model.parameters()):
            scale = scaler.get_scale()
            model.backward_hessian(H, modify_2nd_order_terms="abs", loss_scale=scale)
        before = values(model)
        skipped.append(model[0].weight.hessian is None)
        scaler.step(optimizer)
        scaler.update()
        assert all_equal(values(model), before) == skipped[-1]
        losses.append(loss.item())
    assert skipped[0]
    assert sum(skipped) < 10
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), "2", None])
def test_a_scale_that_is_none(scale: Any) -> None:
    model, (x, labels) = network(), batch()
    outputs = model(x)
    F.cross_entropy(outputs, labels).backward()
    with pytest.raises(ValueError, match=r"loss_scale=.* must be a positive finite"):
        model.backward_hessian(torch.eye(4), loss_scale=scale)
    assert all(p.hessian is None for p in model.parameters())


# --------------------------------------------------------------------------------------
# What is refused.
# --------------------------------------------------------------------------------------


@HALVES
def test_a_model_in_half_is_told_of_autocast(half: torch.dtype) -> None:
    model, (x, labels) = network().to(half), batch()
    outputs = model(x.to(half))
    loss = F.cross_entropy(outputs, labels)
    H = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    with pytest.raises(TypeError, match=r"model\.float\(\).*torch\.autocast"):
        model.backward_hessian(H)
    assert all(p.hessian is None for p in model.parameters())


def test_a_layer_without_parameters_takes_half() -> None:
    layer = hbp.HBPSigmoid()
    x = torch.randn(4, 3).bfloat16().requires_grad_()
    layer(x).sum().backward()
    H_x = layer.backward_hessian(torch.eye(3), compute_input_hessian=True)
    assert H_x is not None
    assert H_x.to_dense().dtype == torch.float32


@HALVES
def test_curvature_in_half_is_refused(half: torch.dtype) -> None:
    model, (x, labels) = network(), batch()
    curvature(model, x, labels)
    with pytest.raises(ValueError, match=r"too coarse for curvature.*\.float\(\)"):
        model.backward_hessian(torch.eye(4, dtype=half))
    with pytest.raises(ValueError, match=r"too coarse for conjugate gradients"):
        hbp.cg(torch.eye(3, dtype=half), torch.ones(3, dtype=half))
    p = nn.Parameter(torch.ones(3, dtype=half))
    p.grad, p.hvp = torch.ones_like(p), lambda v: v
    with pytest.raises(ValueError, match="too coarse for curvature"):
        hbp.CGNewton([p], lr=1.0, alpha=0.1).step()
    assert torch.equal(p, torch.ones_like(p))


PAGE = ROOT / "docs" / "precision.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("example", range(2))
def test_examples_of_the_page(example: int) -> None:
    assert len(EXAMPLES) == 2
    exec(compile(EXAMPLES[example], "precision.md", "exec"), {"__name__": "example"})


def test_the_table_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On few samples and steps: float64 is right, and each precision is off by its own.

    Measured: 1e-6, 2e-3 and 8e-3.
    """
    monkeypatch.setattr(precision, "BATCH", 16)
    _, errors = precision.measure(precision.convolutional_network, steps=2)
    bounds = {"float32": 1e-4, "autocast, float16": 0.02, "autocast, bfloat16": 0.05}
    assert errors.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert 1e-9 < errors[name].blocks < bound
        assert 1e-9 < errors[name].step < 4 * bound
    assert errors["float32"].blocks < 0.1 * errors["autocast, float16"].blocks
