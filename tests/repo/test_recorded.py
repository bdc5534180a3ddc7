"""Recorded runs: they are shipped, small, complete, and made as they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import convolution_training as training
from benchmarks.convolution_training import CONTESTS, Contest, Run
from torch import Tensor

import hbp
from hbp.tutorial.datasets import recorded

FOLDER = Path(hbp.__file__).parent / "tutorial" / "recorded"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
TINY = {
    "exact": Contest((Run("exact", 0.3, 0.1, "zero"),), 1, 3),
    "averaged": Contest((Run("averaged", 0.3, 0.1, "abs"),), 1, 3),
    "sgd": Contest((Run("sgd", 0.1), Run("sgd", 0.01)), 1, 3),
    "adam": Contest((Run("adam", 1e-3),), 1, 3),
}


# --- What is shipped ------------------------------------------------------------------


def test_there_are_records() -> None:
    assert "convolution" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_small_and_says_where_it_comes_from(name: str) -> None:
    assert (FOLDER / f"{name}.json").stat().st_size < 20_000
    made = recorded(name)["provenance"]
    for key in ("date", "commit", "machine", "device", "threads", "versions"):
        assert made[key]


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"convolutions\.json"):
        recorded("convolutions")


def test_the_record_is_of_the_runs_in_the_script() -> None:
    record = recorded("convolution")
    keys = ("method", "lr", "alpha", "treatment")
    found = [Run(*(row[key] for key in keys)) for row in record["grid"]]
    assert found == [run for contest in CONTESTS.values() for run in contest.runs]
    for key, value in training.settings().items():
        assert record["settings"][key] == json.loads(json.dumps(value))


@pytest.mark.parametrize("method", CONTESTS)
def test_the_best_of_the_grid_went_on(method: str) -> None:
    """To the end, and from where its trial had ended."""
    record, contest = recorded("convolution"), CONTESTS[method]
    grid = [row for row in record["grid"] if row["method"] == method]
    best = min(grid, key=lambda row: row["train_loss"][-1])
    run = record["runs"][method]
    assert {len(row["train_loss"]) for row in grid} == {contest.trial}
    for key in ("lr", "alpha", "treatment"):
        assert run[key] == best[key]
    for key in ("seconds", "train_loss", "test_accuracy"):
        assert len(run[key]) == contest.epochs
        assert run[key][: contest.trial] == best[key]
    assert sorted(run["seconds"]) == run["seconds"]
    assert run["seconds"][0] > 0
    assert all(0 <= accuracy <= 1 for accuracy in run["test_accuracy"])
    # It begins close to the loss of guessing.
    assert abs(run["train_loss"][0] - math.log(10)) < 0.5


# --- How it is made -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(training, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(training, "RESULT", tmp_path / "out" / "convolution.json")
    return tmp_path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """A short contest of a small network, and data for it."""
    monkeypatch.setattr(training, "CHANNELS", (2, 3, 4))
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(training, "CONTESTS", TINY)
    torch.manual_seed(0)
    labels = torch.arange(12) % 10
    images = torch.rand(12, 3, 32, 32)
    return images, labels, images[:6], labels[:6]


def weights(run: Run) -> dict[str, Tensor]:
    state = run.load()
    assert state is not None
    return state["model"]


@pytest.mark.parametrize("method", TINY)
def test_interrupted_is_bitwise_as_uninterrupted(
    method: str, tiny: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TINY[method].runs[0]
    training.train(run, 3, tiny)
    expected, log = weights(run), run.log()
    run.path.unlink()
    step, calls = training.Training.step, 0

    def interrupted(self: Any, images: Tensor, labels: Tensor) -> float:
        nonlocal calls
        calls += 1
        # Three batches are an epoch: the middle of the second.
        if calls == 5:
            raise KeyboardInterrupt
        return step(self, images, labels)

    monkeypatch.setattr(training.Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(run, 3, tiny)
    assert len(run.log()) == 1
    training.train(run, 3, tiny)
    assert len(run.log()) == 3
    for own, other in zip(run.log(), log, strict=True):
        assert own["train_loss"] == other["train_loss"]
        assert own["test_accuracy"] == other["test_accuracy"]
    for name, weight in weights(run).items():
        assert torch.equal(weight, expected[name]), name


def test_interrupted_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    training.replace_file(path, lambda new: new.write_text("whole"))

    def half(new: Path) -> None:
        new.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.replace_file(path, half)
    assert path.read_text() == "whole"


def test_methods_start_from_the_same_weights(tiny: tuple[Tensor, ...]) -> None:
    models = [training.model_of(contest.runs[0]) for contest in TINY.values()]
    first = models[0].state_dict()
    for model in models[1:]:
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, first[name]), name


@pytest.mark.parametrize("method", TINY)
def test_a_method_lowers_the_loss(method: str, tiny: tuple[Tensor, ...]) -> None:
    run = TINY[method].runs[0]
    training.train(run, 12, tiny)
    losses = [entry["train_loss"] for entry in run.log()]
    assert losses[-1] < losses[0] - 0.02


def test_exact_and_averaged_are_what_they_say(tiny: tuple[Tensor, ...]) -> None:
    """One sample makes them the same; a batch tells them apart."""

    def moved(method: str, count: int) -> Tensor:
        run = Run(method, 0.3, 0.01, "zero")
        model = training.Training(run)
        before = model.model[0].weight.detach().clone()
        model.step(tiny[0][:count], tiny[1][:count])
        return model.model[0].weight.detach() - before

    torch.testing.assert_close(moved("exact", 1), moved("averaged", 1))
    assert not torch.allclose(moved("exact", 4), moved("averaged", 4), rtol=1e-5)


def test_the_best_goes_on_and_all_is_collected(
    tiny: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    training.collect()
    assert not training.RESULT.exists()
    for contest in TINY.values():
        for run in contest.runs:
            assert contest.best() is None
            training.train(run, contest.trial, tiny)
        best = contest.best()
        assert best is not None
        assert not contest.is_done()
        training.train(best, contest.epochs, tiny)
        assert contest.is_done()
    training.collect()
    report = json.loads(training.RESULT.read_text("utf-8"))
    assert list(report["runs"]) == list(TINY)
    assert len(report["grid"]) == 5
    for run in report["runs"].values():
        assert len(run["test_accuracy"]) == 3


def test_best_is_by_training_loss_in_the_trial() -> None:
    contest = Contest((Run("sgd", 0.1), Run("sgd", 0.2)), 2, 5)
    for run, losses in zip(contest.runs, [[3, 2, 9], [1, 2.1]], strict=True):
        log = [{"train_loss": x, "test_accuracy": x, "seconds": 1.0} for x in losses]
        run.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"log": log}, run.path)
    assert contest.best() == contest.runs[0]
