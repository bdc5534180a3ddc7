"""A longer run for tutorial 05: the 3c3d network, by exact products and without.

    PYTHONPATH=tests python -m benchmarks.convolution_training [--method exact]

Every method gets a small grid of settings, and a few epochs for each of them. The
setting with the lowest training loss then goes on from where it stands, to a number of
epochs that takes each method about the same processor time. After every epoch a
checkpoint is written: stop at any time, and the same command goes on from there to the
same weights. ``--method`` trains one of the methods, for a second process to train
another. When all are there, they are collected in ``src/hbp/tutorial/recorded``, from
which ``hbp.tutorial.datasets.recorded("convolution")`` reads them. Needs CIFAR-10 under
``HBP_DATA``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.accuracy import normalised
from benchmarks.convolution import network
from benchmarks.measure import ROOT, provenance
from hbp import (
    CGNewton,
    HBPSequential,
    batch_summed_hessian,
    convert,
    per_sample_hessian,
    set_seeds,
)

LOSS = nn.CrossEntropyLoss()
RUNS = ROOT / "build" / "benchmarks" / "convolution"
RESULT = ROOT / "src" / "hbp" / "tutorial" / "recorded" / "convolution.json"
CHANNELS = (16, 24, 32)  # A quarter of 3c3d's own, to fit into an hour on one core.
BATCH, IMAGES, TEST_IMAGES = 128, 6400, 2000
SEED, MOMENTUM, CG_TOL, CG_MAXITER = 0, 0.9, 0.1, 10
HESSIANS = {"exact": per_sample_hessian, "averaged": batch_summed_hessian}
Log = list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        method: "exact" or "averaged" (hbp), "sgd" (with momentum) or "adam".
        lr: Learning rate.
        alpha: hbp's damping.
        treatment: hbp's ``modify_2nd_order_terms``.
    """

    method: str
    lr: float
    alpha: float | None = None
    treatment: str | None = None

    @property
    def path(self) -> Path:
        values = "_".join(str(value) for value in asdict(self).values())
        return RUNS / f"{values}.pt"

    def load(self) -> dict[str, Any] | None:
        """What the last epoch left behind, if there was one."""
        return torch.load(self.path, weights_only=True) if self.path.exists() else None

    def log(self) -> Log:
        state = self.load()
        return state["log"] if state else []


@dataclass(frozen=True)
class Contest:
    """The settings of a method, and how long they run.

    Args:
        runs: The grid.
        trial: Epochs for each setting.
        epochs: Epochs for the best, those of the trial included.
    """

    runs: tuple[Run, ...]
    trial: int
    epochs: int

    def best(self) -> Run | None:
        """The lowest training loss in the last epoch of the trial, once all are done.

        The test images have no say in it.
        """
        logs = {run: run.log() for run in self.runs}
        if any(len(log) < self.trial for log in logs.values()):
            return None
        return min(self.runs, key=lambda run: logs[run][self.trial - 1]["train_loss"])

    def is_done(self) -> bool:
        best = self.best()
        return best is not None and len(best.log()) >= self.epochs


CONTESTS = {
    "exact": Contest(
        (
            Run("exact", 0.15, 0.001, "zero"),
            Run("exact", 0.15, 0.001, "abs"),
        ),
        1,
        4,
    ),
    "averaged": Contest(
        (
            Run("averaged", 0.15, 0.001, "abs"),
            Run("averaged", 0.15, 0.01, "abs"),
            Run("averaged", 0.15, 0.001, "zero"),
        ),
        2,
        20,
    ),
    "sgd": Contest(tuple(Run("sgd", lr) for lr in (0.03, 0.1, 0.3)), 6, 55),
    "adam": Contest(tuple(Run("adam", lr) for lr in (3e-4, 1e-3, 3e-3, 1e-2)), 6, 55),
}


