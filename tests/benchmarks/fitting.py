"""What exact blocks buy: four small problems, by steps and by seconds.

    PYTHONPATH=tests python -m benchmarks.fitting

Adam and CGNewton with averaged, half averaged and exact blocks (GGN) train the same
networks for some steps. Then Adam, with a rate that falls to 0, and L-BFGS train for as
long as exact blocks took. The first two problems have noisy batches, which L-BFGS is
not made for; in the others all data are one batch.

Each method gets four trials, judged by the loss that they end at with a seed of their
own; the best trains with three other seeds. It takes a quarter of an hour on one core,
most of it for the exact blocks of an autoencoder with 64 outputs.
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
RIVALS: dict[str, list[dict[str, float]]] = {
    "Adam": METHODS["Adam"],
    "L-BFGS": [{"history_size": size} for size in (5, 10, 30, 100)],
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
) -> tuple[Callable[[Any, Any], None], torch.optim.Optimizer]:
    """One training step, by the inputs and targets of a batch, and its optimizer."""
    if method in RIVALS:
        rival: Any = (
            torch.optim.Adam(model.parameters(), **options)
            if method == "Adam"
            else torch.optim.LBFGS(
                model.parameters(),
                **options,
                tolerance_grad=0,
                tolerance_change=0,
                line_search_fn="strong_wolfe",
            )
        )

        def first_order(x: Any, y: Any) -> None:
            def closure() -> Any:
                rival.zero_grad()
                loss = loss_func(model(x), y)
                loss.backward()
                return loss

            rival.step(closure)

        return first_order, rival
    twin = hbp.convert(model)
    twin.set_hbp_approximation(average_parameter_jacobian=method != "E[xxᵀ]")
    newton = hbp.CGNewton(twin.parameters(), **options, adaptive_lr=True, cg_tol=0.1)

    def second_order(x: Any, y: Any) -> None:
        outputs = twin(x)
        loss = loss_func(outputs, y)
        newton.zero_grad()
        hbp.backward(twin, outputs, loss, curvature="ggn", exact=method == "exact")
        newton.step()

    return second_order, newton


def train(
    task: Task,
    method: str,
    options: dict[str, Any],
    seed: int,
    seconds: float | None = None,
) -> Outcome:
    """Train for the task's steps, or for some seconds, in which Adam's rate falls."""
    x, y = task.problem.data()
    torch.manual_seed(seed)
    model, generator = task.problem.network(), torch.Generator().manual_seed(seed)
    step, optimizer = step_of(model, task.problem.loss, method, options)
    spent, done = 0.0, 0
    while spent < seconds if seconds else done < task.steps:
        batch: Any = slice(None)
        if seconds and method == "Adam":
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 - spent / seconds)
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


def best(
    task: Task,
    method: str,
    settings: list[dict[str, float]],
    seconds: float | None = None,
) -> tuple[Outcome, str]:
    """What comes of the best of the settings, and which one that is."""
    runs = [train(task, method, one, TRIAL_SEED, seconds).loss for one in settings]
    chosen = settings[runs.index(min(runs))]
    found = middle([train(task, method, chosen, seed, seconds) for seed in SEEDS])
    return found, ", ".join(f"{value:g}" for value in chosen.values())


def row(name: str, task: Task) -> str:
    """A row of the table."""
    cells = []
    for method, settings in METHODS.items():
        found, chosen = best(task, method, settings)
        cells.append(f"{found.loss:.2g} ({found.seconds:.1f} s; {chosen})")
    limit = found.seconds  # That of exact blocks, which are last.
    for method, settings in RIVALS.items():
        if task.batch and method == "L-BFGS":
            cells.append("–")
        else:
            found, chosen = best(task, method, settings, limit)
            cells.append(f"{found.loss:.2g} ({found.steps} steps; {chosen})")
    return f"| {name}, {task.steps} steps | " + " | ".join(cells) + " |"


def table(tasks: dict[str, Task]) -> str:
    """What comes of all tasks, row by row as they are done."""
    titles = [*METHODS, *(f"{rival}, as long as exact" for rival in RIVALS)]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    lines += [row(*item) for item in tqdm(tasks.items(), ascii=True)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(TASKS), end="")
