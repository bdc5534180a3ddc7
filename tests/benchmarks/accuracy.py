"""Time to accuracy on CIFAR-10: epochs and seconds, for whoever wins.

    PYTHONPATH=tests python -m benchmarks.accuracy [--share 1/2]

Two networks of sigmoid layers, images normalised by channel, Xavier's initialisation,
no biases at first. SGD with momentum and Adam get a small grid of learning rates on
one seed, all with the schedule that hbp has; the best then run on two more.
Every run is written to a file of its own when it ends, and is not run again: stop at
any time. ``--share 1/2`` and ``--share 2/2`` split the runs over two processes. When
all are there, they are collected in ``docs/assets/accuracy/results.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measure import ROOT, provenance
from benchmarks.points import network
from hbp import CGNewton, HBPSequential, convert, output_hessian, set_seeds
from hbp.tutorial.datasets import cifar10

LOSS = nn.CrossEntropyLoss()
RUNS = ROOT / "build" / "benchmarks" / "accuracy"
RESULT = ROOT / "docs" / "assets" / "accuracy" / "results.json"
SIZES = {
    "shallow": [3072, 1024, 512, 256, 128, 10],
    "deep": [3072, 1024, 512, 256, 128, 64, 32, 16, 10],
}
SEEDS = [0, 1, 2]


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        network: A key of ``SIZES``.
        method: "hbp" (abs, cg), "adam" or "sgd" (momentum 0.9).
        lr: Learning rate at first.
        batch: Samples in a batch.
        decay: Factor of the learning rate after every epoch.
        epochs: How many.
        alpha: hbp's damping.
        seed: Of the initial weights and of the order of the batches.
    """

    network: str
    method: str
    lr: float
    batch: int
    decay: float
    epochs: int
    alpha: float | None = None
    seed: int = 0

    @property
    def path(self) -> Path:
        values = "_".join(str(value) for value in asdict(self).values())
        return RUNS / f"{values}.json"

    def result(self) -> list[dict[str, float]] | None:
        """Training and test accuracy and seconds, by epoch, if the run is done."""
        return json.loads(self.path.read_text()) if self.path.exists() else None


SHALLOW_HBP = Run("shallow", "hbp", 0.15, 100, 0.7, 8, 0.05)
DEEP_HBP = Run("deep", "hbp", 0.1, 100, 0.8, 8, 0.01)
# Tried first; it is quick, but not with every seed.
HASTY_DEEP_HBP = replace(DEEP_HBP, lr=0.15)
RATES = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (0.1, 0.3)}


def grid(own: Run, method: str) -> list[Run]:
    """Some learning rates, otherwise as hbp's run.

    On the shallow network Adam also gets each of them without the schedule.
    """
    schedules = {own.decay}
    if (own.network, method) == ("shallow", "adam"):
        schedules.add(1.0)
    return [
        replace(own, method=method, lr=lr, decay=decay, alpha=None)
        for lr, decay in product(RATES[method], sorted(schedules))
    ]


def best(runs: list[Run]) -> Run | None:
    """The run of the best test accuracy in any epoch, once all are done."""
    results = [run.result() for run in runs]
    scores = [max(epoch["test"] for epoch in result) for result in results if result]
    return runs[scores.index(max(scores))] if len(scores) == len(runs) else None


def wanted() -> Iterator[Run]:
    """All runs, as far as they are known: the best of a grid is known last."""
    for own in (SHALLOW_HBP, DEEP_HBP, HASTY_DEEP_HBP):
        yield from (replace(own, seed=seed) for seed in SEEDS)
    for own in (SHALLOW_HBP, DEEP_HBP):
        for method in RATES:
            yield from grid(own, method)
    for own, method in product((SHALLOW_HBP, DEEP_HBP), RATES):
        winner = best(grid(own, method))
        if winner is not None:
            yield from (replace(winner, seed=seed) for seed in SEEDS)


def normalised(
    mean: Tensor | None = None, deviation: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and labels, channels of mean 0 and deviation 1.

    Args:
        mean: Of each channel, as ``[1, 3, 1, 1]``; by default of the training images.
        deviation: Likewise.
    """
    (images, labels), (test_images, test_labels) = (
        cifar10(train=train).tensors for train in (True, False)
    )
    if mean is None:
        mean = images.mean((0, 2, 3), keepdim=True)
    if deviation is None:
        deviation = images.std((0, 2, 3), keepdim=True)
    return (
        (images - mean) / deviation,
        labels,
        (test_images - mean) / deviation,
        test_labels,
    )


def model_of(
    run: Run, initialise: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_
) -> nn.Module:
    set_seeds(run.seed)
    model = network(SIZES[run.network])
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            initialise(layer.weight)
            nn.init.zeros_(layer.bias)
    return convert(model) if run.method == "hbp" else model


def optimizer_of(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    if run.alpha is not None:
        return CGNewton(
            model.parameters(),
            lr=run.lr,
            alpha=run.alpha,
            cg_atol=0.0,
            cg_tol=0.1,
            cg_maxiter=50,
        )
    if run.method == "adam":
        return torch.optim.Adam(model.parameters(), lr=run.lr)
    return torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9)


def train(run: Run, data: tuple[Tensor, ...]) -> list[dict[str, float]]:
    """Accuracies, and processor seconds of training alone, after every epoch.

    With one thread, processor time is the time on a machine with nothing else to do.
    """
    images, labels, test_images, test_labels = data
    model = model_of(run)
    optimizer = optimizer_of(run, model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, run.decay)
    generator = torch.Generator().manual_seed(run.seed)
    log, seconds = [], 0.0
    for _ in tqdm(range(run.epochs), desc=run.path.stem, ascii=True):
        start, hits = time.process_time(), 0
        for index in torch.randperm(len(images), generator=generator).split(run.batch):
            outputs = step(model, optimizer, images[index], labels[index])
            hits += int((outputs.argmax(1) == labels[index]).sum())
        seconds += time.process_time() - start
        schedule.step()
        with torch.no_grad():
            right = (model(test_images).argmax(1) == test_labels).float().mean()
        train_accuracy = hits / len(images)
        log.append({"train": train_accuracy, "test": float(right), "seconds": seconds})
    return log


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    outputs = model(images)
    loss = LOSS(outputs, labels)
    optimizer.zero_grad()
    loss.backward()
    if isinstance(model, HBPSequential):
        hessian = output_hessian(LOSS, outputs, labels)
        model.backward_hessian(hessian, modify_2nd_order_terms="abs")
    optimizer.step()
    return outputs


def collect() -> None:
    """Write all runs into one file."""
    runs = [{**asdict(run), "log": run.result()} for run in dict.fromkeys(wanted())]
    report = {"provenance": provenance("cpu"), "runs": runs}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(f"{len(runs)} runs written to {RESULT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", default="1/1", help="this process's part, as 1/2")
    part, parts = map(int, parser.parse_args().share.split("/"))
    torch.set_num_threads(1)
    data = normalised()
    RUNS.mkdir(parents=True, exist_ok=True)
    # The second time around, the winners of the grids are known, or another
    # process is still at work on them.
    for _ in range(2):
        for number, run in enumerate(dict.fromkeys(wanted())):
            if number % parts == part - 1 and run.result() is None:
                log = train(run, data)
                run.path.write_text(json.dumps(log))
    if all(run.result() for run in wanted()) and all(
        best(grid(own, method))
        for own, method in product((SHALLOW_HBP, DEEP_HBP), RATES)
    ):
        collect()
    else:
        print("Not all runs are done. Start this again when the others have ended.")


if __name__ == "__main__":
    main()
