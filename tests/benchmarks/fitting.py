"""Where exact blocks pay: four small problems, by steps and by seconds.

    PYTHONPATH=tests python -m benchmarks.fitting

Adam and CGNewton with averaged, half averaged and exact blocks (GGN) train the same
networks. Each gets four trials, judged by the loss that they end at with a seed of
their own; the best trains with three other seeds. Adam trains once more, with the rate
that was best for it, for as long as the exact blocks took. The first two problems have
noisy batches, in the others all data are one batch.

It takes ten minutes on one core, most of them for the exact blocks of an autoencoder
with 64 outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import hbp
from benchmarks.ordinary import (
    PROBLEMS,
    Problem,
    dense,
    diabetes,
    digits_twice,
    sine,
)

SEEDS, TRIAL_SEED = (0, 1, 2), 100


@dataclass(frozen=True)
class Task:
    """A problem, and how it is trained."""

    problem: Problem
    steps: int
    batch: int | None = None


TASKS = {
    "digits, ReLU": Task(PROBLEMS["digits, ReLU"], 200, 128),
    "digits, deep autoencoder": Task(
        Problem(
            digits_twice,
            lambda: dense(64, 32, 16, 8, 16, 32, 64, between=nn.Tanh),
            nn.MSELoss(),
        ),
        20,
        128,
    ),
    "diabetes, one batch": Task(
        Problem(diabetes, lambda: dense(10, 32, 32, 1, between=nn.Tanh), nn.MSELoss()),
        200,
    ),
    "sine, one batch": Task(
        Problem(sine, lambda: dense(1, 64, 1, between=nn.Tanh), nn.MSELoss()), 200
    ),
}
NEWTON = [{"lr": lr, "alpha": alpha} for lr in (0.1, 1.0) for alpha in (1e-2, 1e-4)]
METHODS: dict[str, list[dict[str, float]]] = {
    "Adam": [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)],
    "averaged": NEWTON,
    "E[xxᵀ]": NEWTON,
    "exact": NEWTON,
}


@dataclass(frozen=True)
class Outcome:
    """Of one training: the loss of all samples at its end, and its length."""

    loss: float
    seconds: float
    steps: int


def step_of(
    model: nn.Module,
    loss_func: Callable[..., Any],
    method: str,
    options: dict[str, Any],
) -> Callable[[Any, Any], None]:
    """One training step, by the inputs and targets of a batch."""
    if method == "Adam":
        adam = torch.optim.Adam(model.parameters(), **options)

        def first_order(x: Any, y: Any) -> None:
            adam.zero_grad()
            loss_func(model(x), y).backward()
            adam.step()

        return first_order
    twin = hbp.convert(model)
    twin.set_hbp_approximation(average_parameter_jacobian=method != "E[xxᵀ]")
    newton = hbp.CGNewton(twin.parameters(), **options, adaptive_lr=True, cg_tol=0.1)

    def second_order(x: Any, y: Any) -> None:
        outputs = twin(x)
        loss = loss_func(outputs, y)
        newton.zero_grad()
        hbp.backward(twin, outputs, loss, curvature="ggn", exact=method == "exact")
        newton.step()

    return second_order


def train(
    task: Task,
    method: str,
    options: dict[str, Any],
    seed: int,
    seconds: float | None = None,
) -> Outcome:
    """Train for the task's steps, or for so many seconds."""
    x, y = task.problem.data()
    torch.manual_seed(seed)
    model, generator = task.problem.network(), torch.Generator().manual_seed(seed)
    step = step_of(model, task.problem.loss, method, options)
    spent, done = 0.0, 0
    while spent < seconds if seconds else done < task.steps:
        batch: Any = slice(None)
        if task.batch:
            batch = torch.randint(len(x), (task.batch,), generator=generator)
        start = perf_counter()
        try:
            step(x[batch], y[batch])
        except ArithmeticError:
            return Outcome(math.inf, spent, done)
        spent += perf_counter() - start
        done += 1
    with torch.no_grad():
        return Outcome(float(task.problem.loss(model(x), y)), spent, done)


def middle(outcomes: list[Outcome]) -> Outcome:
    """Medians."""
    return Outcome(
        median(o.loss for o in outcomes),
        median(o.seconds for o in outcomes),
        round(median(o.steps for o in outcomes)),
    )


def row(name: str, task: Task) -> str:
    """A row of the table."""
    cells, found, best = [], {}, {}
    for method, settings in METHODS.items():
        runs = [train(task, method, chosen, TRIAL_SEED).loss for chosen in settings]
        best[method] = settings[runs.index(min(runs))]
        found[method] = middle([train(task, method, best[method], s) for s in SEEDS])
        words = ", ".join(f"{v:g}" for v in best[method].values())
        cells.append(
            f"{found[method].loss:.2g} ({found[method].seconds:.1f} s; {words})"
        )
    limit = found["exact"].seconds
    longer = middle([train(task, "Adam", best["Adam"], s, limit) for s in SEEDS])
    cells.append(f"{longer.loss:.2g} ({longer.steps} steps)")
    return f"| {name}, {task.steps} steps | " + " | ".join(cells) + " |"


def table(tasks: dict[str, Task]) -> str:
    """What comes of all tasks, row by row as they are done."""
    titles = [*METHODS, "Adam, as long as exact"]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    lines += [row(*item) for item in tqdm(tasks.items(), ascii=True)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(TASKS))
