"""The arithmetic and the memory traffic of a step, counted from the shapes.

Arithmetic is counted in floating-point operations, two for each multiply-add, to
leading order. Traffic is what no implementation of the method avoids: each large
array read once or written once. A real step takes more of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

ITEM = 4  # bytes of a float32


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float


def first_order(sizes: Sequence[int], batch: int) -> dict[str, Work]:
    """The stages of a step of SGD.

    Args:
        sizes: Features, from the input to the classes.
        batch: Samples.
    """
    weights = [i * o for i, o in pairwise(sizes)]
    values = batch * sum(sizes)
    return {
        "forward": Work(2 * batch * sum(weights), ITEM * (sum(weights) + values)),
        # Nobody needs the gradient at the network's input.
        "backward": Work(
            2 * batch * (2 * sum(weights) - weights[0]),
            ITEM * (2 * sum(weights) + values),
        ),
        "update": Work(4 * sum(weights), ITEM * 3 * sum(weights)),
    }


def newton(
    sizes: Sequence[int],
    batch: int,
    solver: Literal["cg", "direct"],
    products: Sequence[int],
) -> dict[str, Work]:
    """The stages of a step of hbp with averaged Jacobians.

    Args:
        sizes: Features, from the input to the classes.
        batch: Samples.
        solver: How the systems are solved.
        products: CG's products for each layer, weight and bias together.
    """
    layers = list(pairwise(sizes))
    weights = [i * o for i, o in layers]
    hidden, classes = sum(sizes[1:-1]), sizes[-1]
    if solver == "cg":
        # A product at one layer passes through all weights above it, up and down.
        solve = sum(
            4 * count * sum(weights[layer + 1 :])
            for layer, count in enumerate(products)
        )
    else:
        # WᵀHW is formed wherever a layer below, or its own solve, needs the matrix.
        narrow = [2 * above <= o for o, above in pairwise(sizes[1:])]
        formed = sum(
            2 * i * o * (i + o)
            for layer, (i, o) in enumerate(layers[1:])
            if layer > 0 or not narrow[layer]
        )
        # Weight and bias each: Woodbury's identity through the layer above if that is
        # at most half as wide, else LU of the whole.
        solve = formed
        for o, above, is_narrow in zip(
            sizes[1:], [*sizes[2:], 0], [*narrow, False], strict=True
        ):
            lu = 2 * (above if is_narrow else o) ** 3 // 3
            woodbury = 2 * above**2 * (o + above) if is_narrow else 0
            solve += 2 * (lu + woodbury)
    first = first_order(sizes, batch)
    return {
        "forward": first["forward"],
        "output Hessian": Work(2 * batch * classes**2, ITEM * batch * classes),
        "backward": first["backward"],
        # Means of inputs, slopes, and second derivatives times gradients.
        "Hessian backpropagation": Work(
            batch * (sizes[0] + 10 * hidden), ITEM * batch * (sizes[0] + 2 * hidden)
        ),
        # The gradient is read for its part along the mean input.
        "solve": Work(solve + 2 * sum(weights), ITEM * (2 * sum(weights) - weights[0])),
        "update": first["update"],
    }


def total_flops(stages: dict[str, Work]) -> float:
    return sum(work.flops for work in stages.values())
