"""What several tests build on: matrices, small networks, one training pass."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hbp
from hbp.core.cg import Product, cg_rows
from hbp.operators import DenseOperator, SymmetricOperator

ROOT = Path(__file__).resolve().parents[1]

# Float64 blocks of these small networks have entries of about 1 and are sums of
# some hundred products. Measured, relative to entries above 1: 6e-16 for blocks of
# networks, 5e-14 for products of the chain. The issue asks for 1e-10.
EXACT = {"rtol": 1e-11, "atol": 1e-12}

# Pages whose examples print what the page shows, to so much. Measured for treatments:
# inputs that differ by a millionth change none of the digits shown, and one unit of the
# last is up to a tenth of a number such as 1.1. Of networks trained in float64, changes
# of 1e-15 change none either, with one and two threads; in float32, shares by 7 %.
SHARE = 0.1
COMPARED = {"treatments.md": 0.1, "uses.md": 0.1, "README.md": 0.3}

TREATMENTS = [None, "none", "zero", "abs", "clip"]
SCHEMES = [(True, True), (True, False), (False, True), (False, False)]
# Those of torch that are formulas, each with its first and second derivative.
ACTIVATIONS = [
    hbp.HBPSigmoid,
    hbp.HBPTanh,
    hbp.HBPReLU,
    hbp.HBPLeakyReLU,
    hbp.HBPELU,
    hbp.HBPSELU,
    hbp.HBPCELU,
    hbp.HBPGELU,
    hbp.HBPSiLU,
    hbp.HBPMish,
    hbp.HBPSoftplus,
    hbp.HBPSoftsign,
    hbp.HBPLogSigmoid,
    hbp.HBPHardtanh,
    hbp.HBPReLU6,
    hbp.HBPHardswish,
]


def load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def same_drawing(drawn: str, stored: str) -> None:
    """The same text, and the same numbers up to one unit of their last digit.

    Other machines sum in another order. That may turn a rounding, and no more: what is
    computed in float64 for a drawing is known to 1e-9 or better.
    """
    assert NUMBER.sub("#", drawn) == NUMBER.sub("#", stored)
    for new, old in zip(NUMBER.findall(drawn), NUMBER.findall(stored), strict=True):
        digits = max(len(number.partition(".")[2]) for number in (new, old))
        unit = 10**-digits if digits else 0
        assert abs(float(new) - float(old)) < 1.5 * unit + 1e-12, (new, old)


def close(actual: Any, expected: Any, what: str = "", **tolerance: float) -> None:
    """Equal shapes and, up to round-off (``EXACT``), equal values."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape, what
    np.testing.assert_allclose(actual, expected, err_msg=what, **(tolerance or EXACT))


def to_numpy(value: Any) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)


def seed(number: int) -> None:
    """As ``torch.manual_seed``, in a tenth of its time.

    That writes down a stack for every kind of device that is not there.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def spd(n: int) -> Tensor:
    """A random positive definite matrix, eigenvalues in about [0.2, 4]."""
    factor = randn(n, 2 * n)
    return factor @ factor.T / (2 * n) + 0.1 * torch.eye(n, dtype=torch.float64)


def indefinite(n: int) -> Tensor:
    """A random symmetric matrix with eigenvalues ±1, ±2, …: n ≥ 2 of both signs."""
    basis = torch.linalg.qr(randn(n, n)).Q
    signs = torch.tensor([(-1) ** i for i in range(n)])
    values = signs * torch.arange(1, n + 1, dtype=torch.float64)
    matrix = basis * values @ basis.T
    return (matrix + matrix.T) / 2


def small_net(double: bool = True) -> hbp.HBPSequential:
    """4-5-3 with a sigmoid between, seeded by the caller."""
    model = hbp.HBPSequential(
        hbp.HBPLinear(4, 5), hbp.HBPSigmoid(), hbp.HBPLinear(5, 3)
    )
    return model.double() if double else model


def small_batch(n: int = 6, double: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs [n, 4] and labels [n] for ``small_net``."""
    x = randn(n, 4, dtype=torch.float64 if double else torch.float32)
    return x, torch.arange(n) % 3


