"""One contract that every operator passes, and what is special about some."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import close, indefinite, randn, spd
from torch import Tensor

from hbp.blocks import BlockDiagonal, split
from hbp.core import operators
from hbp.core.jacobians import Diagonal, Matrix, as_batch
from hbp.core.operators import Repeated, System, solve_system
from hbp.fast import RowsBlock
from hbp.operators import (
    Congruence,
    DenseOperator,
    DiagonalOperator,
    KroneckerBlock,
    MatrixFree,
    OperatorSum,
    SampleBlocks,
    SymmetricOperator,
    ZeroOperator,
)

Pair = tuple[SymmetricOperator, np.ndarray]


def _dense(make: Callable[[int], Tensor], n: int = 5) -> Pair:
    H = make(n)
    return DenseOperator(H), H.numpy()


def _diagonal(make: Callable[[int], Tensor]) -> Pair:
    values = torch.linalg.eigvalsh(make(4))
    return DiagonalOperator(values), np.diag(values)


def _zero(make: Callable[[int], Tensor]) -> Pair:
    return ZeroOperator(4, make(2)), np.zeros((4, 4))


def _samples(make: Callable[[int], Tensor]) -> Pair:
    matrices = torch.stack([make(3), 2 * make(3)])
    dense = np.zeros((6, 6))
    dense[:3, :3], dense[3:, 3:] = matrices.numpy()
    return SampleBlocks(matrices), dense


def _repeated(make: Callable[[int], Tensor]) -> Pair:
    H = make(2)
    return Repeated(DenseOperator(H), 3), np.kron(np.eye(3), H.numpy() / 3)


def _sum(make: Callable[[int], Tensor]) -> Pair:
    parts = [_dense(make, 6), _block(make, partial(randn, 1, 2)), _samples(make)]
    operators, matrices = zip(*parts, strict=True)
    return OperatorSum(operators), sum(matrices)


def _second_order(r: Tensor | None) -> DiagonalOperator | None:
    return None if r is None else DiagonalOperator(r)


def _through_weight(make: Callable[[int], Tensor], bent: bool = False) -> Pair:
    H, W = make(3), randn(3, 5)
    r = torch.linspace(0.1, 0.5, 5, dtype=torch.float64) if bent else None
    dense = np.einsum("zx,zy,yw->xw", W, H, W) + (np.diag(r) if bent else 0)
    return Congruence(DenseOperator(H), Matrix(W, 1), _second_order(r)), dense


def _through_slope(make: Callable[[int], Tensor], bent: bool = False) -> Pair:
    H, d = make(4), randn(4)
    r = randn(4).abs() if bent else None
    dense = d.numpy()[:, None] * H.numpy() * d.numpy() + (np.diag(r) if bent else 0)
    return Congruence(DenseOperator(H), Diagonal(d[None]), _second_order(r)), dense


def _bent_by_a_matrix(make: Callable[[int], Tensor]) -> Pair:
    """A second-order term that is no diagonal matrix, as that of a general layer."""
    H, W, R = make(2), randn(2, 4), spd(4)
    dense = W.numpy().T @ H.numpy() @ W.numpy() + R.numpy()
    return Congruence(DenseOperator(H), Matrix(W, 1), DenseOperator(R)), dense


def _chain(make: Callable[[int], Tensor], formed: bool = False) -> Pair:
    """Four steps back, as through two layers and their activations."""
    operator, dense = _dense(make, 3)
    for size in (4, 5):
        W, d, r = randn(operator.shape[0], size), randn(size), randn(size).abs()
        operator = Congruence(operator, Matrix(W, 1))
        operator = Congruence(operator, Diagonal(d[None]), DiagonalOperator(r))
        J = W.numpy() * d.numpy()
        dense = J.T @ dense @ J + np.diag(r)
    if formed:
        operator.to_dense()
    return operator, dense


def _through_narrow_weights(make: Callable[[int], Tensor]) -> Pair:
    """Each layer twice as wide as the one above, so that a solve goes through that."""
    operator, dense = _dense(make, 2)
    through = as_batch(None).congruence
    for size in (4, 9):
        W, d, r = randn(operator.shape[0], size), randn(size), randn(size).abs()
        operator = through(Matrix(W, 1), operator, None)
        term = DiagonalOperator(r, nonnegative=True)
        operator = through(Diagonal(d[None]), operator, term)
        J = W.numpy() * d.numpy()
        dense = J.T @ dense @ J + np.diag(r)
    return operator, dense


def _kronecker(make: Callable[[int], Tensor], m: int) -> Pair:
    """H ⊗ S, by the factor of S."""
    H, S = make(4), spd(m)
    F = torch.linalg.cholesky(S).T
    return KroneckerBlock(DenseOperator(H), F), np.kron(H.numpy(), S.numpy())


def _copies(make: Callable[[int], Tensor], values: list[float]) -> Pair:
    H, scales = make(4), torch.tensor(values, dtype=torch.float64)
    dense = np.kron(H.numpy(), np.diag(values))
    return KroneckerBlock(DenseOperator(H), scales.sqrt().diag()), dense


def _told_block(make: Callable[[int], Tensor]) -> Pair:
    """A block with a weight that knows a gradient, which b need not be."""
    H, F, delta = make(3), randn(4, 6), randn(4, 3)
    dense = np.kron(H.numpy(), 0.25 * (F.T @ F).numpy())
    return RowsBlock(DenseOperator(H), F, 0.25, delta), dense


def _block(make: Callable[[int], Tensor], rows: Callable[[], Tensor]) -> Pair:
    """Index (o, i) at o·in + i, written out."""
    H, F = make(3), rows()
    S = np.einsum("ni,nj->ij", F, F)
    size = 3 * F.shape[1]
    dense = np.einsum("op,ij->oipj", H, S).reshape(size, size)
    return KroneckerBlock(DenseOperator(H), F), dense


def _only_blocks(dense: np.ndarray, sizes: list[int]) -> np.ndarray:
    ends = np.cumsum([0, *sizes])
    kept = np.zeros_like(dense)
    for i, j in pairwise(ends):
        kept[i:j, i:j] = dense[i:j, i:j]
    return kept


def _block_diagonal(make: Callable[[int], Tensor]) -> Pair:
    operator, dense = _dense(make, 6)
    sizes = [1, 3, 2]
    return BlockDiagonal(operator, sizes), _only_blocks(dense, sizes)


def _split_block(
    make: Callable[[int], Tensor], sizes: list[int], told: bool = False
) -> Pair:
    """Sub-blocks of H ⊗ S: those of H, or some that cut through an output feature."""
    operator, dense = (_told_block if told else partial(_kronecker, m=3))(make)
    return split(operator, sizes), _only_blocks(dense, sizes)


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
    "diagonal": _diagonal,
    "zero": _zero,
    "one matrix for each sample": _samples,
    "the same for each sample": _repeated,
    "sum": _sum,
    "through a weight": _through_weight,
    "through a weight, bent": partial(_through_weight, bent=True),
    "through a slope": _through_slope,
    "through a slope, bent": partial(_through_slope, bent=True),
    "bent by a matrix": _bent_by_a_matrix,
    "chain": _chain,
    "chain, matrix formed": partial(_chain, formed=True),
    "chain, each layer twice as wide": _through_narrow_weights,
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
    "block diagonal": _block_diagonal,
    "split block": partial(_split_block, sizes=[6, 6]),
    "split block, into uneven parts": partial(_split_block, sizes=[3, 9]),
    "split block, through features": partial(_split_block, sizes=[4, 8]),
    "split block, told a gradient": partial(_split_block, sizes=[12, 6], told=True),
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


def _expand(system: System, y: Tensor, n: int) -> Tensor:
    """The vector, [n], with coordinates ``y``."""
    start = randn(n)
    target = start.clone()
    system.add_to(target, y, -0.5)
    return -2 * (target - start)


def _times(system: System, y: Tensor) -> Tensor:
    """A in coordinates: λ_j H y_j, and nothing in the null space."""
    product = torch.zeros_like(y)
    product[:, :-1] = system.scales[:, None] * (system.operator @ y[:, :-1].T).T
    return product


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


@pytest.mark.parametrize("rows", [1, 2])
def test_one_of_two_right_hand_sides_without_a_solution(rows: int) -> None:
    """The zero vector is in any range, but makes no other one solvable."""
    block = KroneckerBlock(DenseOperator(spd(3)), randn(rows, 4))
    b = torch.stack([torch.zeros(12).double(), randn(12)])
    close(block.solve(b[:1].T), torch.zeros(12, 1).double())
    for order in ([0, 1], [1, 0]):
        with pytest.raises(ArithmeticError, match="singular"):
            block.solve(b[order].T)


def test_a_system_is_an_isometry(pair: Pair) -> None:
    """A, b and every Krylov vector in orthonormal coordinates of a subspace."""
    operator, dense = pair
    b = randn(len(dense))
    kept = b.clone()
    system = operator.system(b)
    count, size = len(system.scales), system.operator.shape[0]
    assert count * size <= len(dense)
    assert system.rhs.shape == (count, size + 1)
    close(_expand(system, system.rhs, len(b)), b)

    krylov, full = [system.rhs], [b.numpy()]
    for _ in range(4):
        krylov.append(_times(system, krylov[-1]))
        full.append(dense @ full[-1])
        close(_expand(system, krylov[-1], len(b)), full[-1])
    gram, full_gram = torch.stack(krylov).flatten(1), np.stack(full)
    # Inner products up to 10⁴; 2e-12 was the largest.
    close(gram @ gram.T, full_gram @ full_gram.T, rtol=1e-10)
    close(system.rhs.norm(), b.norm())

    alpha = 0.02
    damped = (1 - alpha) * dense + alpha * np.eye(len(dense))
    y, margin = solve_system(system, 1 - alpha, alpha)
    assert margin > 1
    solution = _expand(system, y, len(b))
    close(solution, np.linalg.solve(damped, b), rtol=1e-9)
    assert torch.equal(b, kept)


def test_systems_of_special_right_hand_sides(pair: Pair) -> None:
    """In the range (no remainder), and zero."""
    operator, dense = pair
    b = torch.tensor(dense @ randn(len(dense)).numpy())
    system = operator.system(b)
    close(_expand(system, system.rhs, len(b)), b)
    close(system.rhs.norm(), b.norm())
    zero = operator.system(b * 0)
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
    with pytest.raises(TypeError, match="b must be a tensor, got ndarray"):
        operator.solve(dense[0], 0.1)
    with pytest.raises(ValueError, match=r"sparse.*\.to_dense\(\)"):
        operator @ randn(n).to_sparse()
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha=.* outside \[0, 1\]"):
            operator.solve(randn(n), alpha)


# --------------------------------------------------------------------------------------
# What is special.
# --------------------------------------------------------------------------------------


def _weight_chain() -> tuple[Tensor, SymmetricOperator]:
    weight = torch.nn.Parameter(randn(3, 5))
    inner = Congruence(DenseOperator(spd(3)), Matrix(weight, 1))
    return weight, Congruence(inner, Diagonal(randn(1, 5)))


@pytest.mark.parametrize(
    "use",
    [
        lambda A: A @ randn(5),
        lambda A: A.to_dense(),
        lambda A: A.diagonal(),
        lambda A: A.trace(),
        lambda A: A.eigvalsh(),
        lambda A: A.solve(randn(5), 0.1),
        lambda A: A.system(randn(5)),
    ],
    ids=["matmul", "to_dense", "diagonal", "trace", "eigvalsh", "solve", "system"],
)
def test_curvature_of_a_weight_that_has_changed_is_refused(use: Callable) -> None:
    weight, operator = _weight_chain()
    use(operator)  # May not form the matrix and so hide the change, except …
    weight, operator = _weight_chain()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \[3, 5\] has changed since"):
        use(operator)


USES: dict[str, Callable[[SymmetricOperator], object]] = {
    "matmul": lambda A: A @ randn(A.shape[0]),
    "to_dense": lambda A: A.to_dense(),
    "diagonal": lambda A: A.diagonal(),
    "trace": lambda A: A.trace(),
    "eigvalsh": lambda A: A.eigvalsh(),
    "solve": lambda A: A.solve(randn(A.shape[0]), 0.1),
    "system": lambda A: A.system(randn(A.shape[0])),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda A: Congruence(A, Matrix(randn(5, 4), 1)),
        lambda A: Repeated(A, 2),
        lambda A: OperatorSum([DenseOperator(spd(5)), A]),
        lambda A: KroneckerBlock(A, randn(1, 3)),
        lambda A: KroneckerBlock(A, randn(4, 3)),
        lambda A: RowsBlock(A, randn(2, 3), 0.5, randn(2, 5)),
        lambda A: BlockDiagonal(A, [2, 3]),
        lambda A: split(KroneckerBlock(A, randn(4, 3)), [6, 9]),
        lambda A: split(KroneckerBlock(A, randn(4, 3)), [7, 8]),
        lambda A: Congruence(DenseOperator(spd(2)), Matrix(randn(2, 5), 1), A),
    ],
    ids=[
        "congruence",
        "repeated",
        "sum",
        "rank one",
        "block",
        "rows",
        "block diagonal",
        "split",
        "split through features",
        "second-order term",
    ],
)
def test_what_stands_on_changed_curvature_is_refused(wrap: Callable, use: str) -> None:
    """Each operator asks those that it is made of."""
    weight, inner = _weight_chain()
    operator = wrap(inner)
    before = USES[use](operator)
    with torch.no_grad():
        weight.add_(1)
    if use == "to_dense" and isinstance(operator, Congruence):
        # What was formed stays, see test_a_matrix_that_was_formed_survives_the_weight.
        close(operator.to_dense(), before)
        return
    with pytest.raises(RuntimeError, match=r"shape \[3, 5\] has changed since"):
        USES[use](operator)


@pytest.mark.parametrize("use", USES)
def test_curvature_of_an_input_that_has_changed_is_refused(use: str) -> None:
    for kind in (KroneckerBlock, partial(RowsBlock, weight=1.0, delta=randn(2, 3))):
        x = randn(2, 4)
        operator = kind(DenseOperator(spd(3)), x)
        USES[use](operator)
        x.mul_(2)
        with pytest.raises(RuntimeError, match=r"input of shape \[2, 4\] has changed"):
            USES[use](operator)


def test_a_matrix_that_was_formed_survives_the_weight() -> None:
    weight, operator = _weight_chain()
    dense = operator.to_dense().clone()
    with torch.no_grad():
        weight.add_(1)
    close(operator.to_dense(), dense)


def test_a_matrix_that_was_formed_serves_products() -> None:
    """Also one that is too large to be formed for them; H is not asked again."""
    asked = []
    H = MatrixFree(
        lambda v: asked.append(1) or 2 * v, 3, torch.float64, torch.device("cpu")
    )
    operator, v = Congruence(H, Matrix(randn(3, 300), 1)), randn(300)
    before = operator @ v
    assert asked
    operator.to_dense()
    asked.clear()
    close(operator @ v, before)
    assert not asked


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
    chain = Congruence(outer, Matrix(randn(3, n), 1))
    step, bent = randn(1, n), DiagonalOperator(randn(n))
    block = KroneckerBlock(Congruence(chain, Diagonal(step), bent), randn(1, 30))
    v = randn(30 * n)
    product = block @ v
    # One entry by hand: H is JᵀMJ + diag(r).
    J = chain.jacobian.matrix * step
    row = J[:, 7] @ outer.matrix @ J
    row[7] += bent.values[7]
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
    # The same through the system, as a step of CGNewton takes it.
    system, step = operator.system(b), torch.zeros_like(b)
    system.add_to(step, solve_system(system, 1 - alpha, alpha)[0], 1.0)
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


@pytest.mark.parametrize(
    ("n", "condition", "dtype"),
    [(2, 1e5, torch.float32), (2, 1e6, torch.float64), (600, 1e3, torch.float32)],
)
def test_an_ill_conditioned_matrix_is_solved_without_damping(
    n: int, condition: float, dtype: torch.dtype
) -> None:
    """What is refused does not depend on the size."""
    reflection = randn(n)
    reflection /= reflection.norm()
    values = torch.linspace(1, 1 / condition, n).double()
    values[::3] *= -1
    Q = torch.eye(n).double() - 2 * torch.outer(reflection, reflection)
    A, x = (Q * values @ Q).to(dtype), randn(n).to(dtype)
    A = (A + A.T) / 2
    found = DenseOperator(A).solve(A @ x)
    # The residual of a backward stable solve, whatever the condition.
    assert (A @ (found - x)).norm() <= 100 * torch.finfo(dtype).eps * found.norm()


def test_what_float32_cannot_tell_from_singular_is_said_with_a_remedy() -> None:
    A = torch.tensor([[1.0, 1], [1, 1 + 4e-6]])  # A condition of 1e6.
    with pytest.raises(ArithmeticError, match=r"singular.*larger alpha.*\.double\(\)"):
        DenseOperator(A).solve(torch.tensor([1.0, 0]))
    expected = torch.linalg.solve(A.double(), torch.tensor([1.0, 0]).double())
    b = torch.tensor([1.0, 0])
    close(DenseOperator(A.double()).solve(b.double()), expected, rtol=1e-8)
    assert DenseOperator(A).solve(b, alpha=1e-4).isfinite().all()


@pytest.mark.parametrize("classes", [2, 3, 10, 50, 200])
def test_singular_softmax_curvature_of_float32_is_noticed(classes: int) -> None:
    for _ in range(20 if classes < 100 else 2):
        p = torch.randn(classes + 5, classes).softmax(1)
        H = torch.diag(p.mean(0)) - p.T @ p / len(p)
        with pytest.raises(ArithmeticError, match="singular"):
            DenseOperator(H).solve(torch.randn(classes))


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
        KroneckerBlock(DenseOperator(torch.diag(values[:5])), torch.eye(4).double()),
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
    expected = np.kron(H, F.T @ F)
    outer = DenseOperator(H.T.contiguous().T)
    close(KroneckerBlock(outer, F.T.contiguous().T).to_dense(), expected)


def test_wrong_pieces() -> None:
    with pytest.raises(ValueError, match=r"square, got shape \[2, 3\]"):
        DenseOperator(randn(2, 3))
    with pytest.raises(ValueError, match=r"must be \[N, n, n\], got \[2, 2\]"):
        SampleBlocks(spd(2))
    for make in (DenseOperator, lambda H: DiagonalOperator(H.diagonal())):
        with pytest.raises(ValueError, match=r"bfloat16 is too coarse.*\.float\(\)"):
            make(spd(2).bfloat16())
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


def test_no_answer_carries_the_graph_of_a_matrix_free_product() -> None:
    scale = randn(3).exp().requires_grad_()
    operator = MatrixFree(lambda v: scale * v, 3, scale.dtype, scale.device)
    for answer in (operator @ randn(3), operator.to_dense(), operator.diagonal()):
        assert not answer.requires_grad


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
