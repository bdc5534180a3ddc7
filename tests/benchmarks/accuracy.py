"""A race on CIFAR-10: accuracy by epochs and by time, for whoever wins.

    PYTHONPATH=tests python -m benchmarks.accuracy [shallow] [deep] ["deep, ReLU"] ...

Two networks of sigmoid layers and one of ReLUs, in batches of 100, and one of them in
batches of 500. Images are normalised by channel, weights begin as Xavier's, biases as
0. Every method gets the same number of trials, with seed 0: three settings, each with a
learning rate that stays and one that falls. They train on 45,000 of the training
images, and are judged by their accuracy on the other 5,000. The best trains again on
all of them, longer, and with three seeds; only then the test images are looked at,
after every epoch, with the weights as they are and with their moving average.

Every run is written to a file of its own when it ends, and is not run again: stop at
any time. When all runs of a race are there, steps of all methods are timed side by
side, which wants an idle machine, and everything is collected in
``docs/assets/accuracy/results.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from benchmarks.measure import ROOT, provenance
from benchmarks.points import network
from hbp import CGNewton, HBPSequential, backward, convert, output_hessian, set_seeds
from hbp.tutorial.datasets import cifar10

LOSS = nn.CrossEntropyLoss()
RUNS = ROOT / "build" / "benchmarks" / "accuracy"
RESULT = ROOT / "docs" / "assets" / "accuracy" / "results.json"
SHALLOW = (3072, 1024, 512, 256, 128, 10)
DEEP = (3072, 1024, 512, 256, 128, 64, 32, 16, 10)
SEEDS = [0, 1, 2]
HELD_OUT = 5000
# A moving average of the weights takes this share of them, every so many steps.
SHARE, EVERY = 0.05, 10


@dataclass(frozen=True)
class Setting:
    """What is chosen by trials.

    Args:
        lr: Learning rate at first; the longest step where ``free``.
        alpha: Damping of a Newton step.
        free: Whether CGNewton finds the length of its step.
    """

    lr: float
    alpha: float | None = None
    free: bool = False


# The last one has the numbers of CGNewton if nothing is chosen.
NEWTON = [Setting(0.15, 0.05), Setting(0.1, 0.01), Setting(0.1, 0.01, free=True)]
METHODS = {
    "hbp": NEWTON,
    "hbp-inputs": NEWTON,
    "centred": [Setting(lr) for lr in (1.0, 3.0, 10.0)],
    "muon": [Setting(lr) for lr in (0.01, 0.02, 0.05)],
    "adamw": [Setting(lr) for lr in (3e-4, 1e-3, 3e-3)],
    "sgd": [Setting(lr) for lr in (0.03, 0.1, 0.3)],
}


@dataclass(frozen=True)
class Race:
    """What all methods of a race have in common.

    Args:
        sizes: Features at the input and after each linear layer.
        trial_epochs: How long a trial is.
        epochs: How long the race is.
        batch: Samples in a batch.
        between: What stands between the linear layers.
        settings: What is tried here, of the methods for which that is not ``METHODS``.
    """

    sizes: tuple[int, ...]
    trial_epochs: int = 1
    epochs: int = 3
    batch: int = 100
    between: type[nn.Module] = nn.Sigmoid
    settings: dict[str, list[Setting]] = field(default_factory=dict)


# With ReLU, whose outputs are larger, steps have to be shorter.
SHORTER = [Setting(0.1, 0.1), Setting(0.1, 1.0), Setting(0.1, 0.01, free=True)]
RELU = {
    "hbp": SHORTER,
    "hbp-inputs": SHORTER,
    "centred": [Setting(lr) for lr in (0.03, 0.1, 0.3)],
    "muon": [Setting(lr) for lr in (0.005, 0.01, 0.02)],
    "adamw": [Setting(lr) for lr in (1e-4, 3e-4, 1e-3)],
    "sgd": [Setting(lr) for lr in (0.01, 0.03, 0.1)],
}
# The deep network of sigmoids stands still for hundreds of steps, whoever trains it.
RACES = {
    "shallow": Race(SHALLOW),
    "deep": Race(DEEP, trial_epochs=2),
    "deep, ReLU": Race(DEEP, between=nn.ReLU, settings=RELU),
    "shallow, 500": Race(SHALLOW, 2, 6, batch=500),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        network: A key of ``RACES``.
        method: A key of ``METHODS``, or "adam".
        setting: Learning rate and damping.
        epochs: How many.
        falls: Whether the learning rate falls, linearly, to a tenth.
        trial: Whether it trains without the held-out images and is judged by them.
        seed: Of the initial weights and of the order of the batches.
        batch: Samples in a batch.
    """

    network: str
    method: str
    setting: Setting
    epochs: int
    falls: bool = False
    trial: bool = False
    seed: int = 0
    batch: int = 100

    def facts(self) -> dict[str, Any]:
        """All of it, flat."""
        facts = {**asdict(self), **asdict(self.setting)}
        del facts["setting"]
        return facts

    @property
    def path(self) -> Path:
        name = "_".join(map(str, self.facts().values()))
        return RUNS / (name.replace(", ", "-") + ".json")

    def result(self) -> list[dict[str, float]] | None:
        """Accuracies by epoch, if the run is done."""
        return json.loads(self.path.read_text()) if self.path.exists() else None


