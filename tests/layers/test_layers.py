"""Every layer against automatic differentiation: all treatments, all readings.

``hbp.reference`` knows nothing of the layers' rules: it differentiates the layer's
``forward``, sample by sample, and writes every matrix down.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import ACTIVATIONS, SCHEMES, TREATMENTS, close, randn, seed
from torch import Tensor, nn

import hbp
from hbp import reference
from hbp.layers.functions import HBPCall, HBPRearrangement
from hbp.layers.shape import HBPReshape

LOSS = nn.CrossEntropyLoss()

Case = tuple[Callable[[], hbp.HBPModule], tuple[int, ...]]

IMAGE = (3, 2, 5, 4)

LAYERS: dict[str, Case] = {
    "linear": (lambda: hbp.HBPLinear(5, 4), (3, 5)),
    "conv1d": (lambda: hbp.HBPConv1d(2, 3, 3, stride=2, padding=1), (3, 2, 7)),
    "conv2d": (lambda: hbp.HBPConv2d(2, 3, (3, 2)), IMAGE),
    "conv2d no bias": (lambda: hbp.HBPConv2d(2, 3, 2, bias=False), IMAGE),
    "conv2d same": (lambda: hbp.HBPConv2d(2, 2, (2, 3), padding="same"), IMAGE),
    "conv2d strides": (
        lambda: hbp.HBPConv2d(2, 2, 2, stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        IMAGE,
    ),
    "conv2d groups": (lambda: hbp.HBPConv2d(2, 4, 2, groups=2), IMAGE),
    "conv2d depthwise": (lambda: hbp.HBPConv2d(2, 2, 3, groups=2, padding=1), IMAGE),
    "conv2d circular": (
        lambda: hbp.HBPConv2d(2, 2, 3, padding=1, padding_mode="circular"),
        IMAGE,
    ),
    "conv2d reflect": (
        lambda: hbp.HBPConv2d(2, 2, 3, padding="same", padding_mode="reflect"),
        IMAGE,
    ),
    "conv3d": (lambda: hbp.HBPConv3d(1, 2, 2, padding=1), (2, 1, 2, 3, 2)),
    "transposed 1d": (lambda: hbp.HBPConvTranspose1d(2, 3, 2, stride=2), (3, 2, 4)),
    "transposed 2d": (
        lambda: hbp.HBPConvTranspose2d(
            2, 2, 3, stride=2, padding=1, output_padding=1, groups=2
        ),
        (2, 2, 3, 2),
    ),
    "transposed 3d": (
        lambda: hbp.HBPConvTranspose3d(1, 2, 2, dilation=1, bias=False),
        (2, 1, 2, 2, 2),
    ),
    "max 1d": (lambda: hbp.HBPMaxPool1d(2), (3, 2, 7)),
    "max 2d": (lambda: hbp.HBPMaxPool2d(2), IMAGE),
    "max 2d overlapping": (lambda: hbp.HBPMaxPool2d(3, 1, 1), IMAGE),
    "max 2d dilated": (lambda: hbp.HBPMaxPool2d((2, 1), (1, 2), dilation=2), IMAGE),
    "max 2d ceil": (lambda: hbp.HBPMaxPool2d(3, 2, 1, ceil_mode=True), (2, 2, 6, 4)),
    "max 3d": (lambda: hbp.HBPMaxPool3d(2, padding=1), (2, 1, 2, 3, 3)),
    "average 1d": (lambda: hbp.HBPAvgPool1d(2), (3, 2, 6)),
    "average 2d": (lambda: hbp.HBPAvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "average 3d": (lambda: hbp.HBPAvgPool3d(2), (2, 1, 2, 4, 3)),
    "adaptive 1d": (lambda: hbp.HBPAdaptiveAvgPool1d(3), (2, 2, 5)),
    "adaptive 2d": (lambda: hbp.HBPAdaptiveAvgPool2d((2, 1)), IMAGE),
    "adaptive 3d": (lambda: hbp.HBPAdaptiveAvgPool3d(1), (2, 2, 2, 3, 2)),
    "pad 1d": (lambda: hbp.HBPZeroPad1d((1, 2)), (2, 2, 3)),
    "pad 2d": (lambda: hbp.HBPZeroPad2d((1, 0, -1, 2)), IMAGE),
    "pad 3d": (lambda: hbp.HBPZeroPad3d(1), (2, 1, 1, 2, 1)),
    "reflect 1d": (lambda: hbp.HBPReflectionPad1d((1, 2)), (2, 2, 4)),
    "reflect 2d": (lambda: hbp.HBPReflectionPad2d((1, 0, 2, 1)), IMAGE),
    "reflect 3d": (lambda: hbp.HBPReflectionPad3d(1), (2, 1, 2, 2, 2)),
    "replicate 1d": (lambda: hbp.HBPReplicationPad1d((1, 2)), (2, 2, 3)),
    "replicate 2d": (lambda: hbp.HBPReplicationPad2d((1, 0, 2, 1)), IMAGE),
    "replicate 3d": (lambda: hbp.HBPReplicationPad3d(1), (2, 1, 1, 2, 1)),
    "circular 1d": (lambda: hbp.HBPCircularPad1d((1, 2)), (2, 2, 3)),
    "circular 2d": (lambda: hbp.HBPCircularPad2d((1, 0, 2, 1)), IMAGE),
    "circular 3d": (lambda: hbp.HBPCircularPad3d(1), (2, 1, 1, 2, 1)),
    "constant 1d": (lambda: hbp.HBPConstantPad1d((1, 2), 0.7), (2, 2, 3)),
    "constant 2d": (lambda: hbp.HBPConstantPad2d((1, 0, -1, 2), -0.3), IMAGE),
    "constant 3d": (lambda: hbp.HBPConstantPad3d(1, 0.5), (2, 1, 1, 2, 1)),
    "shuffle": (lambda: hbp.HBPPixelShuffle(2), (2, 4, 2, 3)),
    "unshuffle": (lambda: hbp.HBPPixelUnshuffle(2), (2, 1, 4, 2)),
    "upsample": (lambda: hbp.HBPUpsample(scale_factor=2), (2, 2, 2, 2)),
    "upsample 1d": (lambda: hbp.HBPUpsample(5, mode="linear"), (2, 2, 3)),
    "upsample 2d": (
        lambda: hbp.HBPUpsample((3, 5), mode="bilinear", align_corners=True),
        (2, 1, 2, 3),
    ),
    "adaptive max 1d": (lambda: hbp.HBPAdaptiveMaxPool1d(3), (3, 2, 7)),
    "adaptive max 2d": (lambda: hbp.HBPAdaptiveMaxPool2d((2, 3)), IMAGE),
    "adaptive max 2d more": (lambda: hbp.HBPAdaptiveMaxPool2d((7, None)), (3, 1, 5, 2)),
    "adaptive max 3d": (lambda: hbp.HBPAdaptiveMaxPool3d((1, 2, 2)), (3, 1, 2, 3, 3)),
    "call": (lambda: HBPCall(torch.Tensor.mean, (2, 3), keepdim=True), IMAGE),
    "call transpose": (lambda: HBPCall(torch.Tensor.transpose, 1, -1), (3, 2, 4)),
    "call affine": (lambda: HBPCall(torch.rsub, 1, alpha=3), (3, 4)),
    "call rearranged": (lambda: HBPRearrangement(torch.Tensor.squeeze), (3, 1, 4)),
    "softmax": (lambda: hbp.HBPSoftmax(1), (3, 4)),
    "softmax positions": (lambda: hbp.HBPSoftmax(-1), (3, 2, 3)),
    "log softmax": (lambda: hbp.HBPLogSoftmax(1), (3, 4)),
    "prelu": (lambda: hbp.HBPPReLU(init=0.3), (3, 2, 3)),
    "prelu channels": (lambda: scaled(hbp.HBPPReLU(2)), (3, 2, 3)),
    "prelu features": (lambda: scaled(hbp.HBPPReLU(5)), (3, 5)),
    "group norm": (lambda: scaled(hbp.HBPGroupNorm(2, 4)), (3, 4, 2)),
    "group norm features": (lambda: scaled(hbp.HBPGroupNorm(2, 6)), (3, 6)),
    "group norm plain": (lambda: hbp.HBPGroupNorm(1, 2, affine=False), (3, 2, 2)),
    "rms norm": (lambda: scaled(hbp.HBPRMSNorm(5)), (3, 5)),
    "rms norm groups": (lambda: scaled(hbp.HBPRMSNorm((2, 2), eps=0.1)), (3, 2, 2, 2)),
    "flatten": (lambda: hbp.HBPFlatten(), IMAGE),
    "unflatten": (lambda: hbp.HBPUnflatten(1, (2, 3)), (3, 6)),
    "reshape": (lambda: HBPReshape(None, 5, -1), IMAGE),
    "identity": (lambda: hbp.HBPIdentity(), (3, 4)),
    "dropout eval": (lambda: hbp.HBPDropout().eval(), (3, 4)),
    "batch norm 1d": (lambda: norm(hbp.HBPBatchNorm1d(4)), (3, 4)),
    "batch norm 1d positions": (lambda: norm(hbp.HBPBatchNorm1d(2)), (3, 2, 4)),
    "batch norm 2d": (lambda: norm(hbp.HBPBatchNorm2d(2)), IMAGE),
    "batch norm 3d": (
        lambda: norm(hbp.HBPBatchNorm3d(2, affine=False)),
        (2, 2, 1, 2, 2),
    ),
    "layer norm": (lambda: scaled(hbp.HBPLayerNorm(5)), (3, 5)),
    "layer norm groups": (lambda: scaled(hbp.HBPLayerNorm((2, 2))), (3, 3, 2, 2)),
    "layer norm plain": (
        lambda: hbp.HBPLayerNorm(4, elementwise_affine=False),
        (3, 2, 4),
    ),
    "residual": (lambda: hbp.HBPResidual(hbp.HBPLinear(4, 4)), (3, 4)),
    "residual shortcut": (
        lambda: hbp.HBPResidual(
            hbp.HBPConv2d(2, 3, 3, padding=1), hbp.HBPConv2d(2, 3, 1)
        ),
        IMAGE,
    ),
    "linear positions": (lambda: hbp.HBPLinear(3, 2), (3, 4, 3)),
    "linear grid": (lambda: hbp.HBPLinear(2, 2, bias=False), (2, 2, 3, 2)),
    "position": (lambda: hbp.HBPPosition(4, 3), (3, 4, 3)),
    "position short": (lambda: hbp.HBPPosition(6, 3), (3, 2, 3)),
    "attention": (lambda: hbp.HBPAttention(2), (2, 3, 6)),
    "attention causal": (lambda: hbp.HBPAttention(causal=True), (3, 3, 6)),
    "function": (lambda: hbp.HBPFunction(nn.functional.normalize, dim=1), (3, 4)),
    "parallel": (
        lambda: hbp.HBPParallel(hbp.HBPLinear(4, 3), hbp.HBPLinear(4, 2)),
        (3, 4),
    ),
    "parallel one": (lambda: hbp.HBPParallel(hbp.HBPIdentity()), (3, 2, 2)),
    "gate": (lambda: hbp.HBPJoin(torch.mul, linear(3, 3), hbp.HBPIdentity()), (3, 3)),
    "residual empty": (lambda: hbp.HBPResidual(hbp.HBPSequential()), (3, 4)),
    **{kind.__name__: (kind, (3, 5)) for kind in ACTIVATIONS},
}


def linear(inputs: int, outputs: int) -> hbp.HBPModule:
    """A linear layer with a nest around it."""
    return hbp.HBPSequential(hbp.HBPLinear(inputs, outputs))


def norm(layer: nn.Module) -> hbp.HBPModule:
    """A batch norm with statistics and parameters of no special value, in eval mode."""
    assert isinstance(layer.running_mean, Tensor)
    assert isinstance(layer.running_var, Tensor)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return scaled(layer).eval()


def scaled(layer: nn.Module) -> hbp.HBPModule:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    assert isinstance(layer, hbp.HBPModule)
    return layer


def between(layer: hbp.HBPModule, shape: tuple[int, ...]) -> hbp.HBPSequential:
    """The layer below and above nonlinear ones, so that all its rules matter."""
    with torch.no_grad():
        after = layer.double()(torch.zeros(shape, dtype=torch.float64))
    features = after[0].numel()
    return hbp.HBPSequential(
        hbp.HBPTanh(),
        layer,
        hbp.HBPSigmoid(),
        hbp.HBPFlatten(),
        hbp.HBPLinear(features, 3),
    ).double()


def batch(model: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return 2 * randn(*shape), torch.arange(shape[0]) % 3


def run(model: hbp.HBPModule, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One forward and backward pass; outputs and the loss's Hessians, [N, C, C]."""
    inputs.requires_grad_()
    outputs = model(inputs)
    loss = LOSS(outputs, labels)
    model.zero_grad()
    hessians = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    return outputs, hessians


