"""Sub-blocks: what is kept, what is dropped, and how steps follow."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close, randn, spd
from torch import Tensor, nn

import hbp
from hbp.blocks import BlockDiagonal
from hbp.operators import DenseOperator, KroneckerBlock, SymmetricOperator

LOSS = nn.CrossEntropyLoss()


def dense_net() -> hbp.HBPSequential:
    torch.manual_seed(1)
    return hbp.HBPSequential(
        hbp.HBPLinear(6, 7), hbp.HBPSigmoid(), hbp.HBPLinear(7, 3)
    ).double()


def image_net() -> hbp.HBPSequential:
    torch.manual_seed(1)
    return hbp.HBPSequential(
        hbp.HBPUnflatten(1, (1, 2, 3)),
        hbp.HBPConv2d(1, 5, 2),
        hbp.HBPTanh(),
        hbp.HBPFlatten(),
        hbp.HBPLinear(10, 3),
    ).double()


NETS = pytest.mark.parametrize("make", [dense_net, image_net])
READINGS = pytest.mark.parametrize(
    "reading", ["averaged", "averaged products", "exact"]
)


def send_back(model: hbp.HBPModule, reading: str, samples: int = 4) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    if reading == "averaged products":
        model.set_hbp_approximation(average_parameter_jacobian=False)
    outputs = model(inputs)
    loss = LOSS(outputs, torch.arange(samples) % 3)
    model.zero_grad()
    hessian = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(
        hessian if reading == "exact" else hessian.sum(0), modify_2nd_order_terms="abs"
    )


def block_diagonal_part(matrix: Tensor, sizes: list[int]) -> Tensor:
    blocks = [
        matrix[end - size : end, end - size : end]
        for size, end in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True)
    ]
    return torch.block_diag(*blocks)


def row_sizes(parameter: Tensor, count: int) -> list[int]:
    """Entries of each of ``count`` groups of output features, by counting."""
    rows = len(parameter)
    most = -(-rows // count)
    groups = [min(most, rows - start) for start in range(0, rows, most)]
    return [group * parameter[0].numel() for group in groups]


def is_split(operator: SymmetricOperator | None) -> bool:
    """Whether ``hbp.blocks`` made it, of the block or of the factor H in it."""
    if isinstance(operator, KroneckerBlock):
        operator = operator.outer
    return isinstance(operator, BlockDiagonal)


@NETS
@READINGS
@pytest.mark.parametrize("count", [2, 3, 5, 100])
def test_sub_blocks_drop_what_couples_them(make: Any, reading: str, count: int) -> None:
    whole, split = make(), make()
    split.set_hbp_blocks(sub_blocks=count)
    send_back(whole, reading)
    send_back(split, reading)
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        expected = block_diagonal_part(
            p.hessian.to_dense(), row_sizes(p, min(count, len(p)))
        )
        assert is_split(q.hessian)
        close(q.hessian.to_dense(), expected)
        close(q.hessian.diagonal(), expected.diagonal())
        close(q.hessian.eigvalsh(), torch.linalg.eigvalsh(expected))
        vectors = randn(len(expected), 2)
        close(q.hessian @ vectors, expected @ vectors)
        damped = 0.9 * expected + 0.1 * torch.eye(len(expected)).double()
        close(q.hessian.solve(vectors, 0.1), torch.linalg.solve(damped, vectors))


@NETS
@READINGS
@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("count", [1, 3])
def test_steps(make: Any, reading: str, solver: Any, count: int) -> None:
    """θ moves by the solution of the dense system of the chosen block."""
    model = make()
    model.set_hbp_blocks(count)
    send_back(model, reading)
    optimizer = hbp.CGNewton(
        model.parameters(), lr=0.5, alpha=0.1, cg_tol=1e-14, cg_atol=0, solver=solver
    )
    expected = [expected_step(p, 0.5, 0.1) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old, change in zip(model.parameters(), before, expected, strict=True):
        # Measured: 4e-15.
        close(p - old, change, rtol=1e-10, atol=1e-12)
        assert optimizer.last_step[p].converged


def expected_step(p: Tensor, lr: float, alpha: float) -> Tensor:
    matrix = p.hessian.to_dense()
    damped = (1 - alpha) * matrix + alpha * torch.eye(len(matrix)).double()
    return -lr * torch.linalg.solve(damped, p.grad.flatten()).view(p.shape)


def test_chosen_per_layer_and_at_run_time() -> None:
    model = dense_net()
    model[0].set_hbp_blocks(sub_blocks=2)
    assert "sub_blocks: 2" in repr(model[0])
    assert "sub_blocks" not in repr(model[2])
    send_back(model, "averaged")
    assert [is_split(p.hessian) for p in model.parameters()] == [True, True] + [
        False
    ] * 2
    model.set_hbp_blocks()
    send_back(model, "averaged")
    assert not any(is_split(p.hessian) for p in model.parameters())
    assert "sub_blocks" not in repr(model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_keep_the_choice(copied: Callable) -> None:
    model = dense_net()
    model.set_hbp_blocks(sub_blocks=2)
    twin = copied(model)
    assert repr(twin) == repr(model)
    for network in (model, twin):
        send_back(network, "averaged")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert is_split(q.hessian)
        close(q.hessian.to_dense(), p.hessian.to_dense())


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_bad_sub_blocks(value: Any) -> None:
    with pytest.raises(ValueError, match=r"sub_blocks=.*positive integer"):
        dense_net().set_hbp_blocks(value)


def test_each_block_is_an_operator_of_its_own() -> None:
    """Of a convolution's weight: one for each output channel, without the whole."""
    model, whole = image_net(), image_net()
    model.set_hbp_blocks(sub_blocks=5)
    send_back(model, "exact")
    send_back(whole, "exact")
    matrix = whole[1].weight.hessian.to_dense()
    blocks = model[1].weight.hessian.blocks
    assert len(blocks) == 5
    for i, block in enumerate(blocks):
        own = slice(4 * i, 4 * i + 4)
        close(block.to_dense(), matrix[own, own])
        close(block.diagonal(), matrix.diagonal()[own])


def test_a_block_of_a_changed_weight_is_refused() -> None:
    model = image_net()
    model.set_hbp_blocks(sub_blocks=5)
    send_back(model, "exact")
    blocks = model[1].weight.hessian.blocks
    with torch.no_grad():
        model[4].weight += 1
    for block in blocks:
        with pytest.raises(RuntimeError, match="has changed since"):
            block.to_dense()


@pytest.mark.parametrize("singular", [0, 1])
def test_one_singular_block_makes_all_of_them_singular(singular: int) -> None:
    parts = [spd(2), spd(2)]
    # Its factorisation succeeds; only the margin tells.
    parts[singular] = torch.diag(torch.tensor([1.0, 1e-20])).double()
    operator = BlockDiagonal(DenseOperator(torch.block_diag(*parts)), [2, 2])
    with pytest.raises(ArithmeticError, match="singular"):
        operator.solve(randn(4))
