"""Memory over 10,000 steps: it must not grow.

    PYTHONPATH=tests python -m benchmarks.endurance [--steps 10000]

It takes some minutes.

A small network with a convolution and a residual connection is trained with one way of
computing steps after another. After 100 steps, and each time there are ten times as
many, it says how much memory the process has, and how many tensors and other objects
Python keeps track of. A cheap test watches the same over fewer steps.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import dataclass, fields
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hbp import (
    CGNewton,
    HBPConv2d,
    HBPFlatten,
    HBPLinear,
    HBPMaxPool2d,
    HBPResidual,
    HBPSequential,
    HBPSigmoid,
    HBPTanh,
    LevenbergMarquardt,
    batch_summed_hessian,
    per_sample_hessian,
    set_seeds,
)

LOSS = nn.CrossEntropyLoss()
BATCH = 16


@dataclass(frozen=True)
class Way:
    """One way to compute a step.

    Args:
        exact: Whether every sample keeps its curvature.
        treatment: Of second-order terms.
        average_input: As in ``set_hbp_approximation``.
        average_parameter: The same.
        sub_blocks: As in ``set_hbp_blocks``.
        trust_radius: As in ``CGNewton``.
        solver: The same.
    """

    exact: bool = False
    treatment: str = "abs"
    average_input: bool = True
    average_parameter: bool = True
    sub_blocks: int = 1
    trust_radius: float | None = None
    solver: str = "cg"

    def __str__(self) -> str:
        """What differs from the defaults."""
        changed = [
            f"{field.name}={value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return ", ".join(changed) or "defaults"


WAYS = [
    Way(),
    Way(exact=True, treatment="none", trust_radius=0.1),
    Way(average_input=False, treatment="clip"),
    Way(average_parameter=False, treatment="zero"),
    Way(sub_blocks=2),
    Way(exact=True, treatment="zero"),
    Way(trust_radius=0.1, treatment="none"),
    Way(sub_blocks=2, solver="direct"),
    Way(solver="direct"),
]


def network() -> HBPSequential:
    """Convolution, pooling, residual connection and linear layers, for 8 × 8 pixels."""
    set_seeds(0)
    return HBPSequential(
        HBPConv2d(1, 4, 3),
        HBPTanh(),
        HBPMaxPool2d(2),
        HBPFlatten(),
        HBPLinear(36, 8),
        HBPSigmoid(),
        HBPResidual(HBPSequential(HBPLinear(8, 8), HBPTanh())),
        HBPLinear(8, 3),
    )


class Training:
    """A network, its optimizer, and as many steps as are asked for."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = CGNewton(
            self.model.parameters(), lr=0.05, alpha=0.3, cg_tol=0.1, cg_maxiter=5
        )
        self.damping = LevenbergMarquardt(self.optimizer, min_alpha=0.1)
        self.images = torch.rand(10 * BATCH, 1, 8, 8)
        self.labels = torch.arange(10 * BATCH) % 3
        self.ways = cycle(WAYS)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Some images and their labels."""
        index = torch.randint(len(self.images), (BATCH,))
        return self.images[index], self.labels[index]

    def choose(self, way: Way) -> None:
        """Let the next step be computed in this way."""
        self.model.set_hbp_approximation(way.average_input, way.average_parameter)
        self.model.set_hbp_blocks(way.sub_blocks)
        (group,) = self.optimizer.param_groups
        group.update(trust_radius=way.trust_radius, solver=way.solver)

    def step(self, way: Way, images: Tensor, labels: Tensor) -> float:
        """Forward, back, curvature back, and the step; the loss before it."""
        self.choose(way)
        outputs = self.model(images)
        loss = LOSS(outputs, labels)
        self.optimizer.zero_grad()
        hessian = per_sample_hessian if way.exact else batch_summed_hessian
        output_hessian = hessian(loss, outputs)
        loss.backward()
        self.model.backward_hessian(
            output_hessian, modify_2nd_order_terms=way.treatment
        )
        self.optimizer.step()
        with torch.no_grad():
            self.damping.step(loss, LOSS(self.model(images), labels))
        return loss.item()

    def run(self, steps: int) -> None:
        """Take so many steps, each in the next of the ways."""
        for _ in range(steps):
            self.step(next(self.ways), *self.batch())


class Census(NamedTuple):
    """What there is at some moment.

    Attributes:
        tensors: Live tensors that Python knows of.
        tensor_bytes: What their storages hold.
        objects: All objects that Python's collector keeps track of.
        resident: Bytes of memory of the process.
    """

    tensors: int
    tensor_bytes: int
    objects: int
    resident: int


def census() -> Census:
    """Count what is left after a collection."""
    gc.collect()
    resident = _resident()
    objects = gc.get_objects()
    # Not isinstance: it asks objects for their class, and some warn when asked. Other
    # classes, and tensors that are not dense, belong to others in this process.
    tensors = [thing for thing in objects if type(thing) in (Tensor, nn.Parameter)]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    size = sum(storage.nbytes() for storage in storages.values())
    return Census(len(tensors), size, len(objects), resident)


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Train, and say what there is on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    training, done, wanted = Training(), 0, 100
    print("| steps | memory, MiB | tensors | their bytes | objects of Python |")
    print("|---:|---:|---:|---:|---:|")
    while done < steps:
        training.run(min(wanted, steps) - done)
        done = min(wanted, steps)
        now = census()
        print(
            f"| {done:,} | {now.resident / 2**20:.1f} | {now.tensors} "
            f"| {now.tensor_bytes:,} | {now.objects:,} |",
            flush=True,
        )
        wanted *= 10


if __name__ == "__main__":
    main()