def send_back(
    model: hbp.HBPModule,
    inputs: Tensor,
    targets: Tensor,
    loss_func: Callable[[Tensor, Tensor], Tensor] | None = None,
    treatment: str | None = None,
) -> SymmetricOperator:
    """One pass: forward, ``backward``, ``backward_hessian``. Returns H_x."""
    model.zero_grad()
    # Requiring the input's gradient gives δ to layers in front of the first weight.
    outputs = model(inputs.clone().requires_grad_())
    loss = (loss_func or nn.CrossEntropyLoss())(outputs, targets)
    curvature = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    input_hessian = model.backward_hessian(
        curvature, compute_input_hessian=True, modify_2nd_order_terms=treatment
    )
    assert input_hessian is not None
    return input_hessian


def trained(treatment: str | None = "abs", **kwargs: Any) -> hbp.HBPSequential:
    """``small_net`` after a pass: gradients and curvature are there."""
    model = small_net(**kwargs)
    send_back(model, *small_batch(**kwargs), treatment=treatment)
    return model


def values(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Row(NamedTuple):
    """[(1-α)A + αI] x = b, one of the systems that are solved together.

    Attributes:
        operator: A, [k, k]. Where b is longer than k, A has zeros there.
        b: [n], n ≥ k.
        alpha: α.
        atol: Absolute tolerance.
        radius: ‖x‖ ≤ radius.
    """

    operator: SymmetricOperator
    b: Tensor
    alpha: float = 0.0
    atol: float = 0.0
    radius: float = math.inf

    @property
    def matrix(self) -> Tensor:
        """(1-α)A + αI, dense."""
        k, n = self.operator.shape[0], len(self.b)
        A = self.b.new_zeros(n, n)
        A[:k, :k] = self.operator.to_dense()
        return (1 - self.alpha) * A + self.alpha * torch.eye(n, dtype=A.dtype)


class Solved(NamedTuple):
    """What ``cg_rows`` finds, a row or a number for each system."""

    x: Tensor
    iterations: Tensor
    residual_norm: Tensor
    converged: Tensor
    negative_curvature: Tensor
    on_boundary: Tensor
    overlap: Tensor
    norm: Tensor
    descent: Tensor


def solve_rows(
    rows: Sequence[Row], tol: float, maxiter: int | None = None, check_every: int = 1
) -> Solved:
    """``cg_rows`` on systems of any sizes, each padded with zeros."""
    width = max(len(row.b) for row in rows)
    b = torch.stack([nn.functional.pad(r.b, (0, width - len(r.b))) for r in rows])
    alphas = b.new_tensor([[row.alpha] for row in rows])

    def product_of(live: Sequence[int], _: Tensor) -> Product:
        own = [(rows[i].operator, 1 - rows[i].alpha) for i in live]

        def product(p: Tensor) -> Tensor:
            Ap = p * alphas[list(live)]
            for place, (A, weight) in enumerate(own):
                k = A.shape[0]
                Ap[place, :k].add_(A.product(p[place : place + 1, :k])[0], alpha=weight)
            return Ap

        return product

    bounded = any(math.isfinite(row.radius) for row in rows)
    found = cg_rows(
        product_of,
        b,
        tol,
        b.new_tensor([[row.atol] for row in rows]),
        10 * width if maxiter is None else maxiter,
        b.new_tensor([[row.radius] for row in rows]) if bounded else None,
        check_every,
    )
    steps, residual, *flags, overlap, norm, descent = found.facts.unbind(1)
    is_true = [flag > 0 for flag in flags]
    return Solved(found.x, steps, residual, *is_true, overlap, norm, descent)


def columns_by_cg(
    block: SymmetricOperator, b: Tensor, alpha: float, **options: Any
) -> tuple[Tensor, list[hbp.CGResult]]:
    """``cg`` on each [(1-α)λ_j H + αI] y_j = b_j by itself, and what they stand for."""
    system = block.system(b)
    H, found = system.operator.to_dense(), []
    for scale, column in zip(system.scales, system.rhs, strict=True):
        matrix = Row(DenseOperator(scale * H), column, alpha).matrix
        found.append(hbp.cg(matrix, column, **options))
    vector = torch.zeros_like(b)
    system.add_to(vector, torch.stack([result.x for result in found]), 1.0)
    return vector, found


def examples_of(page: Path) -> list[tuple[str, str]]:
    """The code of each example, and what the page shows of it, or "".

    Each runs alone, or after the first one where it says so.
    """
    fence = r"^```python\n((?:(?!^```).)*?)^```\n(?:\n```text\n(.*?)^```)?"
    found = re.findall(fence, page.read_text("utf-8"), re.M | re.S)
    after = "# After the first block.\n"
    return [
        (found[0][0] + code if code.startswith(after) else code, shown)
        for code, shown in found
    ]
