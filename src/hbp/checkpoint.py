"""Files from which a training goes on, bit for bit, after whatever stopped it.

`save` writes a file so that at every moment either the old one or the new one is
there, and complete. `load` reads it without running any code in it. `Checkpoint` does
both for a training: models, optimizers, schedules, random numbers and metrics.
"""

from __future__ import annotations

import os
import random
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final
from uuid import uuid4

import torch
from torch import Generator, Tensor, nn

__all__ = ["Checkpoint", "load", "save"]

PLAIN: Final = (bool, int, float, str, type(None), Tensor)
DICTS: Final = (dict, OrderedDict, Counter)
LISTS: Final = (list, tuple, torch.Size)
VERSION: Final = 1


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state, all or nothing.

    It goes to a new file beside ``path``, onto the disk, and only then takes its
    place. If anything goes wrong, the file before it is still there and the new one is
    gone. A process that is killed can leave the new one, `PATH.*.new`, behind;
    ``Checkpoint.resume`` removes it.

    Args:
        path: The file; its folder is made if there is none.
        state: Tensors, numbers, strings and None, in dicts, lists and tuples: what
            ``load`` reads. Every ``state_dict()`` of torch is of this kind.

    Raises:
        TypeError: the state holds something else. The message says where.
        OSError: the file could not be written.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state is a {type(state).__name__}; it must be a dict.")
    _check_plain(state, "state")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two processes must not write into one file.
    new = path.with_name(f"{path.name}.{uuid4().hex}.new")
    try:
        with open(new, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch turns the one into the other
        raise OSError(
            f"{path} could not be written ({error}). Is the disk full, or the folder "
            "read-only? A checkpoint that was there before is unchanged."
        ) from error
    finally:
        new.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read what ``save`` wrote, all tensors on the CPU.

    No code in the file is run (``weights_only=True``), so a file of a stranger can do
    no harm.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is damaged, or is none that ``save`` wrote.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no checkpoint {path}. Check the name, or train from the start."
        )
    with open(path, "rb") as file:
        try:
            state = _read(file)
        except Exception as error:  # Which one, depends on where the damage is.
            raise RuntimeError(
                f"{path} is damaged, or was not written by hbp.checkpoint.save "
                f"({type(error).__name__}). Delete it to train from the start, or put "
                "a copy of the original in its place."
            ) from error
    if not isinstance(state, dict):
        raise RuntimeError(
            f"{path} holds a {type(state).__name__}, not a dict: it was not written by "
            "hbp.checkpoint.save. Name another file, or move this one away."
        )
    return state


class Checkpoint:
    """The file from which a training goes on.

    Make it when the training is ready to start, ``resume()`` before the first epoch,
    and ``save(progress)`` after each. Besides the parts it keeps the state of every
    random number generator that ``hbp.set_seeds`` seeds.

    Args:
        path: The file, or None: then nothing is written, and nothing is read.
        settings: What must be the same for a training to go on: numbers, strings,
            None, and lists, tuples or dicts of them.
        parts: By name, whatever changes: models, optimizers and schedules, or anything
            else with ``state_dict()`` and ``load_state_dict()``, and the
            ``torch.Generator`` that shuffles the data.
    """

    def __init__(
        self, path: str | Path | None, settings: Mapping[str, Any], **parts: Any
    ) -> None:
        self.path = None if path is None else Path(path)
        self.settings = dict(settings)
        self.parts = parts

    def save(self, progress: Any) -> None:
        """Write the present state of all parts, and the progress.

        Args:
            progress: What ``resume`` shall return: the metrics so far, and with them
                how many epochs there were. Of the same kinds as ``save`` takes.

        Raises:
            TypeError: the progress, the settings or a state holds something else.
            OSError: the file could not be written.
        """
        if self.path is None:
            return
        parts = {name: _state(part) for name, part in self.parts.items()}
        state = {
            "hbp_checkpoint": VERSION,
            "settings": self.settings,
            "parts": parts,
            "random": _random_states(),
            "progress": progress,
        }
        save(self.path, state)

    def resume(self) -> Any:
        """Put all parts into the state of the file, and return its progress.

        Returns:
            None, with nothing changed, if there is no path or no such file yet.

        Raises:
            RuntimeError: the file is damaged, or no checkpoint of a training.
            ValueError: the file is of other settings, or of other parts. Nothing has
                changed then.
        """
        if self.path is None:
            return None
        for left in self.path.parent.glob(f"{self.path.name}.*.new"):
            left.unlink(missing_ok=True)  # A process was killed while it saved.
        if not self.path.exists():
            return None
        state = load(self.path)
        self._check(state)
        for name, part in self.parts.items():
            _restore(part, state["parts"][name])
        _restore_random_states(state["random"])
        return state["progress"]

    def _check(self, state: dict[str, Any]) -> None:
        """Raise before anything changes if the state is not of this training."""
        if state.get("hbp_checkpoint") != VERSION:
            raise RuntimeError(
                f"{self.path} is not a checkpoint of a training that this version of "
                "hbp can read. Name another file, or move this one away."
            )
        differences = _differences(self.settings, state["settings"])
        if state["parts"].keys() != self.parts.keys():
            differences.append(
                f"parts {sorted(state['parts'])} there, {sorted(self.parts)} here"
            )
        else:
            for name, part in self.parts.items():
                if isinstance(part, nn.Module):
                    there, here = map(_shapes, (state["parts"][name], _state(part)))
                    differences += _differences(here, there, f"{name}.")
        if differences:
            raise ValueError(
                f"{self.path} is of another training: {'; '.join(differences)}. Go on "
                "with the settings it was saved with, or name another file, or delete "
                "it to train from the start."
            )


def _read(file: BinaryIO) -> Any:
    # torch writes a zip archive with checksums, and does not look at them again: a
    # weight with a flipped bit would be read as it is.
    with zipfile.ZipFile(file) as archive:
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"The checksum of {name} is wrong.")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _differences(
    here: dict[str, Any], there: dict[str, Any], prefix: str = ""
) -> list[str]:
    """Entries that are not the same, in words."""
    return [
        f"{prefix}{key} was {_word(there, key)}, is {_word(here, key)}"
        for key in dict.fromkeys([*there, *here])
        if key not in here or key not in there or there[key] != here[key]
    ]


def _word(entries: dict[str, Any], key: str) -> str:
    return repr(entries[key]) if key in entries else "missing"


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v.shape) for k, v in state.items() if isinstance(v, Tensor)}


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, Generator) else part.state_dict()


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def _random_states() -> dict[str, Any]:
    """Those of Python, torch, and NumPy and CUDA where they are in use."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        name, words, *rest = numpy.random.get_state()
        states["numpy"] = [name, words.tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.set_state(tuple(states["numpy"]))
    # On a machine with other devices no training can go on bit for bit.
    if len(cuda := states.get("cuda", [])) == torch.cuda.device_count():
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)


def _check_plain(value: Any, where: str) -> None:
    """Raise a TypeError if ``load`` would refuse the value.

    Types are compared exactly: NumPy's float64 is a float by inheritance, but torch
    reads it back only by running code.
    """
    if type(value) in DICTS:
        for key, entry in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in LISTS:
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    elif type(value) not in PLAIN:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}. A "
            "checkpoint holds tensors, numbers, strings and None, in dicts, lists and "
            "tuples: convert it, as with float(...), .tolist() or .state_dict()."
        )
