"""A row of the paper: the deep network on CIFAR-10 with the treatment "abs", and Adam.

    PYTHONPATH=tests python -m benchmarks.paper [--method hbp] [--collect]

Each method trains for as many epochs as fit into the same processor time, on one
thread. After every epoch a checkpoint is written: stop at any time, and the same
command goes on from there to the same weights. ``--method`` trains one of the methods,
for a second process to train the other. ``--collect`` trains nothing: it writes the
runs to ``docs/assets/accuracy/paper.json``, as the end does, as far as they have come.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import accuracy
from benchmarks.accuracy import (
    LOSS,
    Run,
    Setting,
    model_of,
    normalised,
    optimizer_of,
    step,
)
from benchmarks.measure import ROOT, provenance

RESULT = ROOT / "docs" / "assets" / "accuracy" / "paper.json"
BUDGET = 15 * 60.0  # Processor seconds of training for each method.
MEAN, DEVIATION = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
MOST = 1000  # Epochs; the budget is meant to end first.
RUNS = {
    "hbp": Run("deep", "hbp", Setting(0.1, 0.02), MOST, batch=500),
    "adam": Run("deep", "adam", Setting(1e-3), MOST, batch=500),
}
Log = list[dict[str, float]]


def checkpoint_path(run: Run) -> Path:
    return accuracy.RUNS / "paper" / f"{run.path.stem}.pt"


def load(run: Run) -> dict[str, Any] | None:
    """What the last epoch left behind, if there was one."""
    path = checkpoint_path(run)
    return torch.load(path, weights_only=True) if path.exists() else None


def save(run: Run, state: dict[str, Any]) -> None:
    path = checkpoint_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whoever interrupts the writing finds the checkpoint before it in its place.
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def room(run: Run, log: Log, budget: float) -> bool:
    """Whether one more epoch of the mean duration ends within the budget."""
    if not log:
        return True
    seconds = log[-1]["seconds"]
    return len(log) < run.epochs and seconds + seconds / len(log) <= budget


class Training:
    """Model, optimizer, order of the batches and log, as of the last checkpoint."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = model_of(run, nn.init.xavier_normal_)
        self.optimizer = optimizer_of(run, self.model)
        self.generator = torch.Generator().manual_seed(run.seed)
        self.log: Log = []
        if state := load(run):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.log = state["log"]

    @property
    def seconds(self) -> float:
        return self.log[-1]["seconds"] if self.log else 0.0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "log": self.log,
        }

    def epoch(self, data: tuple[Tensor, ...]) -> dict[str, float]:
        """One pass over the training images, and what came of it.

        Loss and accuracy in training are means over the epoch, of each batch before
        its step: they cost no pass of their own.
        """
        images, labels, test_images, test_labels = data
        start, loss, hits = time.process_time(), 0.0, 0
        order = torch.randperm(len(images), generator=self.generator)
        for index in order.split(self.run.batch):
            wanted = labels[index]
            outputs = step(self.model, self.optimizer, images[index], wanted).detach()
            loss += float(LOSS(outputs, wanted)) * len(index)
            hits += int((outputs.argmax(1) == wanted).sum())
        seconds = self.seconds + time.process_time() - start
        with torch.no_grad():
            outputs = self.model(test_images)
        return {
            "train_loss": loss / len(images),
            "train": hits / len(images),
            "test_loss": float(LOSS(outputs, test_labels)),
            "test": float((outputs.argmax(1) == test_labels).float().mean()),
            "seconds": seconds,
        }


def train(run: Run, data: tuple[Tensor, ...], budget: float) -> Log:
    """Go on from the checkpoint; losses, accuracies and seconds after every epoch."""
    training = Training(run)
    log = training.log
    form = "{desc} |{bar}| {n:.0f} of {total:.0f} s{postfix}"
    with tqdm(total=budget, desc=run.method, ascii=True, bar_format=form) as bar:
        while room(run, log, budget):
            bar.update(training.seconds - bar.n)
            log.append(training.epoch(data))
            save(run, training.state())
            bar.set_postfix(epoch=len(log), test=log[-1]["test"])
        bar.update(training.seconds - bar.n)
    return log


def collect(budget: float = BUDGET) -> None:
    """Write the runs into one file, each as far as it has come."""
    logs = {run: state["log"] for run in RUNS.values() if (state := load(run))}
    if not logs:
        return
    if any(room(run, logs.get(run, []), budget) for run in RUNS.values()):
        print("Not all runs are done. Start this again without --method.")
    report = {
        "provenance": provenance("cpu"),
        "settings": {"budget": budget, "sizes": accuracy.RACES["deep"].sizes},
        "runs": [{**run.facts(), "log": log} for run, log in logs.items()],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(f"{len(logs)} runs written to {RESULT}")


def channels(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=RUNS, help="train this one only")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.collect:
        data = normalised(channels(MEAN), channels(DEVIATION))
        for run in [RUNS[options.method]] if options.method else RUNS.values():
            train(run, data, BUDGET)
    collect()


if __name__ == "__main__":
    main()
