"""Cost against width, depth, batch size and number of classes.

Each is varied alone. A straight line in a log-log plot is a power law; its slope is
the exponent. The predicted exponent is that of the counted arithmetic at the very
same sizes, so it needs no limit of large anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import log
from statistics import linear_regression, median

from benchmarks.measure import STILL, alternate
from benchmarks.points import network, random_batch
from benchmarks.steps import OWN, Newton, Step, contenders
from benchmarks.work import first_order, newton, total_flops
from hbp import set_seeds

METHODS = {name: OWN[name] for name in ("SGD, momentum", "hbp, cg", "hbp, direct")}


@dataclass(frozen=True)
class Shape:
    """A network of equally wide layers, and a batch.

    Args:
        width: Features of the input and of every hidden layer.
        depth: Hidden layers.
        batch: Samples.
        classes: Outputs.
    """

    width: int
    depth: int
    batch: int
    classes: int

    @property
    def sizes(self) -> list[int]:
        return [self.width] * (self.depth + 1) + [self.classes]


@dataclass(frozen=True)
class Range:
    """Where growth is measured: a shape, and the values that each number takes."""

    base: Shape
    values: dict[str, list[int]]


RANGES = {
    "cpu": Range(
        Shape(width=512, depth=3, batch=500, classes=10),
        {
            "width": [256, 512, 1024, 2048],
            "depth": [2, 4, 8, 16],
            "batch": [250, 500, 1000, 2000, 4000],
            "classes": [10, 30, 100, 300, 1000],
        },
    ),
    # Larger, so that it is not the launching of kernels that takes the time.
    "cuda": Range(
        Shape(width=4096, depth=3, batch=4000, classes=10),
        {
            "width": [1024, 2048, 4096, 8192],
            "depth": [2, 4, 8, 16],
            "batch": [1000, 2000, 4000, 8000, 16000],
            "classes": [10, 30, 100, 300, 1000],
        },
    ),
}
QUICK = Range(
    Shape(width=8, depth=2, batch=10, classes=3),
    {"width": [8, 16], "depth": [2, 3], "batch": [10, 20], "classes": [3, 5]},
)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the power law y ∝ xᵖ that fits best, in the logarithms."""
    slope, _ = linear_regression([log(v) for v in x], [log(v) for v in y])
    return slope


def measure(where: Range, device: str, rounds: int, budget: float) -> dict[str, object]:
    """For each number that is varied: seconds, exponents, and what was counted."""
    panels = {
        name: _panel(where.base, name, values, device, rounds, budget)
        for name, values in where.values.items()
    }
    return {"base": asdict(where.base), "panels": panels}


def _panel(
    base: Shape, name: str, values: list[int], device: str, rounds: int, budget: float
) -> dict[str, object]:
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    flops: dict[str, list[float]] = {method: [] for method in METHODS}
    for value in values:
        shape = replace(base, **{name: value})
        set_seeds(0)
        steps = contenders(network(shape.sizes).to(device), METHODS, lr=STILL)
        images, labels = random_batch(shape.batch, shape.width, shape.classes)
        times = alternate(steps, images.to(device), labels.to(device), rounds, budget)
        for method, step in steps.items():
            seconds[method].append(median(times[method]))
            flops[method].append(_flops(shape, step))
    return {
        "values": values,
        "methods": {
            method: {
                "seconds": seconds[method],
                "flops": flops[method],
                "fitted": exponent(values, seconds[method]),
                "predicted": exponent(values, flops[method]),
            }
            for method in METHODS
        },
    }


def _flops(shape: Shape, step: Step) -> float:
    if isinstance(step, Newton):
        stages = newton(shape.sizes, shape.batch, step.solver, step.products())
    else:
        stages = first_order(shape.sizes, shape.batch)
    return total_flops(stages)
