"""Long runs: killed and gone on with, interrupted, and without growth of memory.

The trainings are those of the tutorials: their own cells, on a tiny network.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import pytest
import torch
from benchmarks import endurance
from torch import nn
from torch.utils.data import TensorDataset

import hbp
from hbp import checkpoint

TESTS = Path(__file__).resolve().parent
KILLS = 20
INTERRUPTS = 12
EPOCHS = 5
Kill = dict[str, Any]


# --- The cells of a tutorial --------------------------------------------------


def cells(name: str) -> list[str]:
    """The sources of a tutorial's code cells."""
    (script,) = (TESTS.parent / "tutorials").glob(f"{name}_*.py")
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
    """Dropout draws from the global random numbers: they have to go on, too."""
    hbp.set_seeds(0)
    return hbp.HBPSequential(
        hbp.HBPFlatten(),
        hbp.HBPLinear(12, 6),
        hbp.HBPSigmoid(),
        hbp.HBPDropout(0.2),
        hbp.HBPLinear(6, 3),
    )


def tutorial_02(epochs: int = 2) -> dict[str, Any]:
    """What the tutorial defines for its training, with data of our own."""
    names: dict[str, Any] = {
        "os": os,
        "num_epochs": epochs,
        "batch_size": 5,
        "train_set": images_and_labels(40, seed=1),
        "test_set": images_and_labels(20, seed=2),
        "loss_func": nn.CrossEntropyLoss(),
    }
    steps = ["def newton_step", "def first_order_step"]
    run_cells("02", ["import copy", *steps, "def train("], names)
    names["device"] = torch.device("cpu")
    return names


def train_02(names: dict[str, Any], kind: str = "HBP") -> dict[str, Any]:
    """Train a fresh network by the tutorial's own loop; what came of it."""
    model = tiny_network()
    schedule = None
    if kind == "HBP":
        optimizer: Any = hbp.CGNewton(model.parameters(), lr=0.3, alpha=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = names["newton_step"](model, optimizer)
    else:
        options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 1e-2}}[kind]
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
        step = names["first_order_step"](model, optimizer)
    batches, tests = names["train"](kind, model, optimizer, step, 3, schedule=schedule)
    return {"weights": bits(model), "batches": batches, "tests": tests}


def tutorial_06() -> dict[str, Any]:
    train_set, test_set = images_and_labels(40, seed=1), images_and_labels(20, seed=2)
    names: dict[str, Any] = {
        "os": os,
        "batch_size": 10,
        "device": torch.device("cpu"),
        "use_gpu": False,
        "train_images": train_set.tensors[0],
        "train_labels": train_set.tensors[1],
        "test_images": test_set.tensors[0],
        "test_labels": test_set.tensors[1],
    }
    run_cells("06", ["import pairwise", "def newton(", "def train("], names)
    models = names["models"] = []

    def network(sizes: list[int]) -> nn.Sequential:
        hbp.set_seeds(0)
        layers = [nn.Linear(*sizes), nn.Sigmoid(), nn.Linear(sizes[1], 3)]
        models.append(nn.Sequential(nn.Flatten(), *layers))
        return models[-1]

    names["network"] = network
    return names


def train_06(names: dict[str, Any]) -> dict[str, Any]:
    names["models"].clear()
    starts = {
        "HBP": lambda model: names["newton"](model, lr=0.3, alpha=0.1),
        "Adam": lambda model: names["adam"](model, lr=1e-2),
        "SGD": lambda model: names["sgd"](model, lr=0.1),
    }
    logs = names["race"]("tiny", [12, 5], starts, epochs=2, decay=0.8)
    return {"weights": [bits(model) for model in names["models"]], "logs": logs}


def bits(model: nn.Module) -> list[str]:
    return [p.detach().numpy().tobytes().hex() for p in model.parameters()]


def without_clocks(outcome: Any) -> Any:
    """Seconds differ from run to run; nothing else may."""
    if isinstance(outcome, dict):
        return {k: without_clocks(v) for k, v in outcome.items() if k != "seconds"}
    return outcome


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HBP_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


# --- Killed -------------------------------------------------------------------


