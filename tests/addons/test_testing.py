"""The checker is checked: it passes what is right, and names what is wrong."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from helpers import close, randn
from torch import Tensor, nn

import hbp
from hbp.core.jacobians import Batch, Diagonal, Jacobian, Matrix
from hbp.testing import check_layer


class Scale(nn.Module):
    """z = s ⊙ x + b."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(features))
        self.bias = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class LowRank(nn.Module):
    """z = x U V."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(4, 2))
        self.v = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.u @ self.v


class HBPScale(hbp.BilinearRule, Scale):
    """By automatic differentiation."""


class HBPLowRank(hbp.BilinearRule, LowRank):
    """Linear in x, in U and in V."""


class HBPConvolution(hbp.BilinearRule, nn.Conv2d):
    """What HBPConv2d does, found by automatic differentiation."""


class HBPSoftmax(hbp.GeneralRule, nn.Softmax):
    """A layer that mixes the features of a sample."""


class Squares(nn.Module):
    """z = s ⊙ x²."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.square()


class Scaling(Jacobian):
    """∂z/∂s of z = s ⊙ v; ``data`` is v, [N, features]."""

    of_parameter = True

    def __init__(self, v: Tensor) -> None:
        super().__init__(v.shape[1:], v.shape[1:], len(v), v)

    def jvp(self, rows: Tensor) -> Tensor:
        return (self.data * rows[:, None]).flatten(1)

    def vjp(self, rows: Tensor) -> Tensor:
        return (rows.view(len(rows), *self.data.shape) * self.data).sum(1)


