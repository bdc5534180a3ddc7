"""One contract that every operator passes, and what is special about some."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from helpers import close, indefinite, randn, spd
from torch import Tensor

from hbp import operators
from hbp.maps import DiagonalMap, MatrixMap
from hbp.operators import (
    Congruence,
    DenseOperator,
    DirectSum,
    KroneckerBlock,
    KroneckerDiagonal,
    KroneckerProduct,
    MatrixFree,
    Reduction,
    SymmetricOperator,
)

Pair = tuple[SymmetricOperator, np.ndarray]


def _dense(make: Callable[[int], Tensor], n: int = 5) -> Pair:
    H = make(n)
    return DenseOperator(H), H.numpy()


def _through_weight(make: Callable[[int], Tensor], bent: bool = False) -> Pair:
    H, W = make(3), randn(3, 5)
    r = torch.linspace(0.1, 0.5, 5, dtype=torch.float64) if bent else None
    dense = np.einsum("zx,zy,yw->xw", W, H, W) + (np.diag(r) if bent else 0)
    return Congruence(DenseOperator(H), MatrixMap(W), r), dense


def _through_slope(make: Callable[[int], Tensor], bent: bool = False) -> Pair:
    H, d = make(4), randn(4)
    r = randn(4).abs() if bent else None
    dense = d.numpy()[:, None] * H.numpy() * d.numpy() + (np.diag(r) if bent else 0)
    return Congruence(DenseOperator(H), DiagonalMap(d), r), dense


def _chain(make: Callable[[int], Tensor], formed: bool = False) -> Pair:
    """Four steps back, as through two layers and their activations."""
    operator, dense = _dense(make, 3)
    for size in (4, 5):
        W, d, r = randn(operator.shape[0], size), randn(size), randn(size).abs()
        operator = Congruence(operator, MatrixMap(W))
        operator = Congruence(operator, DiagonalMap(d), r)
        J = W.numpy() * d.numpy()
        dense = J.T @ dense @ J + np.diag(r)
    if formed:
        operator.to_dense()
    return operator, dense


def _through_narrow_weights(make: Callable[[int], Tensor]) -> Pair:
    """Each layer twice as wide as the one above, so that a solve goes through that."""
    operator, dense = _dense(make, 2)
    for size in (4, 9):
        W, d, r = randn(operator.shape[0], size), randn(size), randn(size).abs()
        operator = Congruence(operator, MatrixMap(W))
        operator = Congruence(operator, DiagonalMap(d), r, nonnegative=True)
        J = W.numpy() * d.numpy()
        dense = J.T @ dense @ J + np.diag(r)
    return operator, dense


def _kronecker(make: Callable[[int], Tensor], m: int) -> Pair:
    H, S = make(4), spd(m)
    return KroneckerProduct(DenseOperator(H), S), np.kron(H.numpy(), S.numpy())


def _copies(make: Callable[[int], Tensor], values: list[float]) -> Pair:
    H, scales = make(4), torch.tensor(values, dtype=torch.float64)
    dense = np.kron(H.numpy(), np.diag(values))
    return KroneckerDiagonal(DenseOperator(H), scales), dense


def _told_block(make: Callable[[int], Tensor]) -> Pair:
    """A block with a weight that knows a gradient, which b need not be."""
    H, F, delta = make(3), randn(4, 6), randn(4, 3)
    dense = np.kron(H.numpy(), 0.25 * (F.T @ F).numpy())
    return KroneckerBlock(DenseOperator(H), F, 0.25, delta), dense


def _block(make: Callable[[int], Tensor], rows: Callable[[], Tensor]) -> Pair:
    """Index (o, i) at o·in + i, written out."""
    H, F = make(3), rows()
    S = np.einsum("ni,nj->ij", F, F)
    size = 3 * F.shape[1]
    dense = np.einsum("op,ij->oipj", H, S).reshape(size, size)
    return KroneckerBlock(DenseOperator(H), F), dense


def _sum(make: Callable[[int], Tensor]) -> Pair:
    parts = [_dense(make, 2), _block(make, partial(randn, 4, 3)), _dense(make, 3)]
    sizes = np.cumsum([0] + [len(dense) for _, dense in parts])
    dense = np.zeros((sizes[-1], sizes[-1]))
    for (_, block), i, j in zip(parts, sizes, sizes[1:], strict=False):
        dense[i:j, i:j] = block
    return DirectSum([operator for operator, _ in parts]), dense


def _matrix_free(make: Callable[[int], Tensor]) -> Pair:
    H = make(4)
    return MatrixFree(lambda v: H @ v, 4, H.dtype, H.device), H.numpy()


def _repeated_rows() -> Tensor:
    row = randn(1, 5)
    return torch.cat([row, 2 * row, row])


def _with_zero_row() -> Tensor:
    return torch.cat([torch.zeros(1, 5, dtype=torch.float64), randn(2, 5)])


BUILDERS: dict[str, Callable[..., Pair]] = {
    "dense": _dense,
    "through a weight": _through_weight,
    "through a weight, bent": partial(_through_weight, bent=True),
    "through a slope": _through_slope,
    "through a slope, bent": partial(_through_slope, bent=True),
    "chain": _chain,
    "chain, matrix formed": partial(_chain, formed=True),
    "kronecker": partial(_kronecker, m=3),
    "kronecker with a number": partial(_kronecker, m=1),
    "copies": partial(_copies, values=[0.3, 2.0, 1.0]),
    "one copy": partial(_copies, values=[0.7]),
    "block, rank one": partial(_block, rows=partial(randn, 1, 5)),
    "block, few rows": partial(_block, rows=partial(randn, 2, 5)),
    "block, as many rows as inputs": partial(_block, rows=partial(randn, 4, 4)),
    "block, many rows": partial(_block, rows=partial(randn, 7, 3)),
    "block, one input": partial(_block, rows=partial(randn, 2, 1)),
    "block, zero input": partial(_block, rows=lambda: randn(1, 4) * 0),
    "block, a zero row": partial(_block, rows=_with_zero_row),
    "block, repeated rows": partial(_block, rows=_repeated_rows),
    "block, told a gradient": _told_block,
    "direct sum": _sum,
    "matrix-free": _matrix_free,
}


@pytest.fixture(params=[spd, indefinite], ids=["definite", "indefinite"])
def make(request: pytest.FixtureRequest) -> Callable[[int], Tensor]:
    return request.param


@pytest.fixture(autouse=True, params=[0, 256], ids=["chain", "dense if small"])
def dense_features(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms of a product, though every matrix here is small."""
    monkeypatch.setattr(operators, "DENSE_FEATURES", request.param)