def trials(network: str, method: str) -> list[Run]:
    race = RACES[network]
    return [
        Run(
            network,
            method,
            setting,
            race.trial_epochs,
            falls,
            trial=True,
            batch=race.batch,
        )
        for setting in race.settings.get(method, METHODS[method])
        for falls in (False, True)
    ]


def chosen(network: str, method: str) -> Run | None:
    """The best trial, by accuracy at its end, as a race; None until all are done."""
    runs = trials(network, method)
    results = [run.result() for run in runs]
    scores = [result[-1]["test"] for result in results if result]
    if len(scores) < len(runs):
        return None
    best = runs[scores.index(max(scores))]
    return replace(best, epochs=RACES[network].epochs, trial=False)


def wanted(network: str) -> Iterator[Run]:
    """All runs, as far as they are known: those of the race after the trials."""
    for method in METHODS:
        yield from trials(network, method)
    for seed in SEEDS:
        for method in METHODS:
            if run := chosen(network, method):
                yield replace(run, seed=seed)


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
    race = RACES[run.network]
    model = network(race.sizes, race.between)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            initialise(layer.weight)
            nn.init.zeros_(layer.bias)
    if run.setting.alpha is None:
        return model
    converted = convert(model)
    if run.method == "hbp-inputs":
        converted.set_hbp_approximation(average_parameter_jacobian=False)
    return converted


