"""The recipe of docs/checkpoints.md, as it stands there: killed, and gone on with.

Every training is a fork of one process, which has imported torch already. That process
is not pytest's, whose other tests may have left threads.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, small_net
from torch import Tensor

import hbp

PAGE = (ROOT / "docs" / "checkpoints.md").read_text("utf-8")
# The functions, and the loop, which trains what the reader has, and here what we have.
(RECIPE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
(LOOP,) = re.findall(r"^```py\n(.*?)^```", PAGE, re.M | re.S)
KILLS = 20
STEPS = 40


def recipe() -> dict[str, Any]:
    """What the page defines."""
    names: dict[str, Any] = {}
    exec(compile(RECIPE, "checkpoints.md", "exec"), names)
    return names


def train(path: Path, profile: Callable[..., object] | None = None) -> None:
    """Train from the file, if there is one, to the end; save after each step.

    Dropout draws from torch's random numbers, the order of the data from another
    generator, and the schedule and the damping change what the optimizer does.

    Args:
        path: The checkpoint.
        profile: Is told of each call and return while it is saved.
    """
    hbp.set_seeds(0)
    inputs, labels = torch.rand(30, 8), torch.arange(30) % 3
    model = hbp.HBPSequential(
        hbp.HBPLinear(8, 64),
        hbp.HBPSigmoid(),
        hbp.HBPDropout(0.2),
        hbp.HBPLinear(64, 64),
        hbp.HBPSigmoid(),
        hbp.HBPLinear(64, 3),
    )
    optimizer = hbp.CGNewton(model.parameters(), lr=0.3, alpha=0.1, cg_maxiter=5)
    damping = hbp.LevenbergMarquardt(optimizer)
    shuffle = torch.Generator().manual_seed(0)
    loss_func = torch.nn.CrossEntropyLoss()

    def train_one_epoch() -> float:
        batch = torch.randperm(30, generator=shuffle)[:10]
        outputs = model(inputs[batch])
        loss = loss_func(outputs, labels[batch])
        optimizer.zero_grad()
        hessian = hbp.batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(hessian, modify_2nd_order_terms="abs")
        optimizer.step()
        with torch.no_grad():
            damping.step(loss, loss_func(model(inputs[batch]), labels[batch]))
        return loss.item()

    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    names = recipe() | locals() | {"epochs": STEPS}

    def watched_save(*args: Any) -> None:
        sys.setprofile(profile)
        save(*args)
        sys.setprofile(None)

    save, names["save"] = names["save"], watched_save
    exec(compile(LOOP, "checkpoints.md", "exec"), names)


def fork(path: Path, event: float | None = None, delay: float | None = None) -> bool:
    """Train in a process of its own; whether it came to the end before it was killed.

    Args:
        path: The checkpoint.
        event: At which call or return in its saving it kills itself, if at any.
        delay: After how many seconds it is killed, if at all.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(path, None if event is None else killer(int(event)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the training failed by itself"
    return True


def killer(event: int) -> Callable[..., object]:
    """A profile function that kills this process at that event."""
    events = itertools.count()

    def count(*_: object) -> None:
        if next(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def scale(path: Path) -> dict[str, float]:
    """The seconds of a step, and how many calls and returns its saving has."""
    train(path)  # The first one imports what torch puts off.
    path.unlink()
    start = time.perf_counter()
    train(path)
    seconds = time.perf_counter() - start
    path.unlink()
    events = itertools.count()
    train(path, lambda *_: next(events))
    return {"delay": seconds / STEPS, "event": next(events) / STEPS}


def same(left: Any, right: Any) -> bool:
    """Whether two states are, bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same(left[k], right[k]) for k in left
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def rehearse(folder: Path) -> None:
    """Kill a training, and go on, until it was killed often enough and has ended."""
    torch.set_num_threads(1)
    path, whole = folder / "killed.pt", folder / "whole.pt"
    step = scale(whole)
    expected = torch.load(whole, weights_only=True)
    draw = random.Random(0)
    kills, partial, rounds = 0, 0, [[0]]
    while True:
        kind = ["event", "delay"][kills % 2]
        at = {kind: draw.uniform(0, 5 * step[kind])} if kills < KILLS else {}
        ended = fork(path, **at)
        if ended:
            assert same(torch.load(path, weights_only=True), expected)
            if kills == KILLS:
                break
            path.unlink()  # From the start, once more.
            rounds.append([0])
            continue
        kills += 1
        partial += kind == "event" and (folder / "killed.pt.new").exists()
        if path.exists():  # and then it is whole.
            rounds[-1].append(len(torch.load(path, weights_only=True)["progress"]))
    report = {"kills": kills, "partial": partial, "rounds": rounds}
    (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    code = f"import test_checkpoint as t; t.rehearse(t.Path({str(tmp_path)!r}))"
    path = os.pathsep.join(sys.path)  # With those that pytest added.
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == KILLS
    # It went on, and was not just started again.
    steps = [seen for seen in report["rounds"] if len(seen) > 5]
    assert steps
    for seen in steps:
        assert seen == sorted(seen)
        assert seen[-1] > STEPS / 4
    # Some kills hit a file that was not whole yet. Measured: 9 of the 10 in its saving.
    assert report["partial"] >= KILLS / 4


def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no disk that is always full")
    path, parts, shuffle = tmp_path / "a.pt", {"model": small_net()}, torch.Generator()
    save, resume = (recipe()[name] for name in ("save", "resume"))
    save(path, parts, shuffle, [1])
    (tmp_path / "a.pt.new").symlink_to("/dev/full")
    with pytest.raises((OSError, RuntimeError), match="No space left"):
        save(path, parts, shuffle, [1, 2])
    assert resume(path, parts, shuffle) == [1]


def test_a_flipped_bit_is_not_noticed_unless_one_looks(tmp_path: Path) -> None:
    """As the page says, of both."""
    path, parts, shuffle = tmp_path / "a.pt", {"model": small_net()}, torch.Generator()
    save, resume = (recipe()[name] for name in ("save", "resume"))
    save(path, parts, shuffle, [])
    assert zipfile.ZipFile(path).testzip() is None
    weight = parts["model"][0].weight.detach()
    before, content = weight.clone(), bytearray(path.read_bytes())
    content[content.index(before.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert resume(path, parts, shuffle) == []
    assert (weight != before).sum() == 1
    assert zipfile.ZipFile(path).testzip() is not None
