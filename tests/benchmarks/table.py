"""Every contender's step at one point, as a multiple of a step of SGD."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.measure import STILL, alternate, summary
from benchmarks.steps import LOSS, Methods, contenders


def measure(
    model: nn.Module,
    methods: Methods,
    images: Tensor,
    labels: Tensor,
    rounds: int,
    budget: float,
) -> dict[str, object]:
    """The loss at this point, and for each method what ``summary`` says."""
    steps = contenders(model, methods, lr=STILL)
    seconds = alternate(steps, images, labels, rounds, budget)
    with torch.no_grad():
        loss = float(LOSS(model(images), labels))
    return {"loss": loss, "methods": summary(seconds)}
