"""The public API under random arguments: right, or refused in this package's words.

Hypothesis draws them from a fixed seed (see ``conftest.py``), so that every run is the
same. ``HBP_FUZZ=5000`` draws that many for each test, at random.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import ACTIVATIONS, close, randn, send_back, small_batch, small_net, spd
from hypothesis import HealthCheck, given, settings
from test_bad_days import (
    DOCUMENTED,
    READINGS,
    SOLVERS,
    TREATMENTS,
    condition,
    error_of,
    is_own,
    live_through,
)
from test_blocks import block_diagonal_part, row_sizes
from torch import Tensor, nn

import hbp
from hbp import reference
from hbp.operators import DenseOperator


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=int(os.environ.get("HBP_FUZZ", examples)),
        derandomize="HBP_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


# --------------------------------------------------------------------------------------
# Arguments that nobody should pass.
# --------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
EYE = torch.eye(3, dtype=torch.float64)

NUMBERS = [
    *(0, 1, -1, 2, 10**400, -(10**400), 2**63, True, False),
    *(0.0, -0.0, 0.5, 1.0, -1e-3, 1e-320, 1e300, 1e-30, NAN, INF, -INF),
    *(Fraction(1, 3), 1j, np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(1)),
    *(torch.tensor(0.5), torch.tensor(2), torch.tensor(NAN), torch.ones(2)),
]
OTHERS = [
    *(None, "", "0.1", "cg", "direct", "abs", b"x", [], [0.1], (), {}, {1: 2}, set()),
    *(object(), lambda *args: None, np.ones(3), np.eye(3)),
]
TENSORS = [
    *(
        torch.zeros(0),
        torch.zeros(0, 0),
        torch.zeros(3),
        torch.zeros(3, 3),
        torch.zeros(6, 3, 3),
    ),
    *(EYE, EYE.float(), EYE.half(), EYE.bfloat16(), EYE.int(), EYE.bool()),
    *(EYE * 1j, EYE.to("meta"), EYE.to_sparse(), EYE * NAN, EYE * INF, EYE * 1e300),
    *(torch.arange(9.0).view(3, 3).double(), EYE[:, :2], EYE[None], EYE[None, None]),
    *(EYE.expand(6, 3, 3), EYE.expand(5, 3, 3), torch.zeros(0, 3, 3), torch.ones(())),
    *(randn(6, 3), randn(6, 3).requires_grad_(), randn(6, 3).to("meta")),
]
MODELS = [nn.Linear(4, 3), nn.LSTM(2, 2), hbp.HBPLinear(4, 3), nn.Sequential()]
OPERATORS = [
    DenseOperator(EYE),
    DenseOperator(EYE.float()),
    DenseOperator(EYE * NAN),
    DenseOperator(EYE.to("meta")),
]
anything = st.sampled_from([*NUMBERS, *OTHERS, *TENSORS, *MODELS, *OPERATORS])
numbers = st.sampled_from(NUMBERS + OTHERS)


class Bench:
    """A trained model, its optimizer, and all that the calls below need."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = small_net()
        self.inputs, self.labels = small_batch()
        send_back(self.model, self.inputs, self.labels, treatment="abs")
        self.optimizer = hbp.CGNewton(self.model.parameters(), 0.1, 0.1)
        self.outputs = self.model(self.inputs)
        self.loss = nn.CrossEntropyLoss()(self.outputs, self.labels)
        # The record of the pass that p.hessian belongs to, again.
        send_back(self.model, self.inputs, self.labels, treatment="abs")

    def stepped(self) -> Bench:
        self.optimizer.step()
        return self

    def optimize(self, **options: Any) -> Any:
        hbp.CGNewton(self.model.parameters(), **options).step()

    def regroup(self, **options: Any) -> Any:
        self.optimizer.param_groups[0].update(options)
        self.optimizer.step()

    def damp(self, loss_before: Any, loss_after: Any, **options: Any) -> Any:
        damping = hbp.LevenbergMarquardt(self.optimizer, **options)
        return damping.step(loss_before, loss_after)


# A loss function is called as it is: what it says of its targets is torch's business.
TORCH_FORWARD = str(Path(nn.__file__).parent)


