"""Time to accuracy: the runs train, survive interruption, and are told as they are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from benchmarks import accuracy
from benchmarks.accuracy import DEEP_HBP, SHALLOW_HBP, Run, best, grid, wanted
from test_docs import load
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("matplotlib")
with patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]):
    draw = load(ROOT / "tools" / "draw_accuracy.py")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accuracy, "RUNS", tmp_path)
    monkeypatch.setattr(accuracy, "RESULT", tmp_path / "out" / "results.json")
    return tmp_path


def tiny_data() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    images = torch.eye(4)[labels] + 0.1 * torch.randn(200, 4)
    return images, labels, images[:40], labels[:40]


def pretend(run: Run, scores: list[float]) -> None:
    """Write the result of a run that never was."""
    log = [
        {"train": score, "test": score, "seconds": 2.0 * epoch}
        for epoch, score in enumerate(scores, start=1)
    ]
    run.path.write_text(json.dumps(log))


@pytest.mark.parametrize("method", ["hbp", "adam", "sgd"])
def test_every_method_learns(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "SIZES", {"shallow": [4, 6, 4]})
    alpha = 0.02 if method == "hbp" else None
    rate = {"hbp": 0.3, "adam": 0.05, "sgd": 0.5}[method]
    run = Run("shallow", method, rate, 20, 0.9, 12, alpha)
    log = accuracy.train(run, tiny_data())
    assert len(log) == 12
    assert log[-1]["test"] > 0.9 > log[0]["train"]
    seconds = [entry["seconds"] for entry in log]
    assert sorted(seconds) == seconds
    assert accuracy.train(run, tiny_data())[-1]["test"] == log[-1]["test"]


def test_the_best_of_a_grid_runs_with_all_seeds(folder: Path) -> None:
    runs = grid(SHALLOW_HBP, "adam")
    assert best(runs) is None
    for number, run in enumerate(runs):
        pretend(run, [0.1, 0.5 if number == 3 else 0.4, 0.2])
    assert best(runs) == runs[3]
    seeds = {run.seed for run in wanted() if replace(run, seed=0) == runs[3]}
    assert seeds == {0, 1, 2}
    assert {run.seed for run in wanted() if replace(run, seed=0) == runs[2]} == {0}


def test_runs_have_files_of_their_own(folder: Path) -> None:
    runs = set(wanted())
    assert len({run.path for run in runs}) == len(runs)


def test_tables_and_figure(folder: Path) -> None:
    for own in (SHALLOW_HBP, DEEP_HBP):
        for seed in range(3):
            pretend(replace(own, seed=seed), [0.3, 0.46, 0.52 if seed else 0.49])
        for method in accuracy.RATES:
            for run in grid(own, method):
                pretend(run, [0.2, 0.3, 0.46])
    for run in set(wanted()):
        if run.result() is None:
            pretend(run, [0.2, 0.3, 0.3])
    accuracy.collect()
    report = json.loads(accuracy.RESULT.read_text("utf-8"))
    shallow, deep = draw.times(report).split("\n\n")
    # 45 % after 2 epochs or 4 s with all seeds, 50 % after 3 with two of them.
    assert "| HBP, 0.15 | 2 (3) | 4 (3) | 3 (2) | 6 (2) | 0.520 |" in shallow
    assert "0.0003 | 3 (1) | 6 (1) | never (0) | never (0) | 0.300 |" in shallow
    # Two rows of heading, HBP with two learning rates, Adam, SGD.
    assert deep.count("\n") == 2 + 2 + 1 + 1
    assert draw.finals(report)["deep", "hbp"][0]["lr"] == DEEP_HBP.lr
    assert draw.grid(report).count("\n") == 2 + 3 + 6 + 3 + 2 * 2
    draw.main(accuracy.RESULT.parent)
    assert (accuracy.RESULT.parent / "curves.svg").exists()


def test_committed_tables_are_those_of_the_committed_runs() -> None:
    report = json.loads((draw.FOLDER / "results.json").read_text("utf-8"))
    for name, page in {"times": draw.times, "grid": draw.grid}.items():
        assert (draw.FOLDER / f"{name}.md").read_text("utf-8") == page(report)