class Training:
    """Model, optimizer, order of the batches and log, as of the last checkpoint."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = model_of(run)
        self.optimizer = optimizer_of(run, self.model)
        self.generator = torch.Generator().manual_seed(SEED)
        self.log: Log = []
        if state := run.load():
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.log = state["log"]

    def epoch(self, data: tuple[Tensor, ...]) -> None:
        """One pass over the training images; what came of it is logged and saved.

        The training loss is the mean over the batches, of each before its step. The
        clock leaves out the test images.
        """
        images, labels, test_images, test_labels = data
        order = torch.randperm(len(images), generator=self.generator)
        start, losses = time.process_time(), []
        for index in order.split(BATCH):
            losses.append(self.step(images[index], labels[index]))
        seconds = time.process_time() - start
        before = self.log[-1]["seconds"] if self.log else 0.0
        entry = {
            "seconds": before + seconds,
            "train_loss": sum(losses) / len(losses),
            "test_accuracy": accuracy(self.model, test_images, test_labels),
        }
        self.log.append(entry)
        self.save()

    def step(self, images: Tensor, labels: Tensor) -> float:
        outputs = self.model(images)
        loss = LOSS(outputs, labels)
        self.optimizer.zero_grad()
        if isinstance(self.model, HBPSequential):
            hessian = HESSIANS[self.run.method](loss, outputs)
            loss.backward()
            self.model.backward_hessian(
                hessian, modify_2nd_order_terms=self.run.treatment
            )
        else:
            loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "log": self.log,
        }
        replace_file(self.run.path, lambda path: torch.save(state, path))


def model_of(run: Run) -> nn.Module:
    """3c3d with Xavier's initial weights and no biases at first, the same for all."""
    set_seeds(SEED)
    model = network(CHANNELS)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return convert(model) if run.method in HESSIANS else model


def optimizer_of(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    if run.alpha is not None:
        return CGNewton(
            model.parameters(),
            lr=run.lr,
            alpha=run.alpha,
            cg_atol=0.0,
            cg_tol=CG_TOL,
            cg_maxiter=CG_MAXITER,
        )
    if run.method == "adam":
        return torch.optim.Adam(model.parameters(), lr=run.lr)
    return torch.optim.SGD(model.parameters(), lr=run.lr, momentum=MOMENTUM)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    parts = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file; whoever interrupts that finds the one before it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    write(new)
    new.replace(path)


def train(run: Run, epochs: int, data: tuple[Tensor, ...]) -> None:
    """Go on from the checkpoint, until there are as many epochs."""
    training = Training(run)
    done = len(training.log)
    with tqdm(total=epochs, initial=done, desc=run.path.stem, ascii=True) as bar:
        for _ in range(done, epochs):
            training.epoch(data)
            bar.update()
            bar.set_postfix(test=training.log[-1]["test_accuracy"])


def settings() -> dict[str, object]:
    """What all runs have in common."""
    return {
        "channels": CHANNELS,
        "batch": BATCH,
        "images": IMAGES,
        "test_images": TEST_IMAGES,
        "seed": SEED,
        "momentum": MOMENTUM,
        "cg_tol": CG_TOL,
        "cg_maxiter": CG_MAXITER,
    }


def collect() -> None:
    """Write what was recorded into one small file, once all is done."""
    if not all(contest.is_done() for contest in CONTESTS.values()):
        print("Not all runs are done. Start this again without --method.")
        return
    report = {
        "provenance": provenance("cpu"),
        "settings": settings(),
        "grid": [
            {**asdict(run), **columns(run, contest.trial)}
            for contest in CONTESTS.values()
            for run in contest.runs
        ],
        "runs": {
            method: {**asdict(best), **columns(best, contest.epochs)}
            for method, contest in CONTESTS.items()
            if (best := contest.best())
        },
    }
    text = json.dumps(report, indent=1) + "\n"
    replace_file(RESULT, lambda path: path.write_text(text, "utf-8"))
    print(f"{len(CONTESTS)} runs written to {RESULT}")


def columns(run: Run, epochs: int) -> dict[str, list[float]]:
    """The log, by quantity."""
    log = run.log()[:epochs]
    return {name: [round(entry[name], 4) for entry in log] for name in log[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=CONTESTS, help="train this one only")
    method = parser.parse_args().method
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = normalised()
    data = (
        images[:IMAGES],
        labels[:IMAGES],
        test_images[:TEST_IMAGES],
        test_labels[:TEST_IMAGES],
    )
    for contest in [CONTESTS[method]] if method else CONTESTS.values():
        for run in contest.runs:
            train(run, contest.trial, data)
        best = contest.best()
        assert best is not None
        train(best, contest.epochs, data)
    collect()


if __name__ == "__main__":
    main()