def is_of_torch_forward(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(TORCH_FORWARD):
            return True
        trace = trace.tb_next
    return False


H3 = DenseOperator(spd(3))
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "alpha": 0.1,
    "cg_atol": 0.0,
    "cg_tol": 0.1,
    "cg_maxiter": 5,
    "solver": "cg",
    "trust_radius": None,
}
Call = tuple[Callable[..., Any], dict[str, Any]]
CALLS: dict[str, Callable[[Bench], Call]] = {
    "CGNewton": lambda b: (b.optimize, OPTIONS),
    "param_groups": lambda b: (b.regroup, OPTIONS),
    "cg": lambda b: (
        hbp.cg,
        {
            "A": spd(3),
            "b": torch.ones(3).double(),
            "x0": None,
            "tol": 0.1,
            "atol": 0.0,
            "maxiter": 4,
            "trust_radius": None,
        },
    ),
    "LevenbergMarquardt": lambda b: (
        b.stepped().damp,
        {
            "loss_before": 1.0,
            "loss_after": 0.9,
            "factor": 1.5,
            "min_alpha": 1e-6,
            "max_alpha": 0.99,
        },
    ),
    "damping of what": lambda b: (hbp.LevenbergMarquardt, {"optimizer": b.optimizer}),
    "convert": lambda b: (hbp.convert, {"model": nn.Linear(2, 2)}),
    "batch_summed_hessian": lambda b: (
        hbp.batch_summed_hessian,
        {"loss": b.loss, "outputs": b.outputs},
    ),
    "per_sample_hessian": lambda b: (
        hbp.per_sample_hessian,
        {"loss": b.loss, "outputs": b.outputs},
    ),
    "output_hessian": lambda b: (
        hbp.output_hessian,
        {"loss_func": nn.MSELoss(), "outputs": randn(6, 3), "targets": randn(6, 3)},
    ),
    "backward_hessian": lambda b: (
        b.model.backward_hessian,
        {
            "output_hessian": EYE,
            "compute_input_hessian": False,
            "modify_2nd_order_terms": "abs",
        },
    ),
    "set_hbp_approximation": lambda b: (
        b.model.set_hbp_approximation,
        {"average_input_jacobian": True, "average_parameter_jacobian": True},
    ),
    "set_hbp_blocks": lambda b: (
        b.model.set_hbp_blocks,
        {"sub_blocks": 1},
    ),
    "solve": lambda b: (H3.solve, {"b": torch.ones(3).double(), "alpha": 0.1}),
    "product": lambda b: (lambda v: H3 @ v, {"v": torch.ones(3).double()}),
    "DenseOperator": lambda b: (DenseOperator, {"matrix": EYE}),
    "extremal_eigenvalues": lambda b: (
        hbp.extremal_eigenvalues,
        {"operator": H3, "count": 1, "tolerance": 0.1, "maxiter": 9, "seed": 0},
    ),
    "condition_number": lambda b: (
        hbp.condition_number,
        {"operator": H3, "alpha": 0.1, "seed": 0},
    ),
    "estimate_trace": lambda b: (
        hbp.estimate_trace,
        {"operator": H3, "products": 6, "seed": 0},
    ),
    "negative_mass": lambda b: (hbp.negative_mass, {"operator": H3}),
    "compare_curvature": lambda b: (
        hbp.compare_curvature,
        {"operator": H3, "reference": H3, "samples": 3, "seed": 0},
    ),
    "inspect_curvature": lambda b: (
        hbp.inspect_curvature,
        {"model": b.model, "alpha": 0.1, "seed": 0},
    ),
    "HBPElementwise": lambda b: (
        hbp.HBPElementwise,
        {"function": torch.exp, "first": None, "second": None},
    ),
    "HBPResidual": lambda b: (
        hbp.HBPResidual,
        {"branch": hbp.HBPIdentity(), "shortcut": None},
    ),
    "set_seeds": lambda b: (hbp.set_seeds, {"seed": 0}),
    "set_dense_limit": lambda b: (hbp.set_dense_limit, {"nbytes": 2**29}),
}


