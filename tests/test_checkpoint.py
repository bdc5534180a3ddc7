"""Checkpoints: whole or not at all, read without running code, refused with words."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import all_equal, send_back, small_batch, small_net, values
from torch import Tensor, nn

import hbp
from hbp import checkpoint
from hbp.checkpoint import Checkpoint

FLIPS = 200
STATE = {
    "weights": torch.arange(300.0),
    "metrics": [{"epoch": 1, "loss": 0.1, "name": "é", "best": None, "done": False}],
    "sizes": (1, 2, torch.Size([3])),
    3: torch.tensor([1, 2], dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "some.pt"


def plain(state: Any) -> Any:
    """With lists for tensors, to be compared by ==."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(plain, state))
    return state.tolist() if isinstance(state, Tensor) else state


class TestSave:
    def test_load_returns_what_was_saved(self, path: Path) -> None:
        checkpoint.save(path, STATE)
        assert plain(checkpoint.load(path)) == plain(STATE)
        assert list(path.parent.iterdir()) == [path]

    def test_a_file_is_readable_by_others(self, path: Path) -> None:
        """As any file is; those of tempfile are not."""
        checkpoint.save(path, STATE)
        other = path.with_name("other")
        other.touch()
        assert path.stat().st_mode == other.stat().st_mode

    @pytest.mark.parametrize("name", ["fsync", "replace"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space")])
    def test_a_failure_leaves_the_file_before(
        self, path: Path, name: str, error: BaseException, monkeypatch: Any
    ) -> None:
        checkpoint.save(path, STATE)

        def fail(*_: object) -> None:
            assert len(list(path.parent.iterdir())) == 2
            raise error

        monkeypatch.setattr(os, name, fail)
        kind = OSError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(kind) as raised:
            checkpoint.save(path, {"other": 1})
        if kind is OSError:
            assert "some.pt could not be written" in str(raised.value)
            assert "unchanged" in str(raised.value)
        assert list(path.parent.iterdir()) == [path]
        assert plain(checkpoint.load(path)) == plain(STATE)

    def test_a_full_disk_while_writing(self, path: Path, monkeypatch: Any) -> None:
        checkpoint.save(path, STATE)

        class Full:
            def __init__(self, *_: object) -> None:
                self.left = 1000

            def write(self, data: bytes) -> int:
                self.left -= len(data)
                if self.left < 0:
                    raise OSError(28, "No space left on device")
                return len(data)

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None: ...

            def flush(self) -> None: ...

        monkeypatch.setattr(checkpoint, "open", Full, raising=False)
        with pytest.raises(OSError, match=r"could not be written.* disk full"):
            checkpoint.save(path, STATE)
        monkeypatch.undo()
        assert plain(checkpoint.load(path)) == plain(STATE)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ([1], "state is a list; it must be a dict"),
            (
                {"a": [{"loss": np.float64(1)}]},
                r"\['a'\]\[0\]\['loss'\] is a numpy",
            ),
            ({"a": np.zeros(2)}, r"state\['a'\] is a numpy.ndarray"),
            (
                {"m": nn.Linear(1, 1)},
                r"state\['m'\] is a torch.*Linear",
            ),
            ({"p": nn.Parameter(torch.ones(1))}, r"state\['p'\] .*Parameter"),
            ({"p": Path("x")}, r"state\['p'\] is a pathlib"),
            ({(1, Path("x")): 1}, r"a key of state\[1\] is a pathlib"),
        ],
    )
    def test_what_could_not_be_loaded_is_not_saved(
        self, path: Path, state: Any, message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            checkpoint.save(path, state)
        assert not path.parent.exists()


class TestLoad:
    def test_missing(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint .*some\.pt"):
            checkpoint.load(path)

    def test_truncated_anywhere(self, path: Path) -> None:
        checkpoint.save(path, STATE)
        whole = path.read_bytes()
        for length in range(0, len(whole), 61):
            path.write_bytes(whole[:length])
            with pytest.raises(RuntimeError, match=r"some\.pt is damaged"):
                checkpoint.load(path)

    def test_a_flipped_bit_changes_nothing_or_is_noticed(self, path: Path) -> None:
        """Without the checksums, 64 % of such files gave other numbers in silence."""
        checkpoint.save(path, STATE)
        whole, rng, refused = path.read_bytes(), random.Random(0), 0
        for _ in range(FLIPS):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                state = checkpoint.load(path)
            except RuntimeError:
                refused += 1
            else:
                assert plain(state) == plain(STATE)
        assert refused > 100  # Measured: 253 of 300.

    @pytest.mark.parametrize(
        "content",
        [b"", b"a text\n" * 9, pickle.dumps({"a": 1}), b"ustar" * 200],
        ids=["empty", "text", "pickle", "tar"],
    )
    def test_foreign(self, path: Path, content: bytes) -> None:
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"some.pt is damaged.*Delete it"):
            checkpoint.load(path)

    def test_no_code_is_run(self, path: Path) -> None:
        class Malicious:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
                return os.mkdir, (str(path.with_name("harm")),)

        path.parent.mkdir()
        torch.save({"a": Malicious()}, path)
        with pytest.raises(RuntimeError, match=r"UnpicklingError"):
            checkpoint.load(path)
        assert list(path.parent.iterdir()) == [path]

    def test_a_torch_file_of_something_else(self, path: Path) -> None:
        path.parent.mkdir()
        torch.save(torch.zeros(2), path)
        with pytest.raises(RuntimeError, match=r"some.pt holds a Tensor"):
            checkpoint.load(path)


def parts_of_training(kind: str) -> dict[str, Any]:
    """A network and its optimizer, as they start."""
    torch.manual_seed(0)
    net = small_net()
    model = hbp.HBPSequential(*net[:2], hbp.HBPDropout(0.3), net[2])
    options: dict[str, Any] = {
        "SGD": {"momentum": 0.9},
        "Adam": {},
        "AdamW": {"amsgrad": True},
        "CGNewton": {"alpha": 0.2},
        "LevenbergMarquardt": {"alpha": 0.2},
    }[kind]
    name = "CGNewton" if kind == "LevenbergMarquardt" else kind
    optimizer = getattr(hbp if name == "CGNewton" else torch.optim, name)(
        model.parameters(), lr=0.1, **options
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    shuffle = torch.Generator().manual_seed(0)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "shuffle": shuffle,
    }


def train(kind: str, parts: dict[str, Any], steps: int) -> None:
    """Draw from every source of random numbers there is."""
    model, optimizer = parts["model"], parts["optimizer"]
    x, y = small_batch(30)
    for _ in range(steps):
        index = torch.randint(30, (10,), generator=parts["shuffle"])
        noise = random.random() + np.random.rand()
        inputs, labels = x[index] + noise + torch.rand(()).double(), y[index]
        send_back(model, inputs, labels, treatment="abs")
        optimizer.step()
        if kind == "LevenbergMarquardt":
            hbp.LevenbergMarquardt(optimizer).step(1.0, 0.9)
        parts["schedule"].step()


class TestCheckpoint:
    @pytest.mark.parametrize(
        "kind", ["CGNewton", "LevenbergMarquardt", "SGD", "Adam", "AdamW"]
    )
    def test_goes_on_bit_for_bit(self, kind: str, path: Path) -> None:
        parts = parts_of_training(kind)
        hbp.set_seeds(1)
        train(kind, parts, 3)
        Checkpoint(path, {"lr": 0.1}, **parts).save({"loss": [1.0]})
        train(kind, parts, 4)
        random_numbers = random.random(), np.random.rand(), torch.rand(()).item()

        again = parts_of_training(kind)
        hbp.set_seeds(2)
        train(kind, again, 1)
        progress = Checkpoint(path, {"lr": 0.1}, **again).resume()
        assert progress == {"loss": [1.0]}
        train(kind, again, 4)
        assert all_equal(values(again["model"]), values(parts["model"]))
        own, other = (p["optimizer"].state_dict() for p in (again, parts))
        assert plain(own) == plain(other)
        assert random_numbers == (
            random.random(),
            np.random.rand(),
            torch.rand(()).item(),
        )

    def test_without_a_path_nothing_happens(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(checkpoint, "save", None)
        monkeypatch.setattr(checkpoint, "load", None)
        nothing = Checkpoint(None, {}, model=small_net())
        nothing.save({"a": 1})
        assert nothing.resume() is None

    def test_without_a_file_nothing_changes(self, path: Path) -> None:
        model = small_net()
        before, state = values(model), torch.get_rng_state()
        assert Checkpoint(path, {}, model=model).resume() is None
        assert all_equal(values(model), before)
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_a_killed_process_left_is_removed(self, path: Path) -> None:
        own = Checkpoint(path, {}, model=small_net())
        own.save(1)
        for name in (f"{path.name}.1a.new", "another.pt.1a.new"):
            path.with_name(name).write_bytes(b"half")
        assert own.resume() == 1
        names = sorted(file.name for file in path.parent.iterdir())
        assert names == ["another.pt.1a.new", path.name]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lr": 0.2, "sizes": [4, 3]}, r"lr was 0.1, is 0.2\. Go on"),
            ({"lr": 0.1, "sizes": [4, 5]}, r"sizes was \[4, 3\], is \[4, 5\]"),
            ({"sizes": [4, 3]}, "lr was 0.1, is missing"),
            ({"lr": 0.1, "sizes": [4, 3], "seed": 0}, "seed was missing, is 0"),
        ],
    )
    def test_other_settings_are_refused(
        self, path: Path, settings: dict[str, Any], message: str
    ) -> None:
        Checkpoint(path, {"lr": 0.1, "sizes": [4, 3]}, model=small_net()).save(0)
        model = small_net()
        before = values(model)
        with pytest.raises(ValueError, match=f"some.pt is of another.*{message}"):
            Checkpoint(path, settings, model=model).resume()
        assert all_equal(values(model), before)

    def test_another_model_is_refused_before_anything_changes(self, path: Path) -> None:
        Checkpoint(path, {}, model=small_net()).save(0)
        other = hbp.HBPSequential(hbp.HBPLinear(4, 5), hbp.HBPLinear(5, 2)).double()
        before = values(other)
        with pytest.raises(ValueError, match=r"model\.2\.weight was \[3, 5\]"):
            Checkpoint(path, {}, model=other).resume()
        assert all_equal(values(other), before)

    def test_other_parts_are_refused(self, path: Path) -> None:
        Checkpoint(path, {}, model=small_net()).save(0)
        generator = torch.Generator()
        with pytest.raises(ValueError, match=r"parts \['model'\] there, \['m', 's'\]"):
            Checkpoint(path, {}, m=small_net(), s=generator).resume()

    def test_a_checkpoint_of_something_else_is_refused(self, path: Path) -> None:
        checkpoint.save(path, {"model": small_net().state_dict()})
        with pytest.raises(RuntimeError, match=r"some.pt is not a checkpoint of a"):
            Checkpoint(path, {}, model=small_net()).resume()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_random_numbers_of_a_gpu_go_on(self, path: Path) -> None:
        own = Checkpoint(path, {}, model=small_net().cuda())
        torch.rand(3, device="cuda")
        own.save(0)
        expected = torch.rand(3, device="cuda")
        own.resume()
        assert torch.equal(torch.rand(3, device="cuda"), expected)
        assert own.parts["model"][0].weight.is_cuda
