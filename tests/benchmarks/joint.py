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
from torch import Tensor, nn

from benchmarks.measure import alternate, summary
from benchmarks.steps import LOSS, Newton, Step, sgd
from hbp import output_hessian

SIZES = [3072, 1024, 512, 256, 128, 10]
SCHEMES = {
    "averaged Jacobians": (True, True),
    "averaged products of inputs": (False, True),
    "averaged products of parameters": (True, False),
    "averaged products": (False, False),
}


class Joint(Newton):
    """The step of a process that shares the batch, here with nobody."""

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        outputs = self.model(images)
        loss = LOSS(outputs, labels)
        self.optimizer.zero_grad()
        hessian = output_hessian(LOSS, outputs, labels)
        loss.backward()
        self.model.backward_hessian(
            hessian, False, "abs", process_group=dist.group.WORLD
        )
        self.optimizer.step()


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
    for name, scheme in SCHEMES.items():
        for kind, how in [(Newton, "alone"), (Joint, "shared")]:
            step = kind(network(), still)
            step.model.set_hbp_approximation(*scheme)
            steps[f"{name}, {how}"] = step
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        timings = summary(alternate(steps, images, labels, rounds=15, budget=60))
        dist.destroy_process_group()
    print("| scheme | alone | shared |")
    print("|---|---:|---:|")
    for name in SCHEMES:
        alone, shared = (timings[f"{name}, {how}"] for how in ("alone", "shared"))
        print(f"| {name} | {alone.times_sgd:.2f} | {shared.times_sgd:.2f} |")


if __name__ == "__main__":
    main()