@pytest.fixture(params=BUILDERS)
def pair(request: pytest.FixtureRequest, make: Callable[[int], Tensor]) -> Pair:
    """An operator and, independently, the same matrix in NumPy."""
    return BUILDERS[request.param](make)


def _expand(reduction: Reduction, y: Tensor, n: int) -> Tensor:
    """The vector, [n], with coordinates ``y``."""
    start = randn(n)
    target = start.clone()
    reduction.add_to(target, y, scale=-0.5)
    return -2 * (target - start)


# --------------------------------------------------------------------------------------
# The contract.
# --------------------------------------------------------------------------------------


def test_the_matrix_and_its_products(pair: Pair) -> None:
    operator, dense = pair
    n = len(dense)
    assert operator.shape == torch.Size((n, n))
    assert operator.dtype == torch.float64
    assert operator.device == torch.device("cpu")
    name = type(operator).__name__
    assert repr(operator) == (
        f"{name}(shape=[{n}, {n}], dtype=torch.float64, device='cpu')"
    )
    vector, stack = randn(n), randn(n, 3)
    kept = stack.clone()
    for _ in range(2):  # The second time after to_dense().
        close(operator @ vector, dense @ vector.numpy())
        close(operator @ stack, dense @ stack.numpy())
        # Columns need not be contiguous.
        close(operator @ stack.T.contiguous().T, dense @ stack.numpy())
        close(operator.diagonal(), np.diag(dense))
        close(operator.trace(), np.trace(dense))
        close(operator.eigvalsh(), np.linalg.eigvalsh(dense), atol=1e-12)
        close(operator.to_dense(), dense)
    assert torch.equal(stack, kept)


@pytest.mark.parametrize("alpha", [0.02, 0.5, 1.0])
def test_solve(pair: Pair, alpha: float) -> None:
    operator, dense = pair
    damped = (1 - alpha) * dense + alpha * np.eye(len(dense))
    # The indefinite cases too must be well away from singular for this comparison.
    assert np.linalg.cond(damped) < 1e5
    b = randn(len(dense), 2)
    kept = b.clone()
    expected = np.linalg.solve(damped, b.numpy())
    scale = np.abs(expected).max()
    # About cond · eps; 2e-13 was the largest.
    close(operator.solve(b, alpha), expected, atol=1e-11 * scale)
    one = operator.solve(b[:, 0], alpha)
    close(one, expected[:, 0], atol=1e-11 * scale)
    assert torch.equal(b, kept)
    if alpha == 1:
        close(one, b[:, 0])


