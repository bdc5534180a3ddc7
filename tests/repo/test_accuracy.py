"""Time to accuracy: the runs train, survive interruption, and are told as they are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from benchmarks import accuracy, paper
from benchmarks.accuracy import DEEP_HBP, SHALLOW_HBP, Run, best, grid, wanted
from helpers import ROOT, load
from torch import Tensor

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
    for name, (pages, _) in draw.PARTS.items():
        report = json.loads((draw.FOLDER / f"{name}.json").read_text("utf-8"))
        for page, text in pages.items():
            assert (draw.FOLDER / f"{page}.md").read_text("utf-8") == text(report)


def test_what_the_page_says_of_the_paper_s_row() -> None:
    report = json.loads((draw.FOLDER / "paper.json").read_text("utf-8"))
    logs = {run["method"]: run["log"] for run in report["runs"]}
    assert logs["hbp"][2]["test"] < 0.11 < logs["adam"][0]["test"]
    for own, other in list(zip(logs["hbp"], logs["adam"], strict=False))[9:]:
        assert own["test"] > other["test"]
    for log in logs.values():
        assert log[-1]["train_loss"] < 0.25 * log[19]["train_loss"]
        assert log[-1]["test_loss"] > 1.5 * log[19]["test_loss"]
        assert log[-1]["seconds"] <= report["settings"]["budget"]


class TestPaper:
    """Training with the paper's settings goes on where it was interrupted."""

    @pytest.fixture(autouse=True)
    def tiny(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(accuracy, "SIZES", {"deep": [4, 6, 5, 4]})
        monkeypatch.setattr(paper, "RESULT", folder / "out" / "paper.json")
        runs = {k: replace(r, batch=20, epochs=5) for k, r in paper.RUNS.items()}
        monkeypatch.setattr(paper, "RUNS", runs)

    def ended(self, method: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Train to the end; final weights, and the log but for the seconds."""
        run = paper.RUNS[method]
        log = [dict(entry) for entry in paper.train(run, tiny_data(), 1e9)]
        for entry in log:
            del entry["seconds"]
        state = paper.load(run)
        assert state is not None
        return state["model"], log

    @pytest.mark.parametrize("method", ["hbp", "adam"])
    def test_interrupted_is_bitwise_as_uninterrupted(
        self, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights, log = self.ended(method)
        paper.checkpoint_path(paper.RUNS[method]).unlink()
        calls = 0

        def step(*arguments: Any) -> Tensor:
            nonlocal calls
            calls += 1
            # Ten batches are an epoch: the middle of the first, and of the fourth.
            if calls in (5, 5 + 35):
                raise KeyboardInterrupt
            return accuracy.step(*arguments)

        monkeypatch.setattr(paper, "step", step)
        for epochs in (0, 3):
            with pytest.raises(KeyboardInterrupt):
                self.ended(method)
            state = paper.load(paper.RUNS[method])
            assert (len(state["log"]) if state else 0) == epochs
        resumed, resumed_log = self.ended(method)
        assert resumed_log == log
        assert len(log) == 5
        for name, weight in weights.items():
            assert torch.equal(resumed[name], weight), name

    def test_interrupted_while_writing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run, save = paper.RUNS["hbp"], torch.save
        paper.save(run, {"log": [{"seconds": 1.0}]})

        def half(state: object, path: Path) -> None:
            save(state, path)
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            paper.save(run, {"log": []})
        assert paper.load(run) == {"log": [{"seconds": 1.0}]}

    def test_ends_before_the_epoch_that_would_not_fit(self) -> None:
        run = paper.RUNS["hbp"]
        two = [{"seconds": 4.0}, {"seconds": 8.0}]
        assert paper.room(run, [], 0.0)
        assert paper.room(run, two, 12.0)
        assert not paper.room(run, two, 11.9)
        assert not paper.room(run, 5 * two[:1], 1e9)

    def test_runs_are_collected_and_drawn(self) -> None:
        paper.collect()
        assert not paper.RESULT.exists()
        for methods in (["hbp"], ["hbp", "adam"]):
            self.ended(methods[-1])
            paper.collect()
            report = json.loads(paper.RESULT.read_text("utf-8"))
            assert [run["method"] for run in report["runs"]] == methods
        assert "| HBP, 5 | " in draw.paper(report)
        assert "| damping α | HBP 0.02 |" in draw.paper_settings(report)
        draw.main(paper.RESULT.parent)
        assert (paper.RESULT.parent / "paper.svg").exists()
