"""How far a reader has to walk: the package's functions in one default step.

Forward, output Hessian, backward, Hessian pass and CG step on the network of tutorial
02, mid-way through a short training. Counted by ``sys.setprofile`` are the functions of
the package that run, their calls, and how often a call goes to another file than the
one before. A comprehension belongs to the function that it stands in, as it does in
Python from 3.12 on.

Run it by ``PYTHONPATH=tests .venv/bin/python -m benchmarks.calls``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import hbp
from benchmarks.points import SIZES
from benchmarks.steps import LOSS

COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"}
BUDGET = {"functions": 120, "calls": 1000, "changes of file": 400}


@dataclass
class Walk:
    """What was called, in order."""

    root: str = field(default_factory=lambda: str(Path(hbp.__file__).parent))
    functions: set[tuple[str, str]] = field(default_factory=set)
    calls: int = 0
    changes: int = 0
    here: str = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        ours = code.co_filename.startswith(self.root)
        if event != "call" or not ours or code.co_name in COMPREHENSIONS:
            return
        self.functions.add((code.co_filename, f"{code.co_name}:{code.co_firstlineno}"))
        self.calls += 1
        self.changes += code.co_filename != self.here
        self.here = code.co_filename


def default_step() -> Walk:
    """The walk of one step; the first ones warm up what is set up once."""
    torch.manual_seed(0)
    layers: list[hbp.HBPModule] = []
    for inputs, outputs in pairwise(SIZES):
        layers += [hbp.HBPLinear(inputs, outputs), hbp.HBPSigmoid()]
    model = hbp.HBPSequential(*layers[:-1])
    images, labels = torch.rand(100, SIZES[0]), torch.randint(SIZES[-1], (100,))
    optimizer = hbp.CGNewton(
        model.parameters(), lr=0.1, alpha=0.01, cg_atol=0.0, cg_tol=0.1, cg_maxiter=50
    )
    for number in range(4):
        walk = Walk()
        sys.setprofile(walk if number == 3 else None)
        try:
            outputs = model(images)
            loss = LOSS(outputs, labels)
            optimizer.zero_grad()
            hessian = hbp.batch_summed_hessian(loss, outputs)
            loss.backward()
            model.backward_hessian(hessian, modify_2nd_order_terms="abs")
            optimizer.step()
        finally:
            sys.setprofile(None)
    return walk


def main() -> None:
    """Print the three numbers beside their budgets."""
    walk = default_step()
    found = len(walk.functions), walk.calls, walk.changes
    for (what, budget), count in zip(BUDGET.items(), found, strict=True):
        print(f"{count:6,} {what} (at most {budget:,})")


if __name__ == "__main__":
    main()
