"""Time to accuracy: the runs train, survive interruption, and are told as they are."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import pytest
import torch
from benchmarks import accuracy, language, paper
from benchmarks.accuracy import METHODS, Race, Run, Setting, chosen, trials, wanted
from helpers import ROOT, load
from torch import Tensor

from hbp import CGNewton

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
    log = [{"train": score, "test": score, "averaged": score} for score in scores]
    run.path.write_text(json.dumps(log))


RATES = {"centred": 2.0, "muon": 0.05, "adamw": 0.05, "sgd": 0.5}
# AdamW at its usual rate, beside Muon, takes longer.
PASSES = {"hbp": 8, "hbp-inputs": 8, "muon": 100}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "RACES", {"shallow": Race((4, 6, 6, 4))})
    # Without hidden layers between, one epoch is too short for an average of weights.
    monkeypatch.setattr(accuracy, "EVERY", 1)
    newton = [Setting(0.3, 0.02), Setting(1.0, 0.1, free=True)]
    passes = PASSES.get(method, 20)
    for setting in [Setting(RATES[method])] if method in RATES else newton:
        run = Run("shallow", method, setting, passes, falls=True, batch=20)
        log = accuracy.train(run, tiny_data())
        assert len(log) == passes
        assert log[-1]["test"] > 0.9 > log[0]["train"]
        assert log[-1]["averaged"] > 0.9
        assert accuracy.train(run, tiny_data())[-1]["test"] == log[-1]["test"]


def test_a_falling_rate_ends_at_a_tenth(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "RACES", {"shallow": Race((4, 6, 6, 4))})
    rates: list[list[float]] = []

    def step(model: Any, optimizer: Any, images: Tensor, labels: Tensor) -> Tensor:
        rates.append([group["lr"] for group in optimizer.param_groups])
        if optimizer.hidden:
            rates[-1].append(optimizer.own["lr"])
        return model(images)

    monkeypatch.setattr(accuracy, "step", step)
    run = Run("shallow", "muon", Setting(0.05), 2, falls=True, batch=20)
    accuracy.train(run, tiny_data())
    assert rates[0] == [1e-3, 0.05]
    assert rates[-1] == pytest.approx([1e-3 * 0.145, 0.05 * 0.145])
    assert len(rates) == 20


def test_who_diverges_stays_where_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "RACES", {"shallow": Race((4, 6, 6, 4))})
    calls = 0

    def step(model: Any, optimizer: Any, images: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 14:  # In the second epoch of ten batches.
            raise OverflowError
        return real(model, optimizer, images, labels)

    real = accuracy.step
    monkeypatch.setattr(accuracy, "step", step)
    run = Run("shallow", "sgd", Setting(0.5), 4, batch=20)
    log = accuracy.train(run, tiny_data())
    assert calls == 14
    assert log[1]["test"] == log[2]["test"] == log[3]["test"]
    assert [entry["train"] for entry in log[2:]] == [0, 0]


def test_muon_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    own, other = model[1].weight, torch.nn.Parameter(model[1].weight.detach().clone())
    ours = accuracy.MuonBesideAdamW(model, 0.1)
    theirs = torch.optim.Muon([other], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        # Far from singular, where bfloat16 is far from float32.
        own.grad = torch.linalg.qr(torch.randn(8, 8))[0] * 3
        other.grad, before = own.grad.clone(), own.detach().clone()
        ours.step()
        theirs.step()
        moved = torch.linalg.vector_norm(own - before)
        assert torch.linalg.vector_norm(own - other) < 0.02 * moved
        other.data.copy_(own)


def test_centred_moves_nothing_along_the_mean_input() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    optimizer = accuracy.Centred(model, 0.5)
    x, before = torch.rand(7, 5), [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    moved = [p - q for p, q in zip(model.parameters(), before, strict=True)]
    assert (moved[0] @ x.mean(0)).abs().max() < 1e-5 < moved[0].abs().max()
    bias = model[0].bias.grad
    assert bias is not None
    assert torch.allclose(moved[1], -0.05 * bias)


def test_trials_never_see_the_test_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "RACES", {"shallow": Race((4, 6, 4))})
    monkeypatch.setattr(accuracy, "HELD_OUT", 50)
    images, labels, test_images, test_labels = tiny_data()
    nothing = torch.full_like(test_images, torch.nan)
    run = Run("shallow", "sgd", Setting(0.5), 12, trial=True, batch=20)
    log = accuracy.train(run, (images, labels, nothing, test_labels))
    assert log[-1]["test"] > 0.9
    spoilt = images.clone()
    spoilt[-50:] = torch.nan
    log = accuracy.train(run, (spoilt, labels, test_images, test_labels))
    assert log[-1]["train"] > 0.9
    assert log[-1]["test"] < 0.5


def test_the_best_trial_runs_with_all_seeds(folder: Path) -> None:
    runs = trials("deep", "muon")
    counts = {len(trials(race, m)) for race in accuracy.RACES for m in METHODS}
    assert counts == {6}
    assert chosen("deep", "muon") is None
    for number, run in enumerate(runs):
        # The last epoch counts.
        pretend(run, [0.6, 0.5 if number == 3 else 0.4])
    best = chosen("deep", "muon")
    assert best == replace(runs[3], trial=False, epochs=3)
    assert {run.seed for run in wanted("deep") if not run.trial} == {0, 1, 2}
    assert all(run.setting == best.setting for run in wanted("deep") if not run.trial)


def test_runs_have_files_of_their_own(folder: Path) -> None:
    for method in METHODS:
        for run in trials("deep", method):
            pretend(run, [0.1, 0.2])
    runs = [*wanted("deep"), *wanted("shallow")]
    assert len({run.path for run in runs}) == len(runs)


def test_tables_and_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    races = {
        "shallow": Race((4, 6, 6, 4)),
        "deep": Race((4, 6, 6, 6, 4)),
        "relu, 20": Race((4, 6, 6, 4), 1, 6, batch=20, between=torch.nn.ReLU),
    }
    monkeypatch.setattr(accuracy, "RACES", races)
    for name in ("shallow", "relu, 20"):
        for method in METHODS:
            for run in trials(name, method):
                pretend(run, [0.4 if run.falls else 0.3])
    accuracy.collect(tiny_data())
    assert not accuracy.RESULT.exists()
    for run in wanted("shallow"):
        if not run.trial:
            hbp = run.method == "hbp"
            pretend(run, [0.1, 0.2, 0.51 + run.seed / 100 if hbp else 0.4])
    for run in wanted("relu, 20"):
        if not run.trial:
            pretend(run, [0.0, 0.1, 0.0, 0.2, 0.0, 0.3])
    accuracy.collect(tiny_data())
    report = json.loads(accuracy.RESULT.read_text("utf-8"))
    race = draw.race(draw.part(report, first=True))
    assert race.count("\n") == 2 + len(METHODS)
    assert "| shallow, HBP | 0.15, α 0.05, falls | 10.0 (10.0–10.0) |" in race
    assert "| 52.0 (51.0–53.0) | 52.0 (51.0–53.0) | " in race
    assert race.splitlines()[-1].endswith("| 1.00 |")
    others = draw.race(draw.part(report, first=False))
    assert others.count("\n") == 2 + len(METHODS)
    assert "falls | 10.0 (10.0–10.0) | 20.0 (20.0–20.0) | 30.0 (30.0–30.0) |" in others
    assert set(report["costs"]) == {"shallow", "relu, 20"}
    assert min(report["costs"]["shallow"].values()) > 0
    assert draw.grid(report).count("\n") == 2 + 2 * len(METHODS)
    assert "at most 0.1, α 0.01, stays: 30.0" in draw.grid(report)
    draw.main(accuracy.RESULT.parent)
    assert (accuracy.RESULT.parent / "curves.svg").exists()
    assert (accuracy.RESULT.parent / "curves-more.svg").exists()
    # Nothing is drawn of races that were not run.
    some = folder / "some"
    some.mkdir()
    first = json.dumps(draw.part(report, first=True))
    (some / "results.json").write_text(first, "utf-8")
    draw.main(some)
    assert {path.stem for path in some.iterdir()} == {
        "results",
        "race",
        "grid",
        "curves",
    }


def test_committed_tables_are_those_of_the_committed_runs() -> None:
    for name, chosen_of, pages, _ in draw.PARTS:
        everything = json.loads((draw.FOLDER / f"{name}.json").read_text("utf-8"))
        report = chosen_of(everything)
        for page, text in pages.items():
            assert (draw.FOLDER / f"{page}.md").read_text("utf-8") == text(report)


def leads_at(
    winner: str,
    time: float,
    accuracies: dict[str, list[float]],
    cost: dict[str, float],
    others: set[str],
) -> None:
    """At this time these others have finished an epoch, and have not come as far."""
    reached = {}
    for method, values in accuracies.items():
        epochs = time / cost[method] + 1e-9
        if epochs >= 1:  # On the straight line between two epochs.
            low = min(int(epochs), len(values)) - 1
            rest = min(epochs - low - 1, 1)
            high = min(low + 1, len(values) - 1)
            reached[method] = values[low] + rest * (values[high] - values[low])
    assert set(reached) == {winner, *others}
    assert max(reached, key=lambda method: reached[method]) == winner


def means(runs: dict[str, list[Any]]) -> dict[str, list[float]]:
    """Test accuracies after each epoch, of each method."""
    return {
        method: [
            fmean(run["log"][e]["test"] for run in of) for e in range(of[0]["epochs"])
        ]
        for method, of in runs.items()
    }


def raced(network: str) -> tuple[Any, dict[str, list[float]], dict[str, float]]:
    """The committed runs of a race, their test accuracies, and what steps cost."""
    report = json.loads((draw.FOLDER / "results.json").read_text("utf-8"))
    runs = draw.by_network(report, trial=False)[network]
    return runs, means(runs), report["costs"][network]


def test_what_the_page_says_of_the_race() -> None:
    _, test, cost = raced("shallow")
    for e in range(3):
        ranked = sorted(test, key=lambda method: -test[method][e])
        assert ranked[:2] == ["muon", "hbp-inputs"]
    assert ranked == ["muon", "hbp-inputs", "hbp", "centred", "adamw", "sgd"]
    assert 0 < test["hbp"][2] - test["centred"][2] < 0.02
    leads_at("adamw", cost["adamw"], test, cost, others={"centred", "sgd"})
    others = {"adamw", "hbp", "hbp-inputs", "sgd"}
    leads_at("centred", 3 * cost["centred"], test, cost, others)


def test_what_the_page_says_of_the_deep_race() -> None:
    runs, test, cost = raced("deep")
    ends = {method: values[2] for method, values in test.items()}
    *ranked, adamw, sgd = sorted(ends, key=lambda method: -ends[method])
    assert ranked[:2] == ["muon", "centred"]
    assert set(ranked[2:]) == {"hbp", "hbp-inputs"}
    assert (adamw, sgd) == ("adamw", "sgd")
    assert abs(ends["hbp"] - ends["hbp-inputs"]) < 0.01
    assert ends["muon"] - ends["centred"] > 0.05
    firsts = {m: [run["log"][0]["test"] for run in of] for m, of in runs.items()}
    assert min(firsts["muon"]) > max(max(v) for m, v in firsts.items() if m != "muon")
    assert max(run["log"][2]["test"] for run in runs["sgd"]) < 0.11
    assert [accuracy < 0.11 for accuracy in firsts["hbp"]].count(True) == 1
    others = {"hbp", "hbp-inputs", "adamw", "sgd"}
    leads_at("centred", 3 * cost["centred"], test, cost, others)


def test_what_the_page_says_of_the_race_with_relu() -> None:
    runs, test, cost = raced("deep, ReLU")
    ends = {method: values[2] for method, values in test.items()}
    *close, adamw, hbp = sorted(ends, key=lambda method: -ends[method])
    assert set(close) == {"muon", "centred", "sgd", "hbp-inputs"}
    assert max(ends.values()) - min(ends[method] for method in close) < 0.015
    assert (adamw, hbp) == ("adamw", "hbp")
    assert runs["hbp-inputs"][0]["alpha"] == 1
    assert runs["hbp"][0]["free"]
    early = {"centred", "adamw"}
    leads_at("sgd", 2.0, test, cost, others=early)
    leads_at("sgd", 3.0, test, cost, others={*early, "hbp", "hbp-inputs"})
    report = json.loads((draw.FOLDER / "results.json").read_text("utf-8"))
    tried = draw.by_network(report, trial=True)["deep, ReLU"]
    fixed = [r["log"][-1]["test"] for r in tried["hbp"] if r["alpha"] == 0.1]
    assert max(fixed) < 0.11
    free = [r["log"][-1]["test"] for r in tried["hbp-inputs"] if r["free"]]
    best = max(r["log"][-1]["test"] for r in tried["hbp-inputs"])
    assert max(free) < best - 0.15


def test_what_the_page_says_of_the_race_in_large_batches() -> None:
    runs, test, cost = raced("shallow, 500")
    ends = {method: values[5] for method, values in test.items()}
    ranked = sorted(ends, key=lambda method: -ends[method])
    assert ranked == ["muon", "hbp", "hbp-inputs", "centred", "adamw", "sgd"]
    assert ends["muon"] - ends["hbp"] < 0.01
    assert 0.01 < ends["hbp"] - ends["centred"] < 0.02
    assert 0.035 < ends["hbp"] - ends["adamw"] < 0.045
    for e in range(2):
        leading = sorted(test, key=lambda method: -test[method][e])
        assert leading[:2] == ["muon", "hbp-inputs"]
    assert cost["hbp"] < 1.3 < 1.8 < cost["muon"] < 2.2
    for time in (cost["muon"], 3.0, 5.0):
        early = {"centred", "hbp", "sgd", "adamw"}
        others = early | ({"hbp-inputs"} if time > cost["hbp-inputs"] else set())
        leads_at("muon", time, test, cost, others)
    done = int(6 * cost["hbp"] / cost["muon"])
    assert test["muon"][done - 1] < ends["hbp"] < test["muon"][done] + 0.01
    own = runs["hbp"][0]
    assert (own["lr"], own["falls"], own["free"]) == (0.1, True, False)
    steps = [5 * 10**4 // 500 * own["epochs"], 5 * 10**4 // 100 * 3]
    assert steps == [600, 1500]


def test_what_the_page_says_was_chosen() -> None:
    report = json.loads((draw.FOLDER / "results.json").read_text("utf-8"))
    for network in ("shallow", "deep"):
        runs = draw.by_network(report, trial=False)[network]
        usual = CGNewton([torch.nn.Parameter(torch.ones(1))]).defaults
        chosen = {key: runs["hbp"][0][key] for key in ("lr", "alpha", "free")}
        assert chosen == {**{k: usual[k] for k in ("lr", "alpha")}, "free": True}
        assert runs["hbp"][0]["falls"]
        tried = [
            r["log"][-1]["test"] for r in draw.by_network(report, True)[network]["hbp"]
        ]
        assert 0 < max(tried) - max(tried[:4]) < 0.01
        largest = {m: max(s.lr for s in METHODS[m]) for m in ("muon", "centred")}
        assert largest == {m: runs[m][0]["lr"] for m in largest}


def test_what_the_page_says_of_the_language_model() -> None:
    report = json.loads((draw.FOLDER / "language.json").read_text("utf-8"))
    by_method: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        if not run["trial"]:
            by_method.setdefault((run["method"], run["batch"]), []).append(run)
    assert {*by_method} == {
        *((method, 64) for method in language.FINALS),
        *((method, 256) for method in language.LARGE),
    }

    def ends(method: str, looks: str, batch: int = 64) -> list[float]:
        runs = by_method[method, batch]
        assert len(runs) == 3
        return [run["losses"][looks] for run in runs]

    def is_ahead(looks: str, other: str, batch: int = 64) -> bool:
        pairs = zip(ends("exact", looks, batch), ends(other, looks, batch), strict=True)
        return all(own < theirs for own, theirs in pairs)

    for looks in ("5", "10", "20", "40"):
        assert all(is_ahead(looks, other) for other in ("averaged", "muon", "adamw"))
        assert fmean(ends("averaged", looks)) > fmean(ends("muon", looks))
    for looks in ("10", "20"):
        assert all(is_ahead(looks, other, 256) for other in ("muon", "adamw"))
    gains = {
        method: fmean(ends(method, "20")) - fmean(ends(method, "20", 256))
        for method in language.LARGE
    }
    assert gains["exact"] > gains["muon"] > 0 > gains["adamw"]
    seconds = {k: fmean(run["seconds"] for run in of) for k, of in by_method.items()}
    for slow in (("exact", 64), ("averaged", 64), ("exact", 256)):
        for fast in ("muon", "adamw"):
            assert seconds[slow] > 100 * seconds[fast, slow[1]]
    assert seconds["averaged", 64] > seconds["exact", 64] / 2
    assert by_method["exact", 64][0]["setting"] == min(language.SETTINGS["exact"])
    trials = [run for run in report["runs"] if run["trial"]]
    assert len(trials) == 15
    for method in language.FINALS:
        own = [run for run in trials if run["method"] == method]
        best = min(own, key=lambda run: run["losses"]["20"])
        found = {
            r["setting"] for k, of in by_method.items() for r in of if k[0] == method
        }
        assert found == {best["setting"]}
    damped = [r["losses"]["20"] for r in trials if r["method"] == "ratio"]
    others = [r["losses"]["20"] for r in trials if r["method"] in ("exact", "muon")]
    assert min(damped) > max(others)


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


@pytest.mark.filterwarnings("ignore:The step promises")
@pytest.mark.parametrize("method", language.SETTINGS)
def test_every_method_learns_the_language(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on few stretches: below what a guess among all letters costs."""
    monkeypatch.setattr(language, "RUNS", tmp_path)
    monkeypatch.setattr(language, "TRIAL", 2)
    monkeypatch.setattr(language, "LOOKS", [2])
    found = language.train(language.Run(method, language.SETTINGS[method][1], batch=8))
    _, letters = language.text()
    assert found["losses"][2] < math.log(letters)


class TestPaper:
    """Training with the paper's settings goes on where it was interrupted."""

    @pytest.fixture(autouse=True)
    def tiny(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(accuracy, "RACES", {"deep": Race((4, 6, 5, 4))})
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