class Centred(torch.optim.SGD):
    """Gradient descent in which no weight moves along its layer's mean input.

    It is what the averaged block H ⊗ x̄x̄ᵀ does without any H: the ablation of HBP at
    the rate lr/α. Biases get a tenth of the rate.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.means: dict[nn.Linear, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_hook(self.remember)
        groups: list[dict[str, Any]] = [
            {"params": [layer.weight for layer in self.layers]},
            {"params": [layer.bias for layer in self.layers], "lr": lr / 10},
        ]
        super().__init__(groups, lr=lr)

    def remember(self, layer: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
        self.means[layer] = inputs[0].detach().mean(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for layer in self.layers:
            gradient, mean = layer.weight.grad, self.means[layer]
            if gradient is not None:
                gradient -= torch.outer(gradient @ mean, mean) / (mean @ mean)
        super().step(closure)


class MuonBesideAdamW(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the weights of hidden layers, AdamW for the rest.

    ``torch.optim.Muon`` does the same, rounded to bfloat16, for which many processors
    have no instructions: there a step takes a hundred times as long.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        self.hidden = weights[1:-1]
        rest = [p for p in model.parameters() if all(p is not w for w in self.hidden)]
        super().__init__(rest, lr=1e-3)
        self.own = {"lr": lr}
        self.momenta = [torch.zeros_like(weight) for weight in self.hidden]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.hidden:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for weight, momentum in zip(self.hidden, self.momenta, strict=True):
            if weight.grad is not None:
                momentum.lerp_(weight.grad, 0.05)
                rows, columns = weight.shape
                scale = max(1.0, rows / columns) ** 0.5
                update = orthogonal(weight.grad.lerp(momentum, 0.95))
                weight.add_(update, alpha=-self.own["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrix, by five steps of Newton and Schulz."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    X = wide / torch.linalg.vector_norm(wide).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X if len(matrix) <= matrix.shape[1] else X.T


def optimizer_of(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    lr, alpha = run.setting.lr, run.setting.alpha
    if alpha is not None:
        return CGNewton(
            model.parameters(),
            lr=lr,
            alpha=alpha,
            cg_atol=0.0,
            cg_tol=0.1,
            cg_maxiter=50,
            adaptive_lr=run.setting.free,
        )
    if run.method == "centred":
        return Centred(model, lr)
    if run.method == "muon":
        return MuonBesideAdamW(model, lr)
    if run.method == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    kind = torch.optim.Adam if run.method == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=lr)


def train(run: Run, data: tuple[Tensor, ...]) -> list[dict[str, float]]:
    """Accuracies after every epoch."""
    images, labels, test_images, test_labels = data
    if run.trial:
        test_images, test_labels = images[-HELD_OUT:], labels[-HELD_OUT:]
        images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    model = model_of(run)
    # A copy, while the model has no hooks that would be copied, too.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - SHARE))
    optimizer = optimizer_of(run, model)
    groups = [*optimizer.param_groups, getattr(optimizer, "own", {"lr": 0.0})]
    rates = [(group, group["lr"]) for group in groups]
    generator = torch.Generator().manual_seed(run.seed)
    log, done, lost = [], 0, False
    steps = run.epochs * -(-len(images) // run.batch)
    for _ in tqdm(range(run.epochs), desc=run.path.stem, ascii=True):
        hits = 0
        for index in torch.randperm(len(images), generator=generator).split(run.batch):
            if lost:  # It has diverged, and its weights stay as they are.
                break
            for group, lr in rates if run.falls else ():
                group["lr"] = lr * (1 - 0.9 * done / steps)
            try:
                outputs = step(model, optimizer, images[index], labels[index])
            except ArithmeticError:
                lost = True
                continue
            hits += int((outputs.argmax(1) == labels[index]).sum())
            done += 1
            if done % EVERY == 0:
                average.update_parameters(model)
        entry = {"train": hits / len(images)}
        for name, weights in (("test", model), ("averaged", average)):
            with torch.no_grad():
                right = weights(test_images).argmax(1) == test_labels
            entry[name] = float(right.float().mean())
        log.append(entry)
    return log


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    outputs = model(images)
    loss = LOSS(outputs, labels)
    optimizer.zero_grad()
    if not isinstance(model, HBPSequential):
        loss.backward()
    elif optimizer.defaults["adaptive_lr"]:
        backward(model, outputs, loss)
    else:
        loss.backward()
        hessian = output_hessian(LOSS, outputs, labels)
        model.backward_hessian(hessian, modify_2nd_order_terms="abs")
    optimizer.step()
    return outputs


def costs(
    runs: dict[str, Run], data: tuple[Tensor, ...], rounds: int = 30
) -> dict[str, float]:
    """Time of a step of each method, in steps of SGD: the median over rounds.

    The methods take turns, on the same batches, so that all see the same machine.
    """
    models = {method: model_of(run) for method, run in runs.items()}
    optimizers = {name: optimizer_of(runs[name], net) for name, net in models.items()}
    times: dict[str, list[float]] = {method: [] for method in runs}
    size = runs["sgd"].batch
    batches = zip(data[0].split(size), data[1].split(size), strict=True)
    for _, (images, labels) in zip(range(rounds), batches, strict=False):
        for method, model in models.items():
            start = time.perf_counter()
            step(model, optimizers[method], images, labels)
            times[method].append(time.perf_counter() - start)
    unit = median(times["sgd"])
    return {method: median(seconds) / unit for method, seconds in times.items()}


def collect(data: tuple[Tensor, ...]) -> None:
    """Write all runs of the networks that are done into one file."""
    runs, relative = [], {}
    for net in RACES:
        of_net = list(wanted(net))
        results = [run.result() for run in of_net]
        whole = len(METHODS) * (6 + len(SEEDS))
        if len(of_net) == whole and all(results):
            runs += [
                {**run.facts(), "log": log}
                for run, log in zip(of_net, results, strict=True)
            ]
            races = {run.method: run for run in of_net if not run.trial}
            relative[net] = costs(races, data)
        else:
            print(f"{net}: {sum(map(bool, results))} of {whole} runs are done.")
    if runs:
        report = {"provenance": provenance("cpu"), "costs": relative, "runs": runs}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(f"{len(runs)} runs written to {RESULT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="default: all")
    names = parser.parse_args().networks or list(RACES)
    if unknown := set(names) - set(RACES):
        parser.error(f"there is no {unknown}, only {', '.join(map(repr, RACES))}")
    torch.set_num_threads(1)
    data = normalised()
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in names:
        for _ in range(2):  # The second time around, the best trials are known.
            for run in wanted(name):
                if run.result() is None:
                    run.path.write_text(json.dumps(train(run, data)))
    collect(data)


if __name__ == "__main__":
    main()
