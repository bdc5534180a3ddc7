"""The stages of hbp's step, next to what this machine can do.

Two ceilings are measured: how fast it multiplies matrices of the step's own shapes,
and how fast it streams large arrays. Counted work over these is a floor for each
stage; the gap is how far above it the stage stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import WARMUP, Stopwatch, now
from benchmarks.steps import LOSS, Newton
from benchmarks.work import newton
from hbp import CGNewton, output_hessian
from hbp.core import newton as newton_step
from hbp.optim import StepInfo


def measure(
    step: Newton, sizes: Sequence[int], images: Tensor, labels: Tensor, rounds: int
) -> dict[str, object]:
    """Median seconds of each stage at one point, and its counted work."""
    step(images, labels)
    products = step.products()
    runs = [stages(step, images, labels) for _ in range(WARMUP + rounds)][WARMUP:]
    work = newton(sizes, len(labels), step.solver, products)
    return {
        "products": products,
        "stages": {
            name: {
                "seconds": median(run[name] for run in runs),
                "flops": work[name].flops,
                "bytes": work[name].bytes,
            }
            for name in work
        },
    }


def stages(step: Newton, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Take one step, and return the seconds of each stage."""
    watches = {}

    def watch(name: str) -> Stopwatch:
        watches[name] = Stopwatch(images.device.type)
        return watches[name]

    model, optimizer = step.model, step.optimizer
    with watch("forward"):
        outputs = model(images)
        loss = LOSS(outputs, labels)
    with watch("output Hessian"):
        hessian = output_hessian(LOSS, outputs, labels)
    with watch("backward"):
        optimizer.zero_grad()
        loss.backward()
    with watch("Hessian backpropagation"):
        model.backward_hessian(hessian, modify_2nd_order_terms="abs")
    seconds = {name: stopped.seconds for name, stopped in watches.items()}
    seconds["solve"], seconds["update"] = solve_and_update(
        optimizer, images.device.type
    )
    return seconds


def solve_and_update(optimizer: CGNewton, device: str) -> tuple[float, float]:
    """Seconds of ``optimizer.step()`` before the first weight moves, and after."""
    turn: list[float] = []
    checked = newton_step._Step.checked

    def note_the_first(step: newton_step._Step) -> StepInfo:
        if not turn:  # All systems are solved before any step is looked at.
            turn.append(now(device))
        return checked(step)

    with patch.object(newton_step._Step, "checked", note_the_first):
        start = now(device)
        optimizer.step()
        end = now(device)
    return turn[0] - start, end - turn[0]


def ceilings(
    sizes: Sequence[int], batch: int, device: str, repeats: int, stream: int
) -> dict[str, object]:
    """What the machine reaches, in the best of some attempts.

    Args:
        sizes: Features, from the input to the classes.
        batch: Samples.
        device: Where.
        repeats: Attempts.
        stream: Numbers in each of three arrays; together they should fit in no cache.
    """
    by_layer, flops, seconds = [], 0.0, 0.0
    for inputs, outputs in pairwise(sizes):
        x = torch.rand(batch, inputs, device=device)
        weight = torch.rand(outputs, inputs, device=device)
        delta = torch.rand(batch, outputs, device=device)
        layer_flops = 3 * 2.0 * batch * inputs * outputs
        layer_seconds = sum(
            _best(product, device, repeats)
            for product in (
                lambda x=x, weight=weight: x @ weight.T,
                lambda x=x, delta=delta: delta.T @ x,
                lambda delta=delta, weight=weight: delta @ weight,
            )
        )
        by_layer.append(layer_flops / layer_seconds)
        flops += layer_flops
        seconds += layer_seconds
    a, b = torch.rand(stream, device=device), torch.rand(stream, device=device)
    c = torch.empty_like(a)
    streaming = _best(lambda: torch.add(a, b, out=c), device, repeats)
    return {
        "flops_per_second": flops / seconds,
        "flops_per_second_by_layer": by_layer,
        "bytes_per_second": 3 * a.nbytes / streaming,
    }


def _best(task: Callable[[], object], device: str, repeats: int) -> float:
    seconds = []
    for _ in range(WARMUP + repeats):
        with Stopwatch(device) as watch:
            task()
        seconds.append(watch.seconds)
    return min(seconds)
