"""Sums, multiples and inverses of operators, determinants and samples."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import close, indefinite, randn, spd
from test_operators import BUILDERS, Pair
from torch import Tensor, nn

import hbp
from hbp.operators import (
    DenseOperator,
    DiagonalOperator,
    KroneckerBlock,
    MatrixFree,
    SymmetricOperator,
)

DEFINITE = r"alpha=.* not positive definite.*larger alpha.*'abs'"


@pytest.fixture(params=[spd, indefinite], ids=["definite", "indefinite"])
def make(request: pytest.FixtureRequest) -> Callable[[int], Tensor]:
    return request.param


@pytest.fixture(params=BUILDERS)
def pair(request: pytest.FixtureRequest, make: Callable[[int], Tensor]) -> Pair:
    """Every kind of operator and, independently, the same matrix in NumPy."""
    return BUILDERS[request.param](make)


def _damped(dense: np.ndarray, alpha: float) -> np.ndarray:
    return (1 - alpha) * dense + alpha * np.eye(len(dense))


def _is_regular(dense: np.ndarray) -> bool:
    return np.linalg.matrix_rank(dense) == len(dense)


def _answers(operator: SymmetricOperator, dense: np.ndarray, atol: float) -> None:
    """The contract of every operator, for what arithmetic has made."""
    n = len(dense)
    assert operator.shape == (n, n)
    stack = randn(n, 3)
    close(operator @ stack, dense @ stack.numpy(), atol=atol)
    close(operator @ stack[:, 0], dense @ stack[:, 0].numpy(), atol=atol)
    close(operator.to_dense(), dense, atol=atol)
    close(operator.diagonal(), np.diag(dense), atol=atol)
    close(operator.trace(), np.trace(dense), atol=n * atol)
    close(operator.eigvalsh(), np.linalg.eigvalsh(dense), atol=atol)
    for alpha in (0.0, 0.3, 1.0):
        damped = _damped(dense, alpha)
        # What is next to singular is for the tests of each kind.
        if np.linalg.cond(damped) < 1e5:
            expected = np.linalg.solve(damped, stack.numpy())
            bound = 1e-10 * max(1, np.abs(expected).max())
            close(operator.solve(stack, alpha), expected, atol=bound)


def test_sums_and_multiples(pair: Pair) -> None:
    A, dense = pair
    B = spd(len(dense))
    other = DenseOperator(B)
    scale = torch.tensor(4.0)  # As a trace is.
    for operator, expected in (
        (A + other, dense + B.numpy()),
        (other - A, B.numpy() - dense),
        (2 * A, 2 * dense),
        (A * 0.5, dense / 2),
        (A / scale, dense / 4),
        (np.float64(3) * A, 3 * dense),
        (-A, -dense),
        (A - 0.5 * (A + A), 0 * dense),
    ):
        _answers(operator, expected, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_inverse(pair: Pair, alpha: float) -> None:
    A, dense = pair
    damped = _damped(dense, alpha)
    inverse = A.inverse(alpha)
    if not _is_regular(damped):
        for use in (inverse.to_dense, inverse.eigvalsh, inverse.logdet):
            with pytest.raises(ArithmeticError, match=r"singular.*larger alpha"):
                use()
        return
    expected = np.linalg.inv(damped)
    _answers(inverse, expected, atol=1e-10 * max(1, np.abs(expected).max()))
    close(inverse.inverse().to_dense(), damped, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.5, 1.0])
def test_logdet(pair: Pair, alpha: float) -> None:
    A, dense = pair
    for operator, expected in (
        (A, _damped(dense, alpha)),
        (2 * A, _damped(2 * dense, alpha)),
    ):
        if not _is_regular(expected) or np.linalg.eigvalsh(expected)[0] < 0:
            with pytest.raises(ArithmeticError, match=DEFINITE):
                operator.logdet(alpha)
            continue
        _, logdet = np.linalg.slogdet(expected)
        close(operator.logdet(alpha), logdet, rtol=1e-9, atol=1e-10)
        if alpha == 0.5:
            close(operator.inverse(alpha).logdet(), -logdet, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.5])
def test_samples_have_the_inverse_for_their_covariance(
    pair: Pair, alpha: float
) -> None:
    A, dense = pair
    count = 20_000
    for operator, expected in (
        (A, _damped(dense, alpha)),
        (0.5 * (3 * A), _damped(1.5 * dense, alpha)),
    ):
        generator = torch.Generator().manual_seed(3)
        if not _is_regular(expected) or np.linalg.eigvalsh(expected)[0] < 0:
            with pytest.raises(ArithmeticError, match=DEFINITE):
                operator.sample(count, alpha, generator)
            continue
        samples = operator.sample(count, alpha, generator)
        assert samples.shape == (len(dense), count)
        # With M = LLᵀ, Lᵀx is normal with the covariance I. An entry of its estimate
        # has the standard deviation √(2/count) at most, and a mean that of 1/√count.
        white = np.linalg.cholesky(expected).T @ samples.numpy()
        error = np.abs(white @ white.T / count - np.eye(len(dense))).max()
        assert error < 6 * math.sqrt(2 / count)
        assert np.abs(white.mean(1)).max() < 6 / math.sqrt(count)


def test_a_block_that_is_too_large_to_form() -> None:
    """Its null space has 30 · 19,995 dimensions, each of which counts."""
    H, F, alpha = spd(30), randn(5, 20_000), 0.1
    block = KroneckerBlock(DenseOperator(H), F)
    products = np.outer(torch.linalg.eigvalsh(H), torch.linalg.svdvals(F) ** 2)
    expected = np.log(0.9 * products + 0.1).sum() + 30 * 19_995 * math.log(0.1)
    before = hbp.set_dense_limit(2**20)
    try:
        close(block.logdet(alpha), expected)
        half = (block / 2).inverse(1 / 19)  # 1.9 times the inverse of the other.
        close(half.logdet(), 600_000 * math.log(1.9) - expected)
        sample = block.sample(1, alpha, torch.Generator().manual_seed(0))
        with pytest.raises(MemoryError, match="set_dense_limit"):
            (block + block).sample(1, alpha)
    finally:
        hbp.set_dense_limit(before)
    # xᵀMx is χ² with n degrees of freedom, of variance 2n.
    energy = float(0.9 * (sample.T @ (block @ sample)) + 0.1 * sample.square().sum())
    assert abs(energy - 600_000) < 6 * math.sqrt(1_200_000)


def test_samples_are_of_the_generator_or_of_the_global_one() -> None:
    A = DenseOperator(spd(3))
    draws = [A.sample(2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(A.sample(2), A.sample(2))


def test_a_wrong_partner_is_refused() -> None:
    A = DenseOperator(spd(3))
    for other in (DenseOperator(spd(2)), DenseOperator(spd(3).float())):
        with pytest.raises(ValueError, match=r"Cannot add .*float.* to .*\[3, 3\]"):
            A + other
        with pytest.raises(ValueError, match="must agree"):
            A - other
    vector = randn(3)
    for wrong in (
        *(lambda x=x: A + x for x in (1, 1.0, vector, spd(3), "A", None)),
        *(lambda x=x: x + A for x in (1, vector)),
        *(lambda x=x: A - x for x in (1, vector, None)),
        *(lambda x=x: A * x for x in (A, vector, 1j, "2")),
        *(lambda x=x: A / x for x in (A, vector, "2")),
        lambda: 1 - A,
        lambda: 1 / A,
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ZeroDivisionError):
        A / 0


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "0.1", None, math.nan])
def test_wrong_damping_is_refused_at_once(alpha: object) -> None:
    A = DenseOperator(spd(3))
    for use in (A.inverse, A.logdet, lambda alpha: A.sample(1, alpha)):
        with pytest.raises(ValueError, match=r"alpha=.* is outside \[0, 1\]"):
            use(alpha)


def test_wrong_samples_are_refused() -> None:
    A = DenseOperator(spd(3))
    for count in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"count=.* positive integer"):
            A.sample(count)
    with pytest.raises(TypeError, match="generator"):
        A.sample(1, generator=3)


def test_scipy_has_a_linear_operator(pair: Pair) -> None:
    A, dense = pair
    found = A.as_linear_operator()
    assert isinstance(found, scipy.sparse.linalg.LinearOperator)
    assert found.shape == dense.shape
    assert found.dtype == np.float64
    vectors = randn(len(dense), 2).numpy()
    close(found @ vectors, dense @ vectors)
    close(found @ vectors[::-1, 0], dense @ vectors[::-1, 0])  # No stride of torch.
    close(found.T @ vectors.astype(np.float32), dense @ vectors.astype(np.float32))
    with pytest.raises(TypeError, match="complex"):
        found @ (1j * vectors)


def test_scipys_eigenvalues_of_float32() -> None:
    A = 2 * DenseOperator(spd(30).float()) + DiagonalOperator(torch.ones(30))
    largest = scipy.sparse.linalg.eigsh(A.as_linear_operator(), 2)[0]
    assert largest.dtype == np.float32
    close(largest, A.eigvalsh()[-2:], rtol=1e-5)


def test_without_scipy_an_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="SciPy: pip install scipy"):
        DenseOperator(spd(2)).as_linear_operator()


def test_blocks_of_a_model_and_when_they_are_stale() -> None:
    model = hbp.HBPSequential(
        hbp.HBPLinear(4, 3), hbp.HBPTanh(), hbp.HBPLinear(3, 2)
    ).double()
    outputs = model(randn(6, 4))
    loss = nn.CrossEntropyLoss()(outputs, torch.arange(6) % 2)
    hbp.backward(model, outputs, loss)
    block = model[0].weight.hessian
    dense = block.to_dense().numpy()
    made = [block + block, 2 * block, block.inverse(0.1), block.inverse(0.1) / 2]
    close(block.logdet(0.1), np.linalg.slogdet(_damped(dense, 0.1))[1])
    twin = copy.deepcopy(made[0])
    with torch.no_grad():
        model[2].weight.add_(1)
    for operator in made:
        with pytest.raises(RuntimeError, match="changed since"):
            operator @ randn(12)
    for use in (block.logdet, lambda alpha: block.sample(1, alpha)):
        with pytest.raises(RuntimeError, match="changed since"):
            use(0.1)
    close(twin.to_dense(), 2 * dense)


def test_a_matrix_of_the_user_may_be_sampled() -> None:
    H = spd(3)
    A = MatrixFree(lambda v: H @ v, 3, H.dtype, H.device)
    close(A.logdet(), np.linalg.slogdet(H)[1])
    assert A.sample(5).shape == (3, 5)
