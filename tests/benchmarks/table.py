"""Every contender's step at one point, as a multiple of a step of SGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.measure import STILL, Timing, alternate, summary
from benchmarks.steps import LOSS, Methods, contenders


@dataclass(frozen=True)
class Table:
    """One point: the loss there, and the timing of each method."""

    loss: float
    methods: dict[str, Timing]


def measure(
    model: nn.Module,
    methods: Methods,
    images: Tensor,
    labels: Tensor,
    rounds: int,
    budget: float,
) -> Table:
    steps = contenders(model, methods, lr=STILL)
    seconds = alternate(steps, images, labels, rounds, budget)
    with torch.no_grad():
        loss = float(LOSS(model(images), labels))
    return Table(loss, summary(seconds))