def rehearse(folder: Path) -> None:
    """Kill a training 20 times and go on; write what happened to a file.

    Every training is a fork of this process, which has imported torch already.
    """
    torch.set_num_threads(1)
    names = tutorial_02(EPOCHS)
    os.environ.pop("HBP_CHECKPOINTS", None)
    expected = without_clocks(train_02(names))
    start = time.perf_counter()
    train_02(names)
    scale = {"delay": (time.perf_counter() - start) / EPOCHS}
    os.environ["HBP_CHECKPOINTS"] = str(folder)
    file, result = folder / "02_HBP.pt", folder / "result.json"
    with Profile() as profile:
        train_02(names)
    scale |= {"event": profile.count / EPOCHS, "byte": file.stat().st_size}
    file.unlink()

    rng = random.Random(0)
    report: dict[str, Any] = {"kills": [], "epochs": [], "partial": 0, "ends": []}
    while True:
        kill = next_kill(len(report["kills"]), scale, rng)
        if died(lambda: result.write_text(json.dumps(train_02(names))), kill):
            report["kills"].append(kill["kind"])
            report["partial"] += sum(f.stat().st_size > 0 for f in folder.glob("*.new"))
            epochs = 0
            if file.exists():  # and it is complete
                epochs = len(checkpoint.load(file)["progress"]["tests"])
            report["epochs"].append(epochs)
            continue
        end = without_clocks(json.loads(result.read_text()))
        report["ends"].append(end == expected)
        if kill["kind"] == "none":
            break
        file.unlink()  # Ended before it was killed: from the start, once more.
    report["files"] = sorted(path.name for path in folder.iterdir())
    (folder / "report.json").write_text(json.dumps(report))


def next_kill(number: int, scale: dict[str, float], rng: random.Random) -> Kill:
    """When to kill next: at random in the training, and at random in the saving."""
    if number == KILLS:
        return {"kind": "none"}
    kind = ["delay", "event", "byte", "call"][number % 4]
    kill: Kill = {"kind": kind, "epoch": rng.choice([1, 2])}
    if kind == "call":
        kill |= {"name": rng.choice(["fsync", "replace"]), "after": rng.random() < 0.5}
    elif kind == "byte":
        kill["at"] = rng.randrange(1, int(scale["byte"]))
    else:
        kill["at"] = rng.uniform(0, 1.5 * scale[kind])
    return kill


def died(task: Callable[[], object], kill: Kill) -> bool:
    """Run a task in a process of its own; whether it was killed before it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(kill)
            task()
            code = 0
        finally:
            sys.setprofile(None)
            os._exit(code)
    if kill["kind"] == "delay":
        time.sleep(kill["at"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the training failed by itself"
    return False


def arm(kill: Kill) -> None:
    """Let this process kill itself at some moment."""
    if kill["kind"] == "event":
        Profile(limit=int(kill["at"])).__enter__()
    elif kill["kind"] == "byte":
        saves = itertools.count(1)

        def fatal_open(path: Path, mode: str) -> io.FileIO:
            if mode == "xb" and next(saves) == kill["epoch"]:
                return Fatal(path, mode, kill["at"])
            return io.FileIO(path, mode)

        checkpoint.open = fatal_open  # In place of the built-in one.
    elif kill["kind"] == "call":
        function, calls = getattr(os, kill["name"]), itertools.count(1)

        def fatal(*arguments: Any) -> None:
            now = next(calls) == kill["epoch"]
            if not now or kill["after"]:
                function(*arguments)
            if now:
                die()

        setattr(os, kill["name"], fatal)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Profile:
    """Counts calls and returns, of Python and of C; kills at the limit."""

    def __init__(self, limit: int = sys.maxsize) -> None:
        self.count, self.limit = 0, limit

    def __enter__(self) -> Profile:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, *_: object) -> None:
        self.count += 1
        if self.count >= self.limit:
            die()


class Fatal(io.FileIO):
    """A file that kills the process once so many bytes were written."""

    def __init__(self, path: Path, mode: str, limit: int) -> None:
        super().__init__(path, mode)
        self.left = limit

    def write(self, data: Any) -> int:
        if len(data) < self.left:
            self.left -= len(data)
            return super().write(data) or 0
        super().write(bytes(data)[: self.left])
        die()
        return 0


def test_killed_trainings_go_on_to_the_same_result(tmp_path: Path) -> None:
    code = f"import test_long_runs as t; t.rehearse(t.Path({str(tmp_path)!r}))"
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == ["delay", "event", "byte", "call"] * (KILLS // 4)
    assert all(report["ends"])
    # They went on, and were not just started again: from various epochs.
    assert {1, 2, 3} <= set(report["epochs"])
    # Some kills hit a half-written file. It never was the checkpoint, and it is gone.
    assert report["partial"] >= KILLS // 4
    assert report["files"] == ["02_HBP.pt", "result.json"]


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
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

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
    logs = outcome["batches"], outcome["tests"]
    nothing = tuple({key: [] for key in log} for log in logs)
    names["hbp_batches"], names["hbp_tests"] = logs
    names["sgd_batches"], names["sgd_tests"] = nothing
    names["adam_batches"], names["adam_tests"] = names["fast_batches"], _ = logs
    names["fast_tests"] = outcome["tests"]
    marks = ['epochs = hbp_batches["epochs"]', "runs = {", "def last_epochs", "pair = "]
    run_cells("02", marks, names)


def plot_06(names: dict[str, Any], outcome: dict[str, Any]) -> None:
    names["shallow_logs"] = names["deep_logs"] = outcome["logs"]
    run_cells("06", ["draw(shallow_logs)", "draw(deep_logs)"], names)


def lengths(outcome: Any) -> Any:
    """How many values each column has."""
    if isinstance(outcome, dict):
        return {key: lengths(value) for key, value in outcome.items()}
    return len(outcome)


TUTORIALS = {
    "02": (tutorial_02, train_02, plot_02, "train"),
    "06": (tutorial_06, train_06, plot_06, "race"),
}


@pytest.mark.parametrize("name", TUTORIALS)
def test_interrupted_at_any_line(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metrics so far are kept and can be plotted, and the training goes on."""
    setup, train, plot, function = TUTORIALS[name]
    names, source = setup(), cell(name, "def train(")
    expected = without_clocks(train(names))
    shutil.rmtree(folder)
    with Interruption(source, names[function]) as whole:
        train(names)
    between = INTERRUPTS // len(TUTORIALS) - 2
    some = [random.Random(k).randrange(2, whole.count) for k in range(between)]
    moments = [1, *some, whole.count]
    capsys.readouterr()
    seen = []
    for moment in moments:
        shutil.rmtree(folder, ignore_errors=True)
        with Interruption(source, names[function], moment):
            partial = train(names)
        assert "Interrupted. The metrics so far are kept." in capsys.readouterr().out
        if (shape := lengths(partial)) not in seen:
            seen.append(shape)
            plot(names, partial)  # Drawing is done here, and not when it is shown.
        assert without_clocks(train(names)) == expected
        assert not list(folder.glob("*.new"))
    assert len(seen) >= 3