def holds(
    model: hbp.HBPModule, optimizer: hbp.CGNewton, call: Callable[[], Any]
) -> Exception | None:
    """The error of a call, if any, of this package, with nothing changed."""
    before = condition(model, optimizer)
    curvature = [p.hessian for p in model.parameters()]
    approximation = repr(model)
    error = error_of(call)
    if error is not None:
        own = isinstance(error, DOCUMENTED) and is_own(error)
        assert own or is_of_torch_forward(error), f"{type(error).__name__}: {error}"
        assert condition(model, optimizer)[:2] == before[:2]
        assert repr(model) == approximation
        pairs = zip(model.parameters(), curvature, strict=True)
        assert all(p.hessian is h for p, h in pairs)
    return error


@pytest.mark.parametrize("name", CALLS)
@fuzzed(10)
@given(data=st.data())
def test_arguments_nobody_should_pass(name: str, data: st.DataObject) -> None:
    """One or two arguments of a valid call are replaced."""
    bench = Bench()
    function, arguments = CALLS[name](bench)
    names = data.draw(
        st.sets(st.sampled_from(sorted(arguments)), min_size=1, max_size=2)
    )
    spoiled = {key: data.draw(anything, label=key) for key in sorted(names)}
    limit = hbp.set_dense_limit(2**29)
    try:
        holds(
            bench.model, bench.optimizer, lambda: function(**{**arguments, **spoiled})
        )
    finally:
        hbp.set_dense_limit(limit)


FOUND: list[tuple[str, dict[str, Any]]] = [
    ("CGNewton", {"lr": Fraction(1, 3)}),
    ("CGNewton", {"lr": 10**400}),
    ("CGNewton", {"alpha": Fraction(1, 3)}),
    ("CGNewton", {"cg_tol": 10**400}),
    ("CGNewton", {"cg_atol": 10**400}),
    ("CGNewton", {"trust_radius": 10**400}),
    ("CGNewton", {"solver": np.ones(3)}),
    ("cg", {"A": None}),
    ("cg", {"A": EYE.float()}),
    ("cg", {"A": np.eye(3)}),
    ("cg", {"b": [0.1]}),
    ("cg", {"x0": "cg"}),
    ("LevenbergMarquardt", {"factor": "0.1"}),
    ("LevenbergMarquardt", {"min_alpha": None}),
    ("LevenbergMarquardt", {"loss_before": ""}),
    ("LevenbergMarquardt", {"loss_after": torch.ones(2)}),
    ("damping of what", {"optimizer": None}),
    ("convert", {"model": None}),
    ("batch_summed_hessian", {"outputs": None}),
    ("batch_summed_hessian", {"loss": torch.zeros((), device="meta")}),
    ("output_hessian", {"outputs": EYE.int()}),
    ("output_hessian", {"loss_func": None}),
    ("backward_hessian", {"compute_input_hessian": torch.ones(2)}),
    ("backward_hessian", {"output_hessian": EYE.to("meta")}),
    ("backward_hessian", {"output_hessian": EYE.to_sparse()}),
    ("solve", {"b": EYE.to_sparse()}),
    ("DenseOperator", {"matrix": None}),
    ("DenseOperator", {"matrix": torch.zeros(0, 0)}),
    ("condition_number", {"operator": DenseOperator(EYE.to("meta"))}),
    ("estimate_trace", {"seed": 10**400}),
]


@pytest.mark.parametrize(("name", "spoiled"), FOUND)
def test_what_once_ended_in_a_foreign_error(name: str, spoiled: dict) -> None:
    """The smallest counterexamples: each now names its argument, and is refused."""
    bench = Bench()
    function, arguments = CALLS[name](bench)
    found = holds(
        bench.model, bench.optimizer, lambda: function(**{**arguments, **spoiled})
    )
    assert isinstance(found, Exception)
    assert is_own(found)
    (argument,) = spoiled
    subject = {"b": "b ", "loss_before": "loss_before", "min_alpha": "min_alpha"}
    assert subject.get(argument, argument) in str(found)


# --------------------------------------------------------------------------------------
# Random networks on random inputs.
# --------------------------------------------------------------------------------------

