"""A small language model: Gauss-Newton steps beside AdamW and Muon, step by step.

    PYTHONPATH=tests python -m benchmarks.language [METHOD ...]

The model of tutorial 07, two blocks on the characters of *Alice*, in batches of 64
stretches of 32 characters. ``exact`` is ``hbp.CGNewton`` with the exact block of the
generalized Gauss-Newton matrix for every parameter, and finds the length of its step
from the curvature along it. ``averaged`` has the averaged blocks instead. ``ratio`` has
the exact blocks, steps of a fixed length, and damping that follows the reduction ratio.

Every method gets three trials of 20 steps with seed 0, on the first eight tenths of the
text, judged by the ninth. The best setting trains again with three seeds, for 40 steps,
and is judged by the last tenth, but for ``ratio``, which its trials decide. Three of
the methods train once more so, in batches of 256, for 20 steps. Every run has a file of
its own, and is not run again: stop at any time, or run some of the methods beside the
others. When all are there, they are collected in
``docs/assets/accuracy/language.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from tqdm import tqdm

import hbp
from benchmarks.accuracy import orthogonal
from benchmarks.measure import ROOT, provenance
from hbp.damping import LevenbergMarquardt
from hbp.tutorial.datasets import alice

RUNS = ROOT / "build" / "benchmarks" / "language"
RESULT = ROOT / "docs" / "assets" / "accuracy" / "language.json"
WIDTH, HEADS, LENGTH = 48, 4, 32
SEEDS, TRIAL = [0, 1, 2], 20
# Of a batch of so many, so many steps.
STEPS = {64: 40, 256: 20}
# α of the steps that find their length, learning rates of the others.
SETTINGS = {
    "exact": [1e-3, 3e-3, 1e-2],
    "averaged": [1e-3, 3e-3, 1e-2],
    "ratio": [0.1, 0.3, 1.0],
    "muon": [0.02, 0.05, 0.1],
    "adamw": [3e-3, 1e-2, 3e-2],
}
FINALS = ["exact", "averaged", "muon", "adamw"]
LARGE = ["exact", "muon", "adamw"]
# After so many steps the held-out loss is taken.
LOOKS = [5, 10, 20, 40]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k = k.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        v = v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.letters.weight, std=0.1)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.letters(codes) + self.places
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        method: A key of ``SETTINGS``.
        setting: One of its ``SETTINGS``.
        seed: Of weights and batches.
        trial: Whether it is one, short, and judged by the ninth tenth of the text.
        batch: How many stretches a batch has.
    """

    method: str
    setting: float
    seed: int = 0
    trial: bool = True
    batch: int = 64

    @property
    def path(self) -> Path:
        return RUNS / ("_".join(map(str, asdict(self).values())) + ".json")

    def result(self) -> dict[str, Any] | None:
        """What it has left, if it is done."""
        return json.loads(self.path.read_text()) if self.path.exists() else None


class Muon(torch.optim.AdamW):
    """Muon for the weights inside the blocks, AdamW at 0.01 for the rest."""

    def __init__(self, model: GPT, lr: float) -> None:
        layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
        self.hidden, self.lr = [layer.weight for layer in layers], lr
        own = set(map(id, self.hidden))
        super().__init__([p for p in model.parameters() if id(p) not in own], 1e-2)
        self.momenta = [torch.zeros_like(weight) for weight in self.hidden]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for weight, momentum in zip(self.hidden, self.momenta, strict=True):
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 0.05)
            rows, columns = weight.shape
            update = orthogonal(weight.grad.lerp(momentum, 0.95))
            weight.add_(update, alpha=-self.lr * max(1.0, rows / columns) ** 0.5)


def text() -> tuple[Tensor, int]:
    """The characters as numbers, and how many different ones there are."""
    letters = sorted(set(alice()))
    codes = {letter: number for number, letter in enumerate(letters)}
    return torch.tensor([codes[letter] for letter in alice()]), len(letters)


