"""What accuracy each precision gives: curvature, step and training, next to float64.

`PYTHONPATH=tests python -m benchmarks.precision` prints the table of the page "Mixed
precision, float64 and torch.compile". All runs start from the same weights and see the
same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import hbp

BATCH = 256
CLASSES = 10
STEPS = 40


@dataclass(frozen=True)
class Precision:
    """A way to run the forward pass.

    Attributes:
        name: What the table calls it.
        parameters: dtype of parameters, data and curvature.
        forward: dtype of autocast, if it is on. float16 comes with a GradScaler.
    """

    name: str
    parameters: torch.dtype
    forward: torch.dtype | None = None

    @property
    def region(self) -> AbstractContextManager[object]:
        if self.forward is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.forward)


EXACT = Precision("float64", torch.float64)
PRECISIONS = (
    Precision("float32", torch.float32),
    Precision("autocast, float16", torch.float32, torch.float16),
    Precision("autocast, bfloat16", torch.float32, torch.bfloat16),
)


@dataclass(frozen=True)
class Errors:
    """Relative to float64.

    Attributes:
        blocks: Of the first step's blocks, each applied to one random vector: the
            largest error of all parameters.
        step: Of the first step, all parameters together.
        loss: The largest difference of the losses, relative to the loss at the start.
        final: The last loss.
    """

    blocks: float
    step: float
    loss: float
    final: float


def sigmoid_network() -> hbp.HBPSequential:
    """Tutorial 02's kind of network: fully connected, sigmoids between."""
    sizes = (3072, 128, 64)
    layers: list[hbp.HBPModule] = [hbp.HBPFlatten()]
    for before, after in pairwise(sizes):
        layers += [hbp.HBPLinear(before, after), hbp.HBPSigmoid()]
    return hbp.HBPSequential(*layers, hbp.HBPLinear(sizes[-1], CLASSES))


def convolutional_network() -> hbp.HBPSequential:
    """Two convolutions and two linear layers."""
    return hbp.HBPSequential(
        hbp.HBPConv2d(3, 8, 5, stride=2),
        hbp.HBPTanh(),
        hbp.HBPMaxPool2d(2),
        hbp.HBPConv2d(8, 16, 3),
        hbp.HBPTanh(),
        hbp.HBPFlatten(),
        hbp.HBPLinear(400, 32),
        hbp.HBPTanh(),
        hbp.HBPLinear(32, CLASSES),
    )


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Ten noisy patterns of 3 × 32 × 32, values from 0 to 1, in float64."""
    patterns = torch.rand(CLASSES, 3, 32, 32).double()
    made = []
    for _ in range(steps):
        labels = torch.randint(CLASSES, (BATCH,))
        noise = torch.rand(BATCH, 3, 32, 32).double()
        made.append((0.3 * patterns[labels] + 0.7 * noise, labels))
    return made


@dataclass(frozen=True)
class Run:
    """What a training leaves: products and step of the first step, and all losses."""

    products: list[Tensor]
    step: Tensor
    losses: list[float]


def train(
    start: hbp.HBPModule, precision: Precision, data: list[tuple[Tensor, Tensor]]
) -> Run:
    model = copy.deepcopy(start).to(precision.parameters)
    optimizer = hbp.CGNewton(
        model.parameters(), lr=0.1, alpha=0.05, cg_tol=0.1, cg_atol=0.0, cg_maxiter=50
    )
    scaler = torch.amp.GradScaler("cpu", enabled=precision.forward is torch.float16)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    products: list[Tensor] = []
    losses: list[float] = []
    step = before
    for images, labels in data:
        with precision.region:
            outputs = model(images.to(precision.parameters))
            loss = F.cross_entropy(outputs, labels)
        optimizer.zero_grad()
        curvature = hbp.batch_summed_hessian(loss, outputs)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        model.backward_hessian(
            curvature, modify_2nd_order_terms="abs", loss_scale=scaler.get_scale()
        )
        if not losses:
            products = probe(model)
        scaler.step(optimizer)
        scaler.update()
        if not losses:
            parameters = torch.nn.utils.parameters_to_vector(model.parameters())
            step = parameters.detach() - before
        losses.append(float(loss.detach()))
    return Run(products, step, losses)


def probe(model: hbp.HBPModule) -> list[Tensor]:
    """Each block times a vector, the same in every precision."""
    generator = torch.Generator().manual_seed(0)
    products = []
    for parameter in model.parameters():
        vector = torch.randn(parameter.numel(), generator=generator, dtype=torch.double)
        operator = vars(parameter)["hessian"]  # which no type stub knows
        products.append((operator @ vector.to(parameter.dtype)).double())
    return products


def relative(value: Tensor, right: Tensor) -> float:
    return float((value.double() - right).norm() / right.norm())


def measure(
    make: Callable[[], hbp.HBPModule], steps: int = STEPS
) -> tuple[Run, dict[str, Errors]]:
    """The run in float64, and what each precision differs by."""
    hbp.set_seeds(0)
    start, data = make().double(), batches(steps)
    right = train(start, EXACT, data)
    errors = {}
    for precision in PRECISIONS:
        run = train(start, precision, data)
        pairs = zip(run.products, right.products, strict=True)
        losses = zip(run.losses, right.losses, strict=True)
        errors[precision.name] = Errors(
            max(relative(*pair) for pair in pairs),
            relative(run.step, right.step),
            max(abs(a - b) for a, b in losses) / right.losses[0],
            run.losses[-1],
        )
    return right, errors


def main() -> None:
    print("| network | forward pass | blocks | step | loss | last loss |")
    print("|---|---|---|---|---|---|")
    for name, make in (
        ("sigmoid", sigmoid_network),
        ("convolutional", convolutional_network),
    ):
        right, errors = measure(make)
        print(f"| {name} | {EXACT.name} | 0 | 0 | 0 | {right.losses[-1]:.4f} |")
        for precision, error in errors.items():
            cells = [error.blocks, error.step, error.loss]
            shown = " | ".join(f"{cell:.0e}" for cell in cells)
            print(f"| {name} | {precision} | {shown} | {error.final:.4f} |")


if __name__ == "__main__":
    main()
