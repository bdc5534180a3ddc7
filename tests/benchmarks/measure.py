"""Timing in alternation, and where and when the numbers were made."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks.steps import Step

# A learning rate at which no method leaves the point where it is measured.
STILL = 1e-7
WARMUP, FEWEST = 2, 3
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["torch", "hbp", "backpack-for-pytorch", "curvlinops-for-pytorch"]


def now(device: str) -> float:
    """The time in seconds, once the device has done what it was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """``with Stopwatch(device) as watch: ...``, and then ``watch.seconds``."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self.start = now(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = now(self.device) - self.start


def alternate(
    steps: Mapping[str, Step],
    images: Tensor,
    labels: Tensor,
    rounds: int,
    budget: float,
) -> dict[str, list[float]]:
    """Seconds of each step, round by round, without those of the warm-up.

    All methods step in turn, so that a machine that slows down slows them alike.

    Args:
        steps: What to time. The first takes part in every round.
        images: The batch.
        labels: The batch.
        rounds: How often, at most.
        budget: Seconds after which a method but the first takes part no longer, once
            it has ``FEWEST`` rounds to show.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    baseline = next(iter(steps))
    for number in range(WARMUP + rounds):
        for name, step in steps.items():
            within_budget = sum(seconds[name]) < budget
            if name == baseline or number < WARMUP + FEWEST or within_budget:
                with Stopwatch(images.device.type) as watch:
                    step(images, labels)
                seconds[name].append(watch.seconds)
    return {name: times[WARMUP:] for name, times in seconds.items()}


@dataclass(frozen=True)
class Timing:
    """How long a step takes.

    Args:
        seconds: The median.
        times_sgd: The median ratio to the first method, within a round.
        quartiles: Those of that ratio, the lower and the upper.
        rounds: How often it was timed.
    """

    seconds: float
    times_sgd: float
    quartiles: tuple[float, float]
    rounds: int


def summary(seconds: Mapping[str, list[float]]) -> dict[str, Timing]:
    """The timing of each method; the first is what the others are compared with."""
    baseline = next(iter(seconds.values()))
    timings = {}
    for name, times in seconds.items():
        # A method that ran out of its budget has fewer rounds than the first.
        ratios = [t / b for t, b in zip(times, baseline, strict=False)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        timings[name] = Timing(median(times), middle, (low, high), len(times))
    return timings


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Whether float32 products on a GPU may round their factors to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def provenance(device: str) -> dict[str, object]:
    """Where and when the numbers were made, and with what."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "src", "tests")),
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
