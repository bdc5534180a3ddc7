"""Sub-blocks and joint blocks: what is kept, what is dropped, and how steps follow."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from helpers import close, randn
from torch import Tensor, nn

import hbp
from hbp.blocks import JointPart
from hbp.operators import DirectSum

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
        assert isinstance(q.hessian, DirectSum)
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
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_steps(make: Any, reading: str, solver: Any, joint: bool, count: int) -> None:
    """θ moves by the solution of the dense system of the chosen block."""
    model = make()
    model.set_hbp_blocks(count, joint)
    send_back(model, reading)
    optimizer = hbp.CGNewton(
        model.parameters(), lr=0.5, alpha=0.1, cg_tol=1e-14, cg_atol=0, solver=solver
    )
    expected = []
    for layer in model:
        own = list(layer.parameters())
        for group in [own] if joint and own else [[p] for p in own]:
            expected += expected_steps(group, 0.5, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old, change in zip(model.parameters(), before, expected, strict=True):
        # Measured: 4e-15.
        close(p - old, change, rtol=1e-10, atol=1e-12)
        assert optimizer.last_step[p].converged


def expected_steps(group: list[Tensor], lr: float, alpha: float) -> list[Tensor]:
    if len(group) == 1:
        matrix, gradient = group[0].hessian.to_dense(), group[0].grad.flatten()
    else:
        matrix = group[0].hessian.joint.operator.to_dense()
        weight, bias = group[0].grad, group[1].grad
        gradient = torch.cat([weight.flatten(1), bias[:, None]], dim=1).flatten()
    damped = (1 - alpha) * matrix + alpha * torch.eye(len(matrix)).double()
    step = -lr * torch.linalg.solve(damped, gradient)
    if len(group) == 1:
        return [step.view(group[0].shape)]
    rows = step.view(len(group[0]), -1)
    return [rows[:, :-1].reshape(group[0].shape), rows[:, -1]]


@NETS
@READINGS
def test_a_joint_block_is_that_of_homogeneous_coordinates(
    make: Any, reading: str
) -> None:
    """Its diagonal blocks are the separate ones; its coupling, by a bias as weight."""
    model, separate = make(), make()
    model.set_hbp_blocks(joint_bias=True)
    send_back(model, reading)
    send_back(separate, reading)
    for p, q in zip(model.parameters(), separate.parameters(), strict=True):
        assert isinstance(p.hessian, JointPart)
        assert p.hessian.shape == q.hessian.shape
        close(p.hessian.to_dense(), q.hessian.to_dense())
        close(p.hessian.diagonal(), q.hessian.diagonal())
        close(p.hessian.trace(), q.hessian.trace())


@READINGS
def test_the_coupling_of_weight_and_bias(reading: str) -> None:
    """A linear layer without bias whose input has a 1 more is the same layer."""
    model = hbp.HBPLinear(4, 3).double()
    wide = hbp.HBPLinear(5, 3, bias=False).double()
    with torch.no_grad():
        wide.weight.copy_(torch.cat([model.weight, model.bias[:, None]], dim=1))
    model.set_hbp_blocks(joint_bias=True)
    inputs = randn(6, 4)
    for layer, x in [
        (model, inputs),
        (wide, torch.cat([inputs, torch.ones(6, 1).double()], dim=1)),
    ]:
        layer.set_hbp_approximation(
            average_parameter_jacobian=reading != "averaged products"
        )
        outputs = layer(x)
        loss = LOSS(outputs, torch.arange(6) % 3)
        hessian = hbp.per_sample_hessian(loss, outputs)
        loss.backward()
        layer.backward_hessian(hessian if reading == "exact" else hessian.sum(0))
    assert isinstance(model.weight.hessian, JointPart)
    joint = model.weight.hessian.joint.operator.to_dense()
    close(joint, wide.weight.hessian.to_dense())


def test_chosen_per_layer_and_at_run_time() -> None:
    model = dense_net()
    model[0].set_hbp_blocks(sub_blocks=2, joint_bias=True)
    assert "sub_blocks: 2, joint_bias: True" in repr(model[0])
    assert "sub_blocks" not in repr(model[2])
    send_back(model, "averaged")
    assert isinstance(model[0].weight.hessian, JointPart)
    assert not isinstance(model[2].weight.hessian, JointPart | DirectSum)
    model.set_hbp_blocks()
    send_back(model, "averaged")
    assert not isinstance(model[0].weight.hessian, JointPart)
    assert "sub_blocks" not in repr(model)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_bad_sub_blocks(value: Any) -> None:
    with pytest.raises(ValueError, match=r"sub_blocks=.*positive integer"):
        dense_net().set_hbp_blocks(value)


def test_bad_joint_bias() -> None:
    model, number = dense_net(), cast(Any, 1)
    with pytest.raises(TypeError, match="joint_bias=1 must be True or False"):
        model.set_hbp_blocks(2, number)
    assert model[0].sub_blocks == 1


def test_partners_in_different_groups_are_refused() -> None:
    model = dense_net()
    model.set_hbp_blocks(joint_bias=True)
    send_back(model, "averaged")
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias]}]
    optimizer = hbp.CGNewton(groups, lr=0.1, alpha=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"shape \[7, 6\], shares a joint block"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_frozen_bias_leaves_the_weight_its_own_block() -> None:
    model = dense_net()
    model[0].bias.requires_grad_(False)
    model.set_hbp_blocks(joint_bias=True)
    send_back(model, "averaged")
    assert not isinstance(model[0].weight.hessian, JointPart)
    assert model[0].bias.hessian is None


def test_the_damping_counts_a_joint_block_once() -> None:
    """The ratio's model is that of the dense joint blocks."""
    model = dense_net()
    model.set_hbp_blocks(joint_bias=True)
    send_back(model, "averaged")
    optimizer = hbp.CGNewton(
        model.parameters(), lr=0.5, alpha=0.1, cg_tol=1e-14, cg_atol=0
    )
    predicted = 0.0
    for layer in (model[0], model[2]):
        pair = [layer.weight, layer.bias]
        matrix = layer.weight.hessian.joint.operator.to_dense()
        gradient = torch.cat([pair[0].grad, pair[1].grad[:, None]], dim=1).flatten()
        rows = [
            step.reshape(len(pair[1]), -1) for step in expected_steps(pair, 0.5, 0.1)
        ]
        step = torch.cat(rows, dim=1).flatten()
        predicted -= float(gradient @ step + step @ matrix @ step / 2)
    optimizer.step()
    ratio = hbp.LevenbergMarquardt(optimizer).step(1.0, 0.9)
    assert ratio == pytest.approx(0.1 / predicted, rel=1e-10)
