"""The benchmark of exact blocks: equal trials, other seeds, and steps that learn."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks import fitting
from benchmarks.fitting import METHODS, NEWTON, SEEDS, TASKS, TRIAL_SEED, Outcome
from helpers import ROOT

SINE = TASKS["sine, one batch"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str) -> None:
    options = METHODS[method][-1]
    before, after = (
        fitting.train(fitting.Task(SINE.problem, steps), method, options, seed=0)
        for steps in (1, 20)
    )
    assert after.loss < 0.9 * before.loss
    assert after.steps == 20


def test_time_is_a_limit_too() -> None:
    outcome = fitting.train(SINE, "Adam", {"lr": 1e-3}, seed=0, seconds=0.02)
    assert outcome.seconds >= 0.02
    assert outcome.steps > 1


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
        best = options == METHODS[method][2]
        return Outcome(1.0 + seed if best else 900.0, 7.0, 42)

    monkeypatch.setattr(fitting, "train", pretended)
    cells = fitting.row("a task", SINE).split(" | ")
    assert cells[1] == "2 (7.0 s; 0.01)"
    assert cells[4] == "2 (7.0 s; 1, 0.01)"
    assert cells[5] == "2 (42 steps) |"
    for method, settings in METHODS.items():
        trials = [seed for name, seed, _ in calls if name == method]
        assert trials.count(TRIAL_SEED) == len(settings) == len(NEWTON)
    assert [c for c in calls if c[2]] == [("Adam", seed, 7.0) for seed in SEEDS]


def test_what_the_page_says() -> None:
    path = ROOT / "docs" / "assets" / "measured" / "fitting.md"
    head, _, *rows = path.read_text("utf-8").splitlines()
    assert [name for name in METHODS if name not in head] == []
    table = {}
    for row in rows:
        name, *cells = row.strip("| ").split(" | ")
        table[name] = [float(cell.split()[0]) for cell in cells]
    assert [name.rpartition(",")[0] for name in table] == list(TASKS)
    digits, autoencoder, diabetes, sine = table.values()
    for losses in table.values():
        adam, averaged, products, exact, longer = losses
        assert exact < min(adam, averaged, products)
    for *_, exact, longer in (digits, autoencoder):
        assert longer < exact / 2
    assert sine[-1] == sine[-2] == 0.01
    assert diabetes[-2] < 1e-12 < 1e-6 < diabetes[-1]