@pytest.fixture(params=LAYERS, ids=str)
def case(
    request: pytest.FixtureRequest,
) -> tuple[hbp.HBPModule, Tensor, Tensor]:
    make, shape = LAYERS[request.param]
    seed(0)
    model = between(make(), shape)
    return model, *batch(model, shape)


def test_averaged(case: tuple[hbp.HBPModule, Tensor, Tensor]) -> None:
    model, inputs, labels = case
    judge = reference.Recursion(model, LOSS, inputs.detach(), labels)
    _, hessians = run(model, inputs, labels)
    for scheme, treatment in itertools.product(SCHEMES, TREATMENTS[1:]):
        model.set_hbp_approximation(*scheme)
        H = model.backward_hessian(hessians.sum(0), True, treatment)
        expected = judge.batch(treatment, *scheme)
        assert H is not None
        what = f"{treatment=}, {scheme=}"
        close(H.to_dense(), expected.input, what=f"the input, {what}")
        for name, parameter in model.named_parameters():
            block = parameter.hessian.to_dense()
            close(block, expected.parameters[name], what=f"{name}, {what}")


def test_exact(case: tuple[hbp.HBPModule, Tensor, Tensor]) -> None:
    model, inputs, labels = case
    judge = reference.Recursion(model, LOSS, inputs.detach(), labels)
    _, hessians = run(model, inputs, labels)
    count, features = len(inputs), inputs[0].numel()
    for treatment in TREATMENTS[1:]:
        H = model.backward_hessian(hessians, True, treatment)
        expected = judge.exact(treatment)
        assert H is not None
        assert H.shape == (count * features, count * features)
        blocks = H.to_dense().reshape(count, features, count, features)
        own = blocks.diagonal(dim1=0, dim2=2).sum(2)
        close(own, expected.input, what=f"the input, {treatment=}")
        off = blocks.clone()
        off.diagonal(dim1=0, dim2=2).zero_()
        assert float(off.abs().max()) == 0
        for name, parameter in model.named_parameters():
            block, what = expected.parameters[name], f"{name}, {treatment=}"
            close(parameter.hessian.to_dense(), block, what=what)
            vectors = randn(parameter.numel(), 3)
            close(parameter.hessian @ vectors, block @ vectors, what=what)