ELEMENTWISE = [
    *ACTIVATIONS,
    hbp.HBPIdentity,
    lambda: hbp.HBPElementwise(torch.sin),
    lambda: hbp.HBPElementwise(torch.sin, torch.cos, lambda x: -torch.sin(x)),
]
Layer = Callable[[], hbp.HBPModule]
Sizes = tuple[int, ...]


def layers_for(shape: Sizes) -> list[Layer]:
    """Layers that take [N, *shape]."""
    channels, dimensions = shape[0], len(shape) - 1
    anywhere: list[Layer] = [
        *ELEMENTWISE,
        lambda: hbp.HBPFlatten(),
        lambda: hbp.HBPLayerNorm(shape[-1]),
        lambda: hbp.HBPLayerNorm(shape, elementwise_affine=False),
        lambda: hbp.HBPResidual(hbp.HBPTanh()),
    ]
    if dimensions == 0:
        inner = hbp.HBPSequential
        return [
            *anywhere,
            *[lambda: hbp.HBPLinear(channels, 3)] * 6,
            lambda: hbp.HBPLinear(channels, 4, bias=False),
            lambda: hbp.HBPResidual(inner(hbp.HBPLinear(channels, channels))),
            lambda: hbp.HBPResidual(
                hbp.HBPLinear(channels, 2), hbp.HBPLinear(channels, 2)
            ),
            lambda: hbp.HBPUnflatten(1, (1, channels)),
            lambda: hbp.HBPUnflatten(1, (1, channels, 1)),
            lambda: hbp.HBPDropout().eval(),
            lambda: hbp.HBPBatchNorm1d(channels).eval(),
            lambda: hbp.HBPBatchNorm1d(channels),
        ]

    def of(name: str) -> Any:
        return getattr(hbp, f"{name}{dimensions}d")

    return [
        *anywhere,
        *[lambda: of("HBPConv")(channels, 2, 2, padding=1)] * 3,
        lambda: of("HBPConv")(channels, channels, 1, groups=channels, bias=False),
        lambda: of("HBPConv")(channels, 1, 3, stride=2, padding=2, dilation=2),
        lambda: of("HBPConvTranspose")(channels, 2, 2, stride=2),
        lambda: of("HBPMaxPool")(2, 1, padding=1),
        lambda: of("HBPMaxPool")(2, ceil_mode=True),
        lambda: of("HBPAvgPool")(2, 1, padding=1),
        lambda: of("HBPAdaptiveAvgPool")(2),
        lambda: of("HBPZeroPad")(1),
        lambda: of("HBPDropout")().eval(),
        lambda: of("HBPBatchNorm")(channels).eval(),
    ]


@st.composite
def networks(draw: st.DrawFn, shape: Sizes) -> hbp.HBPSequential:
    """A few layers, each of which fits what the one before makes of [2, *shape]."""
    model = hbp.HBPSequential()
    for _ in range(draw(st.integers(1, 5))):
        layer = draw(st.sampled_from(layers_for(shape)))()
        try:
            with torch.no_grad():
                after = tuple(layer(torch.zeros(2, *shape)).shape[1:])
        except RuntimeError:  # A window larger than what is left.
            continue
        if math.prod(after) <= 60:
            model.append(layer)
            shape = after
    return model


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "leaf": lambda x: x.requires_grad_(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "sample expanded": lambda x: x[:1].expand(x.shape),
    "feature expanded": lambda x: x[..., :1].expand(x.shape),
    "view": lambda x: torch.cat([x, x])[: len(x)],
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "meta": lambda x: x.to("meta"),
    "flattened": lambda x: x.flatten(),
    "one sample": lambda x: x[0],
    "no sample": lambda x: x[:0],
    "sparse": lambda x: x.to_sparse(),
}
# The layers that sub-blocks matter to.
SPLITTING = (hbp.HBPLinear, hbp.HBPConv1d, hbp.HBPConv2d, hbp.HBPConv3d)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHER_DTYPES = [torch.int64, torch.complex64, torch.bool, torch.float64, torch.float32]
SPOILED: dict[str, Callable[[Tensor], Any]] = {
    "cropped": lambda h: h[..., :-1],
    "of one row": lambda h: h[..., 0],
    "repeated": lambda h: torch.stack([h] * 2),
    "of double": lambda h: h.double(),
    "of half": lambda h: h.half(),
    "complex": lambda h: h * 1j,
    "asymmetric": lambda h: h + torch.arange(h.shape[-1]),
    "nan": lambda h: h * NAN,
    "meta": lambda h: h.to("meta"),
    "transposed": lambda h: h.mT,
    "expanded": lambda h: h[..., :1, :1].expand(h.shape),
    "none": lambda h: None,
}


