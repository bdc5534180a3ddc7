"""What a second-order step costs, as a multiple of a step of SGD with momentum.

The network, batch and settings are those of tutorial 02. All methods step in turn
within one process, each on its own copy of the model, so that a machine that slows
down slows them alike. Run it by ``make bench``; it prints a table and writes
``build/benchmarks/step.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from hbp import CGNewton, convert, output_hessian, set_seeds

LOSS = nn.CrossEntropyLoss()
SIZES = [3072, 1024, 512, 256, 128, 10]
BATCH = 500
Step = Callable[[Tensor, Tensor], object]


def network() -> nn.Sequential:
    """Tutorial 02's network: sigmoids between fully-connected layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def first_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(images: Tensor, labels: Tensor) -> None:
        loss = LOSS(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def second_order(model: nn.Module, solver: str, **scheme: bool) -> Step:
    twin = convert(model)
    twin.set_hbp_approximation(**scheme)
    optimizer = CGNewton(
        twin.parameters(),
        lr=0.15,
        alpha=0.02,
        cg_atol=0.0,
        cg_tol=0.1,
        cg_maxiter=50,
        solver=solver,
    )

    def step(images: Tensor, labels: Tensor) -> None:
        outputs = twin(images)
        loss = LOSS(outputs, labels)
        optimizer.zero_grad()
        hessian = output_hessian(LOSS, outputs, labels)
        loss.backward()
        twin.backward_hessian(hessian, modify_2nd_order_terms="abs")
        optimizer.step()

    return step


def contenders(model: nn.Module) -> dict[str, Step]:
    """The methods by name, the baseline first; each gets its own copy of the model."""

    def own() -> nn.Module:
        return copy.deepcopy(model)

    sgd, adam = own(), own()
    return {
        "SGD, momentum": first_order(
            sgd, torch.optim.SGD(sgd.parameters(), lr=0.1, momentum=0.9)
        ),
        "Adam": first_order(adam, torch.optim.Adam(adam.parameters(), lr=1e-3)),
        "hbp, cg": second_order(own(), "cg"),
        "hbp, direct": second_order(own(), "direct"),
        "hbp, cg, E[φ'φ'ᵀ]": second_order(own(), "cg", average_input_jacobian=False),
        "hbp, cg, E[xxᵀ]": second_order(own(), "cg", average_parameter_jacobian=False),
    }


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, round by round; the first two rounds warm up."""
    images = torch.rand(BATCH, 3, 32, 32, device=device)
    labels = torch.randint(10, (BATCH,), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step(images, labels)
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def provenance(device: str) -> dict[str, object]:
    """Where and when the numbers were made."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/step.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_seeds(0)
    seconds = measure(contenders(network().to(device)), args.rounds, device)
    baseline = next(iter(seconds.values()))
    results = {}
    for name, times in seconds.items():
        ratio = median(t / b for t, b in zip(times, baseline, strict=True))
        results[name] = {"median_seconds": median(times), "times_sgd": ratio}
        print(f"{name:20} {1e3 * median(times):8.1f} ms   {ratio:6.2f} x SGD")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {**provenance(device), "rounds": args.rounds, "results": results}
    args.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
