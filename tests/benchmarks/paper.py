"""A row of the paper: the deep network on CIFAR-10 with the treatment "abs", and Adam.

    PYTHONPATH=tests python -m benchmarks.paper [--method hbp]

Each method trains for as many epochs as fit into the same processor time, on one
thread. After every epoch a checkpoint is written: stop at any time, and the same
command goes on from there to the same weights. ``--method`` trains one of the methods,
for a second process to train the other. When all are done, they are collected in
``docs/assets/accuracy/paper.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import accuracy
from benchmarks.accuracy import LOSS, Run, model_of, normalised, optimizer_of, step
from benchmarks.measure import ROOT, provenance

RESULT = ROOT / "docs" / "assets" / "accuracy" / "paper.json"
BUDGET = 15 * 60.0  # Processor seconds of training for each method.
MEAN, DEVIATION = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
MOST = 1000  # Epochs; the budget is meant to end first.
RUNS = {
    "hbp": Run("deep", "hbp", 0.1, 500, 1.0, MOST, 0.02),
    "adam": Run("deep", "adam", 1e-3, 500, 1.0, MOST),
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


def train(run: Run, data: tuple[Tensor, ...], budget: float) -> Log:
    """Go on from the checkpoint; losses, accuracies and seconds after every epoch."""
    model = model_of(run, nn.init.xavier_normal_)
    optimizer = optimizer_of(run, model)
    generator = torch.Generator().manual_seed(run.seed)
    log: Log = []
    if state := load(run):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        log = state["log"]
    form = "{desc} |{bar}| {n:.0f} of {total:.0f} s{postfix}"
    with tqdm(total=budget, desc=run.method, ascii=True, bar_format=form) as bar:
        bar.update(seconds_of(log))
        while room(run, log, budget):
            log.append(epoch(run, model, optimizer, generator, data, seconds_of(log)))
            save(
                run,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "log": log,
                },
            )
            bar.set_postfix(epoch=len(log), test=log[-1]["test"], refresh=False)
            bar.update(seconds_of(log) - seconds_of(log[:-1]))
    return log


def seconds_of(log: Log) -> float:
    return log[-1]["seconds"] if log else 0.0


def epoch(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    data: tuple[Tensor, ...],
    before: float,
) -> dict[str, float]:
    """One pass over the training images, and what came of it.

    Loss and accuracy in training are means over the epoch, of each batch before its
    step: they cost no pass of their own.
    """
    images, labels, test_images, test_labels = data
    start, loss, hits = time.process_time(), 0.0, 0
    for index in torch.randperm(len(images), generator=generator).split(run.batch):
        outputs = step(model, optimizer, images[index], labels[index]).detach()
        loss += float(LOSS(outputs, labels[index])) * len(index)
        hits += int((outputs.argmax(1) == labels[index]).sum())
    seconds = before + time.process_time() - start
    with torch.no_grad():
        outputs = model(test_images)
    return {
        "train_loss": loss / len(images),
        "train": hits / len(images),
        "test_loss": float(LOSS(outputs, test_labels)),
        "test": float((outputs.argmax(1) == test_labels).float().mean()),
        "seconds": seconds,
    }


def collect(budget: float = BUDGET) -> None:
    """Write all runs into one file, once none of them has room for another epoch."""
    states = {run: load(run) for run in RUNS.values()}
    runs = [
        {**asdict(run), "log": state["log"]}
        for run, state in states.items()
        if state and not room(run, state["log"], budget)
    ]
    if len(runs) < len(RUNS):
        print("Not all runs are done. Start this again when the others have ended.")
        return
    settings = {"budget": budget, "sizes": accuracy.SIZES["deep"]}
    report = {"provenance": provenance("cpu"), "settings": settings, "runs": runs}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(f"{len(runs)} runs written to {RESULT}")


def channels(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=RUNS, help="train this one only")
    method = parser.parse_args().method
    torch.set_num_threads(1)
    data = normalised(channels(MEAN), channels(DEVIATION))
    for run in [RUNS[method]] if method else RUNS.values():
        train(run, data, BUDGET)
    collect()


if __name__ == "__main__":
    main()