class HBPSquares(hbp.HBPModule, Squares):
    """All three rules, of every sample, by hand."""

    schemes = ("average_input_jacobian", "average_parameter_jacobian")

    def forward(self, input: Tensor) -> Tensor:
        return self.record(input, super().forward(input), keep=input)

    def jacobian(self) -> Jacobian:
        return Diagonal(2 * self.scale * self.last_record.kept)

    def second_order(self, J: Jacobian) -> Tensor:
        return 2 * self.scale * self.last_record.delta_of(self)

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        yield self.scale, Scaling(self.last_record.kept.square())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (HBPSquares(4), (3, 4)),
        (HBPScale(4), (3, 4)),
        (HBPLowRank(), (3, 4)),
        (HBPConvolution(2, 2, 2), (2, 2, 3, 3)),
        (HBPSoftmax(dim=1), (3, 4)),
        (hbp.HBPSigmoid(), (2, 3)),
        (
            hbp.HBPResidual(hbp.HBPSequential(hbp.HBPLinear(3, 3), hbp.HBPTanh())),
            (3, 3),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_right_layers_pass(layer: hbp.HBPModule, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs, before = randn(*shape), copy.deepcopy(layer.state_dict())
    state = torch.get_rng_state()
    check_layer(layer, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in layer.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    with pytest.raises(RuntimeError, match="before a forward pass"):
        layer.check_record()
    assert all(p.grad is None and p.hessian is None for p in layer.parameters())


class WrongFirst(hbp.HBPTanh):
    def first_derivative(self, z: Tensor) -> Tensor:
        return 1 - z


class WrongSecond(hbp.HBPTanh):
    def second_derivative(self, z: Tensor, first: Tensor) -> Tensor:
        return 2 * z * first


class Flipped(hbp.HBPTanh):
    """J has the wrong sign, which cancels in JᵀHJ."""

    def jacobian(self) -> Jacobian:
        return Diagonal(-self.first_derivative(self.last_record.kept))

    def second_order(self, J: Jacobian) -> Tensor:
        z = self.last_record.kept
        return self.second_derivative(z, -J.data) * self.last_record.delta_of(self)


class WrongTranspose(Matrix):
    def jvp(self, rows: Tensor) -> Tensor:
        return 1.01 * super().jvp(rows)


class Untransposed(hbp.HBPLinear):
    def jacobian(self) -> Jacobian:
        return WrongTranspose(self.weight, self.last_record.output_shape[0])


class FirstAlone(Diagonal):
    def mean(self, batch: Batch) -> Jacobian:
        return Diagonal(self.data[:1])


class Unaveraged(hbp.HBPTanh):
    """The first sample stands for the batch."""

    def jacobian(self) -> Jacobian:
        return FirstAlone(self.first_derivative(self.last_record.kept))


class WrongOrder(HBPSquares):
    """The second-order term of another function."""

    def second_order(self, J: Jacobian) -> Tensor:
        return -super().second_order(J)


class WithoutBias(HBPScale):
    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        return list(super().parameter_jacobians())[:1]


class WrongBias(HBPScale):
    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        weight, (bias, J) = super().parameter_jacobians()
        return [weight, (bias, WrongSpread(J.in_shape, J.out_shape, J.samples))]


class WrongSpread(Jacobian):
    """The mean of the entries, everywhere."""

    of_parameter = True

    def jvp(self, rows: Tensor) -> Tensor:
        return rows.mean(1, keepdim=True).expand(-1, self.out_size)

    def vjp(self, rows: Tensor) -> Tensor:
        return rows.sum(1, keepdim=True).expand(-1, self.in_size) / self.in_size


class Forgetful(hbp.HBPTanh):
    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(input)


class Mixing(hbp.HBPTanh):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(0))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (WrongFirst(), r"input, exact, treatment 'zero': the matrix is off by"),
        (WrongSecond(), r"input, exact, treatment 'none': the matrix is off by"),
        (Flipped(), r"1 readings of Flipped .*\n  jacobian, exact: it is off by"),
        (Untransposed(4, 3), "jacobian, averaged: jvp is not vjp's transpose"),
        (Unaveraged(), "input, averaged with average_input_jacobian=True"),
        (WrongOrder(4), "input, exact, treatment 'none': the matrix is off by"),
        (WithoutBias(4), "bias, exact, treatment 'none': there is none"),
        (WrongBias(4), "bias, exact, treatment 'none': the matrix is off by"),
        (Forgetful(), "forward of Forgetful recorded nothing"),
        (Mixing(), "mixes samples"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_layers_are_found(layer: hbp.HBPModule, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=message):
        check_layer(layer, randn(3, 4))


def test_a_wrong_second_derivative_is_no_fault_of_the_ggn() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError) as caught:
        check_layer(WrongSecond(), randn(3, 4))
    assert "'zero'" not in str(caught.value)
    # The sign is wrong, which an absolute value does not tell.
    assert "'abs'" not in str(caught.value)
    assert "'clip'" in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "inputs", "error", "message"),
    [
        (nn.Tanh(), randn(3, 4), TypeError, "layer is a Tanh; pass an HBP layer"),
        (hbp.HBPTanh(), [1.0], TypeError, "inputs is a list"),
        (hbp.HBPTanh(), torch.randn(3, 4), ValueError, "float32.*inputs.double"),
        (hbp.HBPTanh(), randn(1, 4), ValueError, r"\[1, 4\].*N ≥ 2"),
        (hbp.HBPTanh(), torch.ones(3, 4).double(), ValueError, "the same sample 3"),
        (hbp.HBPDropout(), randn(3, 40), ValueError, "is random"),
        (hbp.HBPReLU(), -randn(3, 4).abs(), ValueError, "is zero at these inputs"),
    ],
    ids=str,
)
def test_arguments_that_show_nothing(
    layer: Any, inputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_layer(layer, inputs)


def bilinear_pass(average: bool = True) -> tuple[HBPScale, Tensor]:
    torch.manual_seed(0)
    layer, inputs = HBPScale(4).double(), randn(3, 4)
    layer.set_hbp_approximation(average_parameter_jacobian=average)
    layer(inputs).square().sum().backward()
    layer.backward_hessian(2 * torch.eye(4, dtype=torch.float64))
    return layer, inputs


@pytest.mark.parametrize("average", [True, False])
def test_bilinear_blocks_survive_copies(average: bool) -> None:
    layer, _ = bilinear_pass(average)
    hessian = cast(Any, layer.scale).hessian
    expected, vectors = hessian.to_dense().clone(), randn(4, 2)
    for twin in (copy.deepcopy(hessian), pickle.loads(pickle.dumps(hessian))):
        close(twin @ vectors, expected @ vectors)


def test_a_rule_of_the_wrong_shape_is_named() -> None:
    class Short(hbp.HBPTanh):
        def jacobian(self) -> Jacobian:
            return Diagonal(torch.ones(2, 3, dtype=torch.float64))

    layer, inputs = Short(), randn(2, 4).requires_grad_()
    layer(inputs).sum().backward()
    with pytest.raises(ValueError, match=r"jacobian.*Short.*\[6, 6\].*\[8, 8\]"):
        layer.backward_hessian(torch.eye(4, dtype=torch.float64), True, "zero")


def test_a_rule_that_is_no_jacobian_is_named() -> None:
    class Tensorial(hbp.HBPTanh):
        def jacobian(self) -> Any:
            return self.first_derivative(self.last_record.kept)

    layer, inputs = Tensorial(), randn(2, 4).requires_grad_()
    layer(inputs).sum().backward()
    with pytest.raises(
        ValueError, match=r"jacobian of Tensorial is a Tensor.*\[8, 8\]"
    ):
        layer.backward_hessian(torch.eye(4, dtype=torch.float64), True, "zero")


def test_the_old_maps_say_where_they_are() -> None:
    with pytest.raises(
        ImportError, match=r"became hbp\.core\.jacobians.*jacobian\(self\)"
    ):
        importlib.import_module("hbp.maps")
