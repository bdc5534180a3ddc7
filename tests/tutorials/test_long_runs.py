"""Long runs: interrupted, and without growth of memory.

The trainings are those of the tutorials: their own cells, on a tiny network.
"""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest
import torch
from benchmarks import endurance
from torch import nn
from torch.utils.data import TensorDataset

import hbp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INTERRUPTS = 12


# --- The cells of a tutorial --------------------------------------------------


def cells(name: str) -> list[str]:
    """The sources of a tutorial's code cells."""
    (script,) = (ROOT / "tutorials").glob(f"{name}_*.py")
    notebook = jupytext.read(script, fmt="py:percent")
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def cell(name: str, mark: str) -> str:
    """The one that contains a mark."""
    (source,) = [source for source in cells(name) if mark in source]
    return source


def run_cells(name: str, marks: list[str], names: dict[str, Any]) -> dict[str, Any]:
    """Run the cells that contain the marks, in a namespace that starts with names."""
    for mark in marks:
        exec(compile(cell(name, mark), f"cell with {mark!r}", "exec"), names)
    return names


def images_and_labels(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 3, 4, generator=generator)
    return TensorDataset(images, torch.arange(count) % 3)


def tiny_network() -> hbp.HBPSequential:
    hbp.set_seeds(0)
    return hbp.HBPSequential(
        hbp.HBPFlatten(), hbp.HBPLinear(12, 6), hbp.HBPSigmoid(), hbp.HBPLinear(6, 3)
    )


def tutorial_02() -> dict[str, Any]:
    """What the tutorial defines for its training, with data of our own."""
    names: dict[str, Any] = {
        "num_epochs": 2,
        "batch_size": 5,
        "apart": 3,
        "train_set": images_and_labels(40, seed=1),
        "test_set": images_and_labels(20, seed=2),
        "loss_func": nn.CrossEntropyLoss(),
    }
    marks = ["import copy", "def newton_step", "class Row", "def train("]
    run_cells("02", marks, names)
    names["device"] = torch.device("cpu")
    return names


def columns(rows: list[Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """A table of the tutorial, by columns; each row has all fields."""
    assert all(row._fields == fields for row in rows)
    return {name: [getattr(row, name) for row in rows] for name in fields}


def train_02(names: dict[str, Any]) -> dict[str, Any]:
    """Train a fresh network by the tutorial's own loop; what came of it."""
    model = tiny_network()
    optimizer = hbp.CGNewton(model.parameters(), lr=0.3, alpha=0.1)
    tables = names["train"](model, names["newton_step"](model, optimizer))
    fields = names["Row"]._fields
    batches, tests = (columns(table, fields) for table in tables)
    return {"batches": batches, "tests": tests}


def tutorial_06() -> dict[str, Any]:
    train_set, test_set = images_and_labels(40, seed=1), images_and_labels(20, seed=2)
    names: dict[str, Any] = {
        "batch_size": 10,
        "device": torch.device("cpu"),
        "use_gpu": False,
        "train_images": train_set.tensors[0],
        "train_labels": train_set.tensors[1],
        "test_images": test_set.tensors[0],
        "test_labels": test_set.tensors[1],
    }
    run_cells("06", ["import pairwise", "def newton(", "def train("], names)

    def network(sizes: list[int]) -> nn.Sequential:
        hbp.set_seeds(0)
        layers = [nn.Linear(*sizes), nn.Sigmoid(), nn.Linear(sizes[1], 3)]
        return nn.Sequential(nn.Flatten(), *layers)

    names["network"] = network
    return names


def train_06(names: dict[str, Any]) -> dict[str, Any]:
    starts = {
        "HBP": lambda model: names["newton"](model, lr=0.3, alpha=0.1),
        "Adam": names["adam"],
        "SGD": names["sgd"],
    }
    return names["race"]([12, 5], starts, epochs=2, decay=0.8)


def is_start(part: Any, whole: Any) -> bool:
    """Whether columns are those of the whole, as far as they go; seconds may differ."""
    if isinstance(whole, dict):
        return part.keys() == whole.keys() and all(
            is_start(part[k], whole[k]) for k in whole if k != "seconds"
        )
    return part == whole[: len(part)]


def rows(outcome: Any) -> Any:
    """How many rows each table has: all columns of a table are of one length."""
    if any(isinstance(value, dict) for value in outcome.values()):
        return {key: rows(table) for key, table in outcome.items()}
    (length,) = {len(column) for column in outcome.values()}
    return length


# --- Interrupted --------------------------------------------------------------


class Interruption:
    """Raises KeyboardInterrupt at one of the lines that run inside a try block.

    Args:
        source: A cell with one try block.
        function: The function that has it.
        moment: At which line, from 1, of whatever runs while the block does.
    """

    def __init__(self, source: str, function: Any, moment: int = sys.maxsize) -> None:
        self.code, self.moment, self.count = function.__code__, moment, 0
        (block,) = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Try)]
        end = block.body[-1].end_lineno
        assert end is not None
        self.lines, self.inside = range(block.body[0].lineno, end + 1), False

    def __enter__(self) -> Interruption:
        self.before = sys.gettrace()  # Coverage may be watching.
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: Any, event: str, _: object) -> Any:
        if event == "line":
            if frame.f_code is self.code:
                self.inside = frame.f_lineno in self.lines
            self.count += self.inside
            if self.count == self.moment:
                raise KeyboardInterrupt
        return self._trace


