"""The points at which steps are timed: a network, a batch, and two sets of weights.

They are those of tutorial 02: its network at initialisation, and the same network
after ten epochs of the tutorial's own training, where CG needs more products.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.steps import Newton
from hbp import set_seeds
from hbp.tutorial.datasets import cifar10, data_root, quick

SIZES = [3072, 1024, 512, 256, 128, 10]
BATCH = 500
EPOCHS = 10
CACHE = Path(__file__).resolve().parents[2] / "build" / "benchmarks" / "mid.pt"


def network(
    sizes: Sequence[int] = SIZES, between: type[nn.Module] = nn.Sigmoid
) -> nn.Sequential:
    """Sigmoids between fully-connected layers, with torch's own initial weights."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), between()]
    return nn.Sequential(*layers[:-1])


def have_cifar10() -> bool:
    """Whether the official files are here; a benchmark does not download them."""
    return not quick() and (data_root() / "cifar-10-batches-py").is_dir()


def random_batch(count: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.rand(count, features), torch.randint(classes, (count,))


def batch() -> tuple[Tensor, Tensor, str]:
    """Images, labels, and what they are."""
    if have_cifar10():
        images, labels = cifar10(train=True).tensors
        return images[:BATCH], labels[:BATCH], "the first 500 training images"
    images, labels = random_batch(BATCH, SIZES[0], SIZES[-1])
    return images, labels, "uniform random numbers"


def initial() -> nn.Module:
    set_seeds(0)
    return network()


def mid_training(device: str) -> nn.Module:
    """The network after ``EPOCHS`` epochs; needs CIFAR-10, and minutes at first."""
    model = initial().to(device)
    if not CACHE.exists():
        data = cifar10(train=True)
        train(model, data, EPOCHS)
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), CACHE)
    model.load_state_dict(torch.load(CACHE, map_location=device, weights_only=True))
    return model


def train(model: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Train in place as tutorial 02 does: its settings, its order of the batches."""
    device = next(model.parameters()).device
    step = Newton(model, lr=0.15)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, generator=generator)
    for _ in range(epochs):
        for images, labels in loader:
            step(images.to(device), labels.to(device))
