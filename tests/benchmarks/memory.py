"""The peak memory of a step: what is allocated at once, besides the parameters.

On a GPU torch keeps the account itself. On a CPU the profiler notes every allocation
and release that torch makes, also those inside an operation.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import STILL
from benchmarks.steps import Methods, Step, contenders

# The first step makes what a method keeps: gradients, momentum, an Adam state.
STEPS = 2


def measure(
    model: nn.Module, methods: Methods, images: Tensor, labels: Tensor
) -> dict[str, object]:
    """Bytes of the parameters, and of the peak of each method beyond them."""
    peaks = {}
    for name, entry in methods.items():
        steps = contenders(model, {name: entry}, lr=STILL)
        gc.collect()
        peaks[name] = peak(steps[name], images, labels)
    parameters = sum(p.nbytes for p in model.parameters())
    return {"parameter_bytes": parameters, "peak_bytes": peaks}


def peak(step: Step, images: Tensor, labels: Tensor) -> int:
    """Bytes at the peak of two steps, beyond those allocated before them."""

    def run() -> None:
        for _ in range(STEPS):
            step(images, labels)

    return _peak_cuda(run) if images.is_cuda else _peak_cpu(run)


def _peak_cuda(task: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    task()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(task: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], number, event["args"]["Bytes"])
        for number, event in enumerate(events)
        if event["name"] == "[memory]"
    )
    level = highest = 0
    for _, _, change in changes:
        level += change
        highest = max(highest, level)
    return highest
