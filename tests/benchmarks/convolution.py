"""The step on a convolutional network: 3c3d, on CIFAR-10, batches of 128.

Three convolutions and three fully-connected layers, sigmoids between; the outputs of
the first have 64 · 28 · 28 features, of which a dense averaged Hessian would take
10 GB.
"""

from __future__ import annotations

import copy
from dataclasses import asdict

from torch import Tensor, nn

from benchmarks import memory, table
from benchmarks.measure import STILL
from benchmarks.points import have_cifar10
from benchmarks.steps import ExactNewton, Make, Newton, sgd
from hbp import set_seeds
from hbp.tutorial.datasets import cifar10

BATCH, STEPS = 128, 100


METHODS: dict[str, tuple[Make, float]] = {
    "SGD, momentum": (sgd, 0.1),
    "hbp, cg": (Newton, 0.1),
    "hbp, cg, exact products": (ExactNewton, 0.1),
}


def network(channels: tuple[int, int, int] = (64, 96, 128)) -> nn.Sequential:
    """3c3d with ``channels``, for images of 3 × 32 × 32."""
    a, b, c = channels
    layers: list[nn.Module] = []
    for convolution in (
        nn.Conv2d(3, a, 5),
        nn.Conv2d(a, b, 3),
        nn.Conv2d(b, c, 3, padding=1),
    ):
        layers += [convolution, nn.Sigmoid(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    layers += [nn.Flatten(), nn.Linear(9 * c, 4 * c), nn.Sigmoid()]
    layers += [nn.Linear(4 * c, 2 * c), nn.Sigmoid(), nn.Linear(2 * c, 10)]
    return nn.Sequential(*layers)


def problem(quick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and images and labels of ``STEPS`` batches (quick: two small ones)."""
    set_seeds(0)
    model = network((2, 3, 4)) if quick else network()
    count = 8 if quick else BATCH * STEPS
    if have_cifar10() and not quick:
        images, labels = cifar10(train=True).tensors
        return model, images[:count], labels[:count]
    images = Tensor(count, 3, 32, 32).uniform_()
    return model, images, Tensor(count).uniform_(0, 10).long()


def measure(device: str, rounds: int, budget: float, quick: bool) -> dict[str, object]:
    """Steps and memory at the start, and after some training by hbp."""
    model, images, labels = problem(quick)
    model = model.to(device)
    size = 4 if quick else BATCH
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    first, first_labels = (part.to(device) for part in batches[0])
    start = copy.deepcopy(model)
    train = Newton(model, 0.1)
    for part, targets in batches:
        train(part.to(device), targets.to(device))
    steps = {}
    for name, point in {
        "initialisation": start,
        f"after {len(batches)} steps": model,
    }.items():
        measured = table.measure(point, METHODS, first, first_labels, rounds, budget)
        steps[name] = asdict(measured)
    # The profiler's trace of an exact step is large; one method less.
    averaged = {name: METHODS[name] for name in ("SGD, momentum", "hbp, cg")}
    return {
        "batch": size,
        "lr": STILL,
        "steps": steps,
        "memory": memory.measure(start, averaged, first, first_labels),
    }
