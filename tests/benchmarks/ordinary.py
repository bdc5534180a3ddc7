"""Does a step hold? Small ordinary problems, with the same settings for all of them.

Run it as ``PYTHONPATH=tests python -m benchmarks.ordinary``; it takes some minutes.
Every problem is trained for 200 steps on batches of 128 with three seeds: by Adam with
its usual rate, by ``CGNewton(model.parameters())`` with nothing chosen, and by CGNewton
with the rate and damping that tutorial 01 has, which suit that tutorial's network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn

import hbp

STEPS, BATCH, SEEDS = 200, 128, (0, 1, 2)
Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Problem:
    """Data, a network for them, and a loss."""

    data: Callable[[], tuple[Tensor, Tensor]]
    network: Callable[[], nn.Module]
    loss: Loss


class Shortcut(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def dense(*sizes: int, between: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), between()]
    return nn.Sequential(*layers[:-1])


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def residual() -> nn.Module:
    blocks = [
        Shortcut(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4)
    ]
    return nn.Sequential(nn.Linear(64, 32), *blocks, nn.Linear(32, 10))


def digits() -> tuple[Tensor, Tensor]:
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images).float() / 16, torch.tensor(labels)


def digits_twice() -> tuple[Tensor, Tensor]:
    images, _ = digits()
    return images, images


def diabetes() -> tuple[Tensor, Tensor]:
    x, y = map(torch.tensor, datasets.load_diabetes(return_X_y=True))
    return (x / x.std(0)).float(), ((y - y.mean()) / y.std()).float()[:, None]


def sine() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(512, 1, generator=generator) - 3
    return x, (2 * x).sin() + 0.1 * torch.randn(512, 1, generator=generator)


PROBLEMS = {
    "digits, ReLU": Problem(digits, lambda: dense(64, 32, 10), nn.CrossEntropyLoss()),
    "digits, LeNet": Problem(digits, lenet, nn.CrossEntropyLoss()),
    "digits, residual GELU": Problem(digits, residual, nn.CrossEntropyLoss()),
    "digits, autoencoder": Problem(
        digits_twice, lambda: dense(64, 32, 8, 32, 64, between=nn.Tanh), nn.MSELoss()
    ),
    "diabetes, ReLU": Problem(diabetes, lambda: dense(10, 32, 32, 1), nn.MSELoss()),
    "sine, tanh": Problem(sine, lambda: dense(1, 64, 1, between=nn.Tanh), nn.MSELoss()),
}


def adam(model: nn.Module, loss_func: Loss) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_func(model(x), y).backward()
        optimizer.step()

    return step


def newton(model: nn.Module, loss_func: Loss, **options: Any) -> Step:
    """CGNewton; the converted model shares its parameters."""
    twin = hbp.convert(model)
    optimizer = hbp.CGNewton(twin.parameters(), **options)

    def step(x: Tensor, y: Tensor) -> None:
        outputs = twin(x)
        loss = loss_func(outputs, y)
        optimizer.zero_grad()
        hbp.backward(twin, outputs, loss)
        optimizer.step()

    return step


def fixed(model: nn.Module, loss_func: Loss) -> Step:
    return newton(model, loss_func, lr=0.15, alpha=0.02)


METHODS: dict[str, Callable[[nn.Module, Loss], Step]] = {
    "Adam, 1e-3": adam,
    "CGNewton": newton,
    "CGNewton, lr=0.15, alpha=0.02": fixed,
}


@dataclass(frozen=True)
class Outcome:
    """Losses of all samples: at first, at last, and the largest seen."""

    first: float
    last: float
    worst: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the loss was ever above twice its first value, or no number."""
        return not self.worst <= 2 * self.first


def train(problem: Problem, method: str, seed: int, steps: int = STEPS) -> Outcome:
    """The loss is looked at every tenth step."""
    x, y = problem.data()
    torch.manual_seed(seed)
    model, generator = problem.network(), torch.Generator().manual_seed(seed)
    step = METHODS[method](model, problem.loss)

    @torch.no_grad()
    def loss() -> float:
        return float(problem.loss(model(x), y))

    first = worst = last = loss()
    seconds = 0.0
    for number in range(1, steps + 1):
        batch = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
        start = perf_counter()
        try:
            step(x[batch], y[batch])
        except ArithmeticError:
            return Outcome(first, math.inf, math.inf, seconds)
        seconds += perf_counter() - start
        if number % 10 == 0 or number == steps:
            last = loss()
            worst = max(worst, last) if math.isfinite(last) else math.inf
    return Outcome(first, last, worst, seconds)


def main() -> None:
    """Print a row for each problem, and what became of all runs."""
    torch.set_num_threads(1)
    runs: dict[str, dict[str, list[Outcome]]] = {method: {} for method in METHODS}
    print("| problem | first loss | " + " | ".join(METHODS) + " |")
    print("|---|---:|" + "---:|" * len(METHODS))
    for name, problem in PROBLEMS.items():
        cells = []
        for method, found in runs.items():
            found[name] = [train(problem, method, seed) for seed in SEEDS]
            bad = sum(run.diverged for run in found[name])
            last = median(run.last for run in found[name])
            cells.append(f"{last:.3g}" + (f" ({bad} diverged)" if bad else ""))
        first = median(run.first for run in runs["CGNewton"][name])
        print(f"| {name} | {first:.3g} | " + " | ".join(cells) + " |", flush=True)
    rival = runs["Adam, 1e-3"]
    for method, found in runs.items():
        pairs = [
            pair for n in PROBLEMS for pair in zip(found[n], rival[n], strict=True)
        ]
        diverged = sum(run.diverged for run, _ in pairs)
        better = sum(run.last <= other.last for run, other in pairs)
        ratio = median(run.seconds / other.seconds for run, other in pairs)
        print(
            f"\n{method}: {diverged} of {len(pairs)} runs diverged, {better} ended at "
            f"or below Adam's loss, {ratio:.1f} times Adam's seconds."
        )


if __name__ == "__main__":
    main()