def test_the_signal_of_ctrl_c_is_caught(folder: Path) -> None:
    names = tutorial_02()
    accuracy_on = names["accuracy_on"]

    def interrupted(*arguments: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return accuracy_on(*arguments)

    names["accuracy_on"] = interrupted
    outcome = train_02(names)
    assert lengths(outcome["batches"]) == dict.fromkeys(outcome["batches"], 1)
    assert lengths(outcome["tests"]) == dict.fromkeys(outcome["tests"], 0)
    assert not folder.exists()


# --- Other ways to stop and go on ---------------------------------------------


@pytest.mark.parametrize("kind", ["HBP", "SGD", "Adam"])
def test_goes_on_with_every_optimizer(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = without_clocks(train_02(names := tutorial_02(3), kind))
    (file,) = folder.iterdir()
    assert file.name == f"02_{kind}.pt"
    file.unlink()
    accuracy_on, calls = names["accuracy_on"], itertools.count(1)

    def interrupted(*arguments: Any) -> float:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return accuracy_on(*arguments)

    names["accuracy_on"] = interrupted
    assert len(train_02(names, kind)["tests"]["epochs"]) == 1
    capsys.readouterr()
    assert without_clocks(train_02(names, kind)) == expected
    assert f"{kind} goes on after epoch 1/3." in capsys.readouterr().out
    # Once more, and there is nothing left to do.
    assert without_clocks(train_02(names, kind)) == expected
    assert f"{kind} goes on after epoch 3/3." in capsys.readouterr().out


@pytest.mark.parametrize("name", TUTORIALS)
def test_without_a_folder_nothing_is_written_or_read(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, train, _, _ = TUTORIALS[name]
    names = setup()
    expected = without_clocks(train(names))
    files = sorted(folder.iterdir())
    assert len(files) == {"02": 1, "06": 3}[name]
    for file in files:
        file.write_text("not to be read")
    monkeypatch.delenv("HBP_CHECKPOINTS")
    assert without_clocks(train(names)) == expected
    assert {file.read_text() for file in folder.iterdir()} == {"not to be read"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 9}, "epochs was 2, is 9"),
        ({"batch_size": 4}, "batch size was 5, is 4"),
        ({"data": 2 * (images_and_labels(30, 1),)}, "images was 40, is 30"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], message: str, folder: Path
) -> None:
    names = tutorial_02()
    train_02(names)
    (file,) = folder.iterdir()
    before = file.read_bytes()
    train = names["train"]
    names["train"] = lambda *args, **options: train(*args, **options, **change)
    with pytest.raises(ValueError, match=f"02_HBP.pt is of another.* {message}"):
        train_02(names)
    assert file.read_bytes() == before


def test_another_learning_rate_is_refused(folder: Path) -> None:
    names = tutorial_02()
    train_02(names)
    (file,) = folder.iterdir()
    file.rename(folder / "02_SGD.pt")
    with pytest.raises(ValueError, match=r"lr was 0\.3, is 0\.1"):
        train_02(names, "SGD")


# --- Without growth -----------------------------------------------------------


def test_memory_in_a_process_of_its_own() -> None:
    """All tests of tests/alone, where nothing else is in memory."""
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    folder, options = TESTS / "alone", ["-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, folder / "test_memory.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    # One for each way to compute a step, and five besides.
    assert f"{len(endurance.WAYS) + 5} passed" in done.stdout