def plot_02(names: dict[str, Any], outcome: dict[str, Any]) -> None:
    """Run the cells that draw, some with what there is and some with nothing."""
    batches, tests = (
        [names["Row"](*row) for row in zip(*table.values(), strict=True)]
        for table in (outcome["batches"], outcome["tests"])
    )
    names["hbp_batches"], names["hbp_tests"] = batches, tests
    names["sgd_batches"], names["sgd_tests"] = [], []
    names["adam_batches"], names["adam_tests"] = batches, tests
    run_cells("02", ["batch_rows = {", "def final("], names)


def plot_06(names: dict[str, Any], outcome: dict[str, Any]) -> None:
    names["shallow_logs"] = names["deep_logs"] = outcome
    run_cells("06", ["draw(shallow_logs)", "draw(deep_logs)"], names)


TUTORIALS = {
    "02": (tutorial_02, train_02, plot_02, "train"),
    "06": (tutorial_06, train_06, plot_06, "race"),
}


@pytest.mark.parametrize("name", TUTORIALS)
def test_interrupted_at_any_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics so far are kept, and can be plotted."""
    setup, train, plot, function = TUTORIALS[name]
    names, source = setup(), cell(name, "def train(")
    expected = train(names)
    with Interruption(source, names[function]) as whole:
        train(names)
    between = INTERRUPTS // len(TUTORIALS) - 2
    some = [random.Random(k).randrange(2, whole.count) for k in range(between)]
    moments = [1, *some, whole.count]
    capsys.readouterr()
    seen = []
    for moment in moments:
        with Interruption(source, names[function], moment):
            partial = train(names)
        assert "Interrupted. The metrics so far are kept." in capsys.readouterr().out
        assert is_start(partial, expected)
        if (shape := rows(partial)) not in seen:
            seen.append(shape)
            plot(names, partial)  # Drawing is done here, and not when it is shown.
    assert len(seen) >= 3
    assert seen[0] != rows(expected)


def test_the_signal_of_ctrl_c_is_caught() -> None:
    names = tutorial_02()
    test_scores = names["test_scores"]

    def interrupted(*arguments: Any) -> tuple[float, float]:
        signal.raise_signal(signal.SIGINT)
        return test_scores(*arguments)

    names["test_scores"] = interrupted
    # A shell starts what is to run in the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert rows(train_02(names)) == {"batches": 3, "tests": 0}
    finally:
        signal.signal(signal.SIGINT, before)


# --- Without growth -----------------------------------------------------------


@pytest.mark.slow
def test_memory_in_a_process_of_its_own() -> None:
    """All tests of tests/alone, where nothing else is in memory."""
    path = os.pathsep.join(sys.path)  # with those that pytest added
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    folder, options = HERE / "alone", ["-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, folder / "test_memory.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    # One for each way to compute a step, and five besides.
    assert f"{len(endurance.WAYS) + 5} passed" in done.stdout
