"""Run every benchmark and write one JSON file; ``make bench`` calls this.

On a GPU everything is run twice, without and with TF32, in two sections.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import convolution, growth, memory, peers, points, stages, table
from benchmarks.measure import ROOT, STILL, precision, provenance
from benchmarks.steps import ALPHA, CG_MAXITER, CG_TOL, OWN, Newton
from hbp import set_seeds

RESULTS = ROOT / "docs" / "assets" / "benchmarks"


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        rounds: Of the table and of the stages.
        budget: Seconds for each method of the table at each point.
        growth_rounds: Of each shape.
        growth_budget: Seconds for each method at each shape.
        repeats: Attempts at the ceilings.
        stream: Numbers in an array that is streamed.
    """

    rounds: int
    budget: float
    growth_rounds: int
    growth_budget: float
    repeats: int
    stream: int


FULL = Plan(15, 15.0, 5, 3.0, 10, 2**26)
QUICK = Plan(3, 0.0, 2, 0.0, 2, 2**12)


@dataclass(frozen=True)
class Problem:
    """A batch, what it is, and the points: models, or the reason why there is none."""

    sizes: list[int]
    images: Tensor
    labels: Tensor
    data: str
    models: dict[str, nn.Module | str]


def full_problem(device: str) -> Problem:
    images, labels, data = points.batch()
    models: dict[str, nn.Module | str] = {"initialisation": points.initial().to(device)}
    if points.have_cifar10():
        models["mid-training"] = points.mid_training(device)
    else:
        models["mid-training"] = "the official CIFAR-10 is not here"
    return Problem(points.SIZES, images.to(device), labels.to(device), data, models)


def quick_problem(device: str) -> Problem:
    sizes = [12, 8, 6, 4]
    set_seeds(0)
    images, labels = points.random_batch(10, sizes[0], sizes[-1])
    models: dict[str, nn.Module | str] = {
        "initialisation": points.network(sizes).to(device),
        "mid-training": "a quick run does not train",
    }
    data = "uniform random numbers"
    return Problem(sizes, images.to(device), labels.to(device), data, models)


def run(device: str, quick: bool) -> dict[str, object]:
    """All sections."""
    problem = quick_problem(device) if quick else full_problem(device)
    plan = QUICK if quick else FULL
    shapes = growth.QUICK if quick else growth.RANGES[device]
    report: dict[str, object] = {
        "provenance": provenance(device),
        "skipped": peers.skipped(),
        "settings": {
            "sizes": problem.sizes,
            "batch": len(problem.labels),
            "data": problem.data,
            "alpha": ALPHA,
            "cg_tol": CG_TOL,
            "cg_maxiter": CG_MAXITER,
            "lr": STILL,
            "quick": quick,
        },
    }
    for tf32 in [False, True] if device == "cuda" else [False]:
        with precision(tf32):
            report["tf32" if tf32 else "float32"] = section(
                problem, plan, shapes, device
            )
    return report


def section(
    problem: Problem, plan: Plan, shapes: growth.Range, device: str
) -> dict[str, object]:
    """Everything at one precision."""
    images, labels, sizes = problem.images, problem.labels, problem.sizes
    methods = OWN | peers.available()
    steps: dict[str, object] = {}
    parts: dict[str, object] = {}
    for point, model in problem.models.items():
        if isinstance(model, str):
            steps[point] = parts[point] = {"skipped": model}
            continue
        print(f"{point}: steps, ms and multiples of SGD's", flush=True)
        measured = table.measure(
            model, methods, images, labels, plan.rounds, plan.budget
        )
        for name, result in measured.methods.items():
            print(f"{name:28}{1e3 * result.seconds:9.1f}{result.times_sgd:8.2f}")
        steps[point] = asdict(measured)
        newtons = {
            "hbp, cg": Newton(copy.deepcopy(model), STILL),
            "hbp, direct": Newton(copy.deepcopy(model), STILL, "direct"),
        }
        print(f"{point}: stages", flush=True)
        parts[point] = {
            name: stages.measure(step, sizes, images, labels, plan.rounds)
            for name, step in newtons.items()
        }
    print("ceilings, memory, growth, convolutions", flush=True)
    start = problem.models["initialisation"]
    assert isinstance(start, nn.Module)
    return {
        "steps": steps,
        "stages": parts,
        "ceilings": stages.ceilings(
            sizes, len(labels), device, plan.repeats, plan.stream
        ),
        "memory": memory.measure(start, methods, images, labels),
        "growth": growth.measure(
            shapes, device, plan.growth_rounds, plan.growth_budget
        ),
        "convolution": convolution.measure(
            device, plan.rounds, plan.budget, quick=plan is QUICK
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="a folder")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # A rehearsal must not overwrite the numbers that the documentation shows.
    folder = options.out or (
        ROOT / "build" / "benchmarks" if options.quick else RESULTS
    )
    # BackPACK hooks every layer, also the first, which has nothing to send back.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    report = run(device, options.quick)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device}.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