def loss_of(z: Tensor, targets: Tensor | None = None) -> Tensor:
    return (z.square() / 2 + z.sin()).mean()


@fuzzed(80)
@given(data=st.data())
def test_random_networks(data: st.DataObject) -> None:
    """Right blocks and a step that holds, or an error and nothing changed."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 9)))
    shape = draw(
        st.sampled_from([(3,), (5,), (2, 3), (1, 3, 3), (2, 2, 3), (1, 2, 2, 2)])
    )
    model = draw(networks(shape))
    dtype = draw(st.sampled_from([torch.float64] * 4 + FLOATS))
    model = model.to(dtype)
    for p in model.parameters():
        p.requires_grad_(draw(st.sampled_from([True, True, True, False])))
    layout = draw(st.sampled_from(["plain"] * 6 + list(LAYOUTS)))
    kind = draw(st.sampled_from([dtype] * 9 + OTHER_DTYPES))
    inputs = LAYOUTS[layout](torch.randn(3, *shape).to(dtype)).detach().to(kind)
    if layout == "leaf" and inputs.is_floating_point():
        inputs.requires_grad_()
    reading = draw(st.sampled_from(READINGS))
    treatment = draw(st.sampled_from(TREATMENTS))
    spoil = draw(st.sampled_from([None] * 4 + list(SPOILED)))
    solver = draw(st.sampled_from(list(SOLVERS)))
    mode = draw(
        st.sampled_from([torch.enable_grad] * 9 + [torch.no_grad, torch.inference_mode])
    )

    if not list(model.parameters()):
        model.append(hbp.HBPFlatten())
    optimizer = hbp.CGNewton(
        list(model.parameters()) or [nn.Parameter(torch.ones(1))],
        0.1,
        0.1,
        **SOLVERS[solver],
    )
    is_exact = reading == "exact"
    averages = reading != "averaged product"
    model.set_hbp_approximation(averages, averages)
    split_in = 2 if reading == "sub-blocks" else 1
    model.set_hbp_blocks(split_in)
    make = hbp.per_sample_hessian if is_exact else hbp.batch_summed_hessian
    found: dict[str, Any] = {}

    def forward() -> None:
        with mode():
            found["outputs"] = model(inputs)
            found["loss"] = loss_of(found["outputs"])

    error = error_of(forward)
    if error is not None:
        assert is_own(error) or is_of_torch_forward(error), repr(error)
        return
    outputs, loss = found["outputs"], found["loss"]

    def send_back() -> None:
        hessian = found["hessian"]
        model.backward_hessian(
            SPOILED[spoil](hessian) if spoil else hessian,
            modify_2nd_order_terms=treatment,
        )
        found["curved"] = spoil in (None, "transposed")

    def compare() -> None:
        if dtype != torch.float64 or kind != dtype or not found["curved"]:
            return
        judge = model, loss_of, inputs.detach(), inputs, treatment
        blocks = (
            reference.exact_blocks(*judge)
            if is_exact
            else reference.batch_blocks(*judge, averages, averages)
        )
        for name, p in model.named_parameters():
            if p.requires_grad:
                block = blocks.parameters[name]
                if isinstance(model.get_submodule(name.rpartition(".")[0]), SPLITTING):
                    sizes = row_sizes(p, min(split_in, len(p)))
                    block = block_diagonal_part(block, sizes)
                close(p.hessian.to_dense(), block, rtol=1e-8, atol=1e-11)

    stages: list[Callable[[], Any]] = [
        lambda: found.update(hessian=make(loss, outputs))
    ]
    if loss.requires_grad:
        stages.append(loss.backward)
    stages += [send_back, compare]
    if any(p.requires_grad for p in model.parameters()):
        stages.append(optimizer.step)
    live_through(model, optimizer, stages)
