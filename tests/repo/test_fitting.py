"""The benchmark of exact blocks: equal trials, other seeds, and steps that learn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from benchmarks import fitting
from benchmarks.fitting import (
    METHODS,
    NEWTON,
    RIVALS,
    SEEDS,
    TASKS,
    TRIAL_SEED,
    Outcome,
    Task,
)
from helpers import ROOT

SINE, DIGITS = TASKS["sine, one batch"], TASKS["digits, ReLU"]


@pytest.mark.parametrize(("task", "share"), [(SINE, 0.9), (DIGITS, 0.5)])
def test_methods_learn_and_differ(task: Task, share: float) -> None:
    ends = {}
    for method, settings in {**METHODS, **RIVALS}.items():
        # Newton steps of length 1 fit each batch, and may climb: not with batches.
        chosen = settings[0 if task.batch and "alpha" in settings[0] else -1]
        before, after = (
            fitting.train(Task(task.problem, n, task.batch), method, chosen, 0)
            for n in (1, 30)
        )
        assert after.steps == 30
        if method != "L-BFGS" or not task.batch:  # It is not made for batches.
            assert after.loss < share * before.loss
        ends[method] = after.loss
    assert len(set(ends.values())) == len(ends)
    if task is SINE:
        assert ends["exact"] < ends["E[xxᵀ]"] < ends["averaged"]


def test_in_a_given_time_the_rate_of_adam_falls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    plain = fitting.step_of

    def spied(*arguments: Any) -> Any:
        step, optimizer = plain(*arguments)

        def observed(x: Any, y: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            step(x, y)

        return observed, optimizer

    monkeypatch.setattr(fitting, "step_of", spied)
    clock = itertools.count()  # Each step takes a second.
    monkeypatch.setattr(fitting, "perf_counter", lambda: float(next(clock)))
    outcome = fitting.train(SINE, "Adam", {"lr": 1e-3}, seed=0, seconds=4.0)
    assert (outcome.steps, outcome.seconds) == (4, 4.0)
    assert rates == [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]


def test_the_best_trial_trains_with_other_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int, float | None]] = []

    def pretended(
        task: object,
        method: str,
        options: dict[str, Any],
        seed: int,
        seconds: float | None = None,
    ) -> Outcome:
        calls.append((method, seed, seconds))
        best = options == {**METHODS, **RIVALS}[method][2]
        return Outcome(1.0 + seed if best else 900.0, 7.0, 42)

    monkeypatch.setattr(fitting, "train", pretended)
    cells = fitting.row("a task", SINE).strip("| ").split(" | ")
    assert cells[1] == "2 (7.0 s; 0.01)"
    assert cells[4] == "2 (7.0 s; 1, 0.01)"
    assert cells[5:] == ["2 (42 steps; 0.01)", "2 (42 steps; 30)"]
    for method, seconds in [(m, None) for m in METHODS] + [(m, 7.0) for m in RIVALS]:
        seeds = [seed for name, seed, t in calls if (name, t) == (method, seconds)]
        assert seeds == [TRIAL_SEED] * len(NEWTON) + list(SEEDS)
    assert fitting.row("a task", DIGITS).endswith(" | – |")


def test_what_the_page_says() -> None:
    path = ROOT / "docs" / "assets" / "measured" / "fitting.md"
    head, _, *rows = path.read_text("utf-8").splitlines()
    titles = [*METHODS, *(f"{rival}, as long as exact" for rival in RIVALS)]
    assert head.strip("| ").split(" | ") == titles
    table = {}
    for row in rows:
        name, *cells = row.strip("| ").split(" | ")
        found = [float(cell.split()[0]) if cell != "–" else math.nan for cell in cells]
        table[name.rpartition(",")[0]] = found
        assert "; 0.03)" in cells[0]
        assert "; 1, 0.0001)" in cells[3]
    assert list(table) == list(TASKS)
    for adam, averaged, products, exact, *_ in table.values():
        assert exact < min(adam, averaged, products)
    digits, autoencoder, diabetes, sine = (found[3:] for found in table.values())
    for exact, adam, _ in (digits, autoencoder):
        assert adam < exact / 2
    assert sine == [0.01] * 3
    assert max(diabetes[:2]) < 2e-13 < 1e-10 < diabetes[2]