def test_solve_without_damping(pair: Pair) -> None:
    """The exact solution where there is one, an error where there is none."""
    operator, dense = pair
    b = randn(len(dense))
    if np.linalg.matrix_rank(dense) < len(dense):
        with pytest.raises(ArithmeticError, match=r"singular.*larger alpha"):
            operator.solve(b)
    else:
        close(operator.solve(b), np.linalg.solve(dense, b), rtol=1e-9)


def test_reduction_is_an_isometry(pair: Pair) -> None:
    """A, b and every Krylov vector in orthonormal coordinates of a subspace."""
    operator, dense = pair
    b = randn(len(dense))
    reduction = operator.reduce(b)
    size = reduction.operator.shape[0]
    assert size <= len(dense)
    assert reduction.rhs.shape in {(size,), (size + 1,)}
    close(_expand(reduction, reduction.rhs, len(b)), b)

    krylov, full = [reduction.rhs], [b.numpy()]
    for _ in range(4):
        product = torch.zeros_like(reduction.rhs)
        product[:size] = reduction.operator @ krylov[-1][:size]
        krylov.append(product)
        full.append(dense @ full[-1])
        close(_expand(reduction, krylov[-1], len(b)), full[-1])
    gram, full_gram = torch.stack(krylov), np.stack(full)
    # Inner products up to 10⁴; 2e-12 was the largest.
    close(gram @ gram.T, full_gram @ full_gram.T, rtol=1e-10)
    close(reduction.rhs.norm(), b.norm())

    alpha = 0.02
    damped = (1 - alpha) * dense + alpha * np.eye(len(dense))
    y, margin = reduction.solve_damped(alpha)
    assert margin > 1
    solution = _expand(reduction, y, len(b))
    close(solution, np.linalg.solve(damped, b), rtol=1e-9)