def batch_of(codes: Tensor, count: int, generator: Any) -> tuple[Tensor, Tensor]:
    """Stretches of the text, and what follows each of their characters."""
    starts = torch.randint(len(codes) - LENGTH, (count, 1), generator=generator)
    at = starts + torch.arange(LENGTH)
    return codes[at], codes[at + 1]


def train(run: Run) -> dict[str, Any]:
    """Held-out losses by step, and the seconds of the steps alone."""
    codes, letters = text()
    tenth = len(codes) // 10
    held = codes[8 * tenth : 9 * tenth] if run.trial else codes[9 * tenth :]
    judge = batch_of(held, 256, torch.Generator().manual_seed(1))
    hbp.set_seeds(run.seed)
    model = GPT(letters)
    twin = model if run.method in ("muon", "adamw") else hbp.convert(model)
    optimizer = optimizer_for(run, model, twin)
    damping = LevenbergMarquardt(optimizer) if run.method == "ratio" else None
    generator = torch.Generator().manual_seed(run.seed)
    losses, seconds = {}, 0.0
    steps = TRIAL if run.trial else STEPS[run.batch]
    for k in tqdm(range(1, steps + 1), desc=run.path.stem, ascii=True):
        inputs, targets = batch_of(codes[: 8 * tenth], run.batch, generator)
        start = time.perf_counter()
        before = step(twin, optimizer, inputs, targets, run.method != "averaged")
        if damping:
            damping.step(before, loss_of(model(inputs), targets))
        seconds += time.perf_counter() - start
        if k in LOOKS:
            with torch.no_grad():
                losses[k] = float(loss_of(model(judge[0]), judge[1]))
    return {**asdict(run), "losses": losses, "seconds": seconds / steps}


def optimizer_for(run: Run, model: GPT, twin: nn.Module) -> Any:
    if run.method == "muon":
        return Muon(model, run.setting)
    if run.method == "adamw":
        return torch.optim.AdamW(model.parameters(), run.setting)
    if run.method == "ratio":
        return hbp.CGNewton(twin.parameters(), run.setting, 1e-3, cg_maxiter=20)
    return hbp.CGNewton(
        twin.parameters(), 1.0, run.setting, cg_maxiter=20, adaptive_lr=True
    )


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, -2), targets.flatten())


def step(
    model: nn.Module, optimizer: Any, inputs: Tensor, targets: Tensor, exact: bool
) -> float:
    """One step of the optimizer; the loss before it."""
    outputs = model(inputs)
    # Exactly, every position has an output Hessian of its own.
    outputs = outputs.flatten(0, 1) if exact else outputs
    loss = loss_of(outputs, targets)
    optimizer.zero_grad()
    model.zero_grad()
    if isinstance(model, hbp.HBPModule):
        hbp.backward(model, outputs, loss, curvature="ggn", exact=exact)
    else:
        loss.backward()
    optimizer.step()
    return loss.item()


def wanted() -> list[Run]:
    """All runs, as far as they are known: those of the race after the trials."""
    runs = [Run(m, setting) for m, settings in SETTINGS.items() for setting in settings]
    for method in FINALS:
        tried = [(run, run.result()) for run in runs if run.method == method]
        done = [(r["losses"][str(TRIAL)], run) for run, r in tried if r]
        if len(done) == len(SETTINGS[method]):
            best = min(done, key=lambda pair: pair[0])[1]
            batches = list(STEPS) if method in LARGE else [64]
            runs += [
                Run(method, best.setting, seed, False, batch)
                for batch in batches
                for seed in SEEDS
            ]
    return runs


def main(methods: Collection[str] = ()) -> None:
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # The second time around, the best trials are known.
        for run in wanted():
            if run.result() is None and (not methods or run.method in methods):
                run.path.write_text(json.dumps(train(run)))
    results = [run.result() for run in wanted()]
    if None in results:
        return
    report = {"provenance": provenance("cpu"), "runs": results}
    RESULT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(f"{len(results)} runs written to {RESULT}")


if __name__ == "__main__":
    main(sys.argv[1:])
