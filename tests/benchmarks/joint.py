"""What the exchange of curvature costs before anything is sent far.

Run it as ``PYTHONPATH=tests python -m benchmarks.joint``. One process shares a batch
of tutorial 02 with itself: the layers are asked for their statistics twice, and the
messages are copied to where they come from. What a network of computers adds is on the
page about several processes, on paper.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.measure import alternate, summary
from benchmarks.steps import Newton, Step, sgd

SIZES = [3072, 1024, 512, 256, 128, 10]
SCHEMES = {
    "averaged Jacobians": (True, True),
    "averaged products of inputs": (False, True),
    "averaged products of parameters": (True, False),
    "averaged products": (False, False),
}


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for entering, leaving in pairwise(SIZES):
        layers += [nn.Linear(entering, leaving), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    """Print each step's time over that of SGD with momentum, within one run."""
    torch.manual_seed(0)
    images, labels = torch.rand(500, SIZES[0]), torch.randint(10, (500,))
    still = 1e-7  # no step leaves the point at which all are measured
    steps: dict[str, Step] = {"SGD with momentum": sgd(network(), still)}
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", store, rank=0, world_size=1)
        for name, scheme in SCHEMES.items():
            for how, group in [("alone", None), ("shared", dist.group.WORLD)]:
                step = Newton(network(), still)
                step.model.set_hbp_approximation(*scheme)
                step.process_group = group
                steps[f"{name}, {how}"] = step
        timings = summary(alternate(steps, images, labels, rounds=15, budget=60))
        dist.destroy_process_group()
    print("| scheme | alone | shared |")
    print("|---|---:|---:|")
    for name in SCHEMES:
        alone, shared = (timings[f"{name}, {how}"] for how in ("alone", "shared"))
        print(f"| {name} | {alone.times_sgd:.2f} | {shared.times_sgd:.2f} |")


if __name__ == "__main__":
    main()