def test_reduction_of_special_right_hand_sides(pair: Pair) -> None:
    """In the range (no remainder), and zero."""
    operator, dense = pair
    b = torch.tensor(dense @ randn(len(dense)).numpy())
    reduction = operator.reduce(b)
    close(_expand(reduction, reduction.rhs, len(b)), b)
    close(reduction.rhs.norm(), b.norm())
    zero = operator.reduce(b * 0)
    close(zero.rhs, np.zeros(zero.rhs.shape))
    close(_expand(zero, zero.rhs, len(b)), np.zeros(len(b)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies(pair: Pair, copied: Callable) -> None:
    operator, dense = pair
    if isinstance(operator, MatrixFree):
        operator = MatrixFree(
            DenseOperator(torch.tensor(dense)).__matmul__,
            len(dense),
            torch.float64,
            torch.device("cpu"),
        )
    twin = copied(operator)
    v = randn(len(dense))
    close(twin @ v, dense @ v.numpy())
    close(twin.to_dense(), dense)
    assert repr(twin) == repr(operator)


def test_wrong_vectors(pair: Pair) -> None:
    operator, dense = pair
    n = len(dense)
    with pytest.raises(ValueError, match=rf"shape \[{n + 1}\].*takes \[{n}\]"):
        operator @ randn(n + 1)
    with pytest.raises(ValueError, match="vectors as columns"):
        operator @ randn(n, 1, 1)
    with pytest.raises(ValueError, match=r"float32.*float64.*\.to\("):
        operator @ torch.ones(n)
    with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
        operator @ dense
    with pytest.raises(ValueError, match=r"b has shape"):
        operator.solve(randn(n + 1), 0.1)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha=.* outside \[0, 1\]"):
            operator.solve(randn(n), alpha)


# --------------------------------------------------------------------------------------
# What is special.
# --------------------------------------------------------------------------------------


def _weight_chain() -> tuple[Tensor, SymmetricOperator]:
    weight = torch.nn.Parameter(randn(3, 5))
    inner = Congruence(DenseOperator(spd(3)), MatrixMap(weight))
    return weight, Congruence(inner, DiagonalMap(randn(5)))


@pytest.mark.parametrize(
    "use",
    [
        lambda A: A @ randn(5),
        lambda A: A.to_dense(),
        lambda A: A.diagonal(),
        lambda A: A.trace(),
        lambda A: A.eigvalsh(),
        lambda A: A.solve(randn(5), 0.1),
    ],
    ids=["matmul", "to_dense", "diagonal", "trace", "eigvalsh", "solve"],
)
def test_curvature_of_a_weight_that_has_changed_is_refused(use: Callable) -> None:
    weight, operator = _weight_chain()
    use(operator)  # May not form the matrix and so hide the change, except …
    weight, operator = _weight_chain()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \[3, 5\] has changed since"):
        use(operator)


def test_a_matrix_that_was_formed_survives_the_weight() -> None:
    weight, operator = _weight_chain()
    dense = operator.to_dense().clone()
    with torch.no_grad():
        weight.add_(1)
    close(operator.to_dense(), dense)


def test_products_notice_a_changed_weight_though_the_matrix_was_formed() -> None:
    weight, operator = _weight_chain()
    operator @ randn(5)
    operator.to_dense()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="has changed since"):
        operator @ randn(5)


def test_a_copy_does_not_follow_the_weight() -> None:
    weight, operator = _weight_chain()
    twin = pickle.loads(pickle.dumps(operator))
    dense = operator.to_dense().clone()
    with torch.no_grad():
        weight.add_(1)
    close(twin.to_dense(), dense)


def test_a_copy_of_stale_curvature_stays_stale() -> None:
    """Copying must work, as in torch.save(model) after a step; products must not."""
    weight, operator = _weight_chain()
    with torch.no_grad():
        weight.add_(1)
    twin = pickle.loads(pickle.dumps(operator))
    with pytest.raises(RuntimeError, match="has changed since"):
        twin @ randn(5)


def test_a_product_forms_no_matrix() -> None:
    """10⁴ features: the matrix alone would take 800 MB."""
    n = 10_000
    outer = DenseOperator(spd(3))
    chain = Congruence(outer, MatrixMap(randn(3, n)))
    block = KroneckerBlock(
        Congruence(chain, DiagonalMap(randn(n)), randn(n)), randn(1, 30)
    )
    v = randn(30 * n)
    product = block @ v
    # One entry by hand: H is JᵀMJ + diag(r).
    head, step = block.outer, block.outer.jacobian.diagonal
    J = chain.jacobian.matrix * step
    row = J[:, 7] @ outer.matrix @ J
    row[7] += head.second_order[7]
    x = block.rows[0]
    close(product[7 * 30 + 4], row @ (v.view(n, 30) @ x) * x[4], rtol=1e-9)


def test_to_dense_refuses_what_does_not_fit() -> None:
    block = KroneckerBlock(DenseOperator(spd(200)), randn(1, 1000))
    message = r"\[200000, 200000\].*float64 needs 298\.0 GiB.*0\.5 GiB.*diagonal\(\)"
    with pytest.raises(MemoryError, match=message):
        block.to_dense()
    assert block.diagonal().shape == (200_000,)
    b = randn(200_000)
    x = block.solve(b, 0.1)
    close(0.9 * (block @ x) + 0.1 * x, b, atol=1e-9)


def _first_layer_in_float32() -> tuple[Tensor, Tensor, Tensor]:
    """H, x̄ and a gradient as of a layer with 784 pixels and 10 classes."""
    samples, out, into = 500, 10, 784
    p = randn(samples, out).softmax(1)
    H = torch.diag(p.mean(0)) - p.T @ p / samples
    inputs = torch.rand(samples, into) * (torch.rand(samples, into) < 0.4)
    delta = (p - torch.eye(out)[torch.randint(out, (samples,))]) / samples
    return H.float(), inputs.mean(0), delta.float().T @ inputs


def test_float32_keeps_its_digits() -> None:
    """α = 0.02 and curvature 100 times larger along the mean input.

    There the solution is far smaller than B/α. The projected form computes it on its
    own; B/α - … subtracts two numbers that nearly agree.
    """
    alpha = 0.02
    H, x, B = _first_layer_in_float32()
    b, rows = B.flatten(), x[None]
    exact = KroneckerBlock(DenseOperator(H.double()), rows.double())
    expected = exact.solve(b.double(), alpha).view_as(B)
    operator = KroneckerBlock(DenseOperator(H), rows)
    found = operator.solve(b, alpha)
    # The same through the reduction, as a step of CGNewton takes it.
    reduction, step = operator.reduce(b), torch.zeros_like(b)
    reduction.add_to(step, reduction.solve_damped(alpha)[0], scale=1.0)
    # The algebraically equal form without projection.
    inner = torch.linalg.solve(
        (1 - alpha) * (x @ x) * H + alpha * torch.eye(len(H)), (1 - alpha) * H @ B @ x
    )
    naive = (B - torch.outer(inner, x)) / alpha

    def errors(solution: Tensor) -> tuple[float, float]:
        """Relative, of the whole and of what the layer's output sees: d x̄."""
        gap = solution.view_as(B).double() - expected
        along = gap @ x.double(), expected @ x.double()
        return float(gap.norm() / expected.norm()), float(
            along[0].norm() / along[1].norm()
        )

    # Measured: 9e-8 and 3e-5; 2e-7 and 3e-5 for the step; 3e-6 and 9e-4 naively.
    for solution in (found, step):
        whole, along = errors(solution)
        assert whole < 1e-6
        assert along < 2e-4
        assert along < errors(naive)[1] / 5


def test_singular_softmax_curvature_is_noticed() -> None:
    """diag(p) - ppᵀ has the null vector 1 up to round-off, never an exact zero."""
    for classes in (2, 3, 10, 40):
        p = randn(classes + 5, classes).softmax(1)
        H = torch.diag(p.mean(0)) - p.T @ p / len(p)
        with pytest.raises(ArithmeticError, match="singular"):
            DenseOperator(H).solve(randn(classes))


def test_ill_conditioned_but_regular_systems_are_solved() -> None:
    """Condition 10¹⁰ is no reason to refuse in float64."""
    values = torch.logspace(-10, 0, 20, dtype=torch.float64)
    basis = torch.linalg.qr(randn(20, 20)).Q
    x = randn(20)
    for operator in (
        DenseOperator(basis * values @ basis.T),
        KroneckerProduct(DenseOperator(torch.diag(values[:5])), torch.eye(4).double()),
    ):
        close(operator @ operator.solve(x), x, atol=1e-4)


def test_not_finite_curvature_is_no_solution() -> None:
    for bad in (float("nan"), float("inf")):
        H = spd(3)
        H[0, 0] = bad
        with pytest.raises(ArithmeticError, match="not finite"):
            DenseOperator(H).solve(randn(3), 0.1)


def test_factors_may_be_stored_by_columns() -> None:
    H, F = spd(3), randn(2, 4)
    S = F.T @ F
    expected = np.kron(H, S)
    outer = DenseOperator(H.T.contiguous().T)
    close(KroneckerBlock(outer, F.T.contiguous().T).to_dense(), expected)
    close(KroneckerProduct(outer, S.T.contiguous().T).to_dense(), expected)


def test_wrong_pieces() -> None:
    with pytest.raises(ValueError, match=r"square, got shape \[2, 3\]"):
        DenseOperator(randn(2, 3))
    with pytest.raises(ValueError, match="blocks is empty"):
        DirectSum([])
    with pytest.raises(ValueError, match="blocks differ in dtype or device"):
        DirectSum([DenseOperator(spd(2)), DenseOperator(spd(2).float())])
    for answer, got in ((randn(3), r"\[3\]"), (1.0, "float")):
        operator = MatrixFree(
            lambda v, answer=answer: answer, 2, torch.float64, torch.device("cpu")
        )
        with pytest.raises(ValueError, match=rf"returned .*{got}.* shape \[2\]"):
            operator @ randn(2)


def test_matrix_free_products_may_carry_a_graph() -> None:
    """A product by double backpropagation needs gradients, though step() has none."""
    theta = randn(3).requires_grad_()

    def product(v: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(theta.exp().sum(), theta, create_graph=True)
        return torch.autograd.grad(gradient @ v, theta)[0]

    operator = MatrixFree(product, 3, theta.dtype, theta.device)
    with torch.no_grad():
        close(operator.to_dense(), torch.diag(theta.exp()))


def test_decompositions_on_which_float32_gives_up() -> None:
    """Saturated features, of which LAPACK refuses some in float32: that of seed 5."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        features = (torch.rand(32, generator=generator) < 0.4).float()
        places = torch.randint(32, (3,), generator=generator)
        features[places] = torch.tensor([9e-6, 1e-16, 6e-18])
        gram = torch.outer(features, features)
        values, vectors = operators.eigh_of_gram(gram)
        # The largest error in 200 seeds was 4.3e-6, at a largest entry of 1.
        assert ((vectors * values) @ vectors.T - gram).abs().max() < 2e-5
