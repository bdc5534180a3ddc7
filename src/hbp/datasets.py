"""MNIST and CIFAR-10 as plain tensors, and recorded runs, for the tutorials.

`mnist(train)` and `cifar10(train)` return a `TensorDataset` of float images in
[0, 1] and integer labels. Two environment variables decide where they come from:

- `HBP_DATA`: the folder of the official files, in torchvision's layout (default
  `~/.cache/hbp`). It may be read-only. Files that are missing are downloaded into it.
- `HBP_TUTORIAL=quick`: no official files at all. Small stand-ins of the same
  shapes take their place, so that a tutorial runs in under a minute and without
  a network. They are never chosen silently.

Both sets fit in memory, so the images are converted once, here, and not again in
every epoch. Needs the packages of `pip install "hbp[tutorials]"`.

No file is trusted. Each is read once, and what was read is compared with the checksum
of the official file before anything is made of it.

`recorded(name)` returns what a longer training left behind; the package brings it
along, and it needs no other.
"""

import hashlib
import json
import os
import pickle
import random
from collections.abc import Iterable
from http.client import HTTPException
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

__all__ = ["cifar10", "data_root", "mnist", "quick", "recorded"]

# The MD5 of every official file, by its path below the data root. Two files of one
# MD5 can be made; a second file of a given MD5 cannot, as far as anybody knows.
MD5 = {
    "MNIST": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "CIFAR10": {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
}


def mnist(train: bool) -> TensorDataset:
    """Handwritten digits: images `[N, 1, 28, 28]` in [0, 1], labels `[N]` (int64).

    60,000 training or 10,000 test images; with `HBP_TUTORIAL=quick` 1,500 or 297
    of scikit-learn's digits instead, which are real handwriting at 8 × 8 pixels.

    Raises:
        ImportError: scikit-learn is missing in quick mode, or torchvision for a
            download.
        RuntimeError: a file is not the official one or cannot be read, or a download
            failed.
        ValueError: `HBP_TUTORIAL` has a value other than "quick".
    """
    if quick():
        images, labels = _digits(train)
        _announce(len(labels), "of scikit-learn's 8x8 digits", "MNIST", train)
        return TensorDataset(images, labels)
    split = "train" if train else "t10k"
    images, labels = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for content in _official("MNIST", [f"{split}-images", f"{split}-labels"])
    )
    # A header of 16 and of 8 bytes says what the checksum has said already.
    images = images[16:].view(-1, 1, 28, 28)
    return TensorDataset(images.float().div_(255), labels[8:].long())


def cifar10(train: bool) -> TensorDataset:
    """Photographs in ten classes: images `[N, 3, 32, 32]` in [0, 1], labels `[N]`.

    50,000 training or 10,000 test images; with `HBP_TUTORIAL=quick` 5,000 or 1,000
    images that are made here from a seed.

    Raises:
        ImportError: NumPy is missing, or torchvision for a download; quick mode
            does without.
        RuntimeError: a file is not the official one or cannot be read, or a download
            failed.
        ValueError: `HBP_TUTORIAL` has a value other than "quick".
    """
    if quick():
        images, labels = _blobs(train)
        _announce(len(labels), "generated images", "CIFAR-10", train)
        return TensorDataset(images, labels)
    _extra("numpy")  # The files are pickles of its arrays.
    contents = _official("CIFAR10", ["data_batch" if train else "test_batch"])
    batches = [pickle.loads(content, encoding="latin1") for content in contents]
    pixels = torch.cat([torch.from_numpy(batch["data"]) for batch in batches])
    labels = torch.tensor([label for batch in batches for label in batch["labels"]])
    return TensorDataset(pixels.view(-1, 3, 32, 32).float().div_(255), labels)


def quick() -> bool:
    """Whether `HBP_TUTORIAL=quick` asks for the stand-ins.

    Raises:
        ValueError: `HBP_TUTORIAL` is set to anything else; a typo must not start a
            download, or a training of half an hour.
    """
    mode = os.environ.get("HBP_TUTORIAL", "")
    if mode not in ("", "quick"):
        raise ValueError(
            f"HBP_TUTORIAL is {mode!r}. Set it to 'quick' for small stand-ins, "
            "or leave it unset for the official data."
        )
    return mode == "quick"


def data_root() -> Path:
    """The folder of the official files: `HBP_DATA`, or `~/.cache/hbp`."""
    return Path(os.environ.get("HBP_DATA") or "~/.cache/hbp").expanduser()


def recorded(name: str) -> dict[str, Any]:
    """What was measured in a run too long for a tutorial: settings, numbers, origin.

    Args:
        name: Which run, such as "convolution".

    Raises:
        ValueError: there is no record of this name; the message lists those there are.
    """
    folder = files("hbp") / "recorded"
    records = {
        record.name.removesuffix(".json"): record
        for record in folder.iterdir()
        if record.name.endswith(".json")
    }
    if name not in records:
        known = ", ".join(map(repr, sorted(records)))
        raise ValueError(f"There is no record {name!r}. There are: {known}.")
    return json.loads(records[name].read_text("utf-8"))


# --- The official files -------------------------------------------------------


def _official(name: str, prefixes: Iterable[str]) -> list[bytes]:
    """The contents of the files of `name` that begin so; each passed its checksum.

    If one is missing, all that are missing are downloaded first.
    """
    root = data_root()
    paths = [p for p in MD5[name] if Path(p).name.startswith(tuple(prefixes))]
    try:
        return _checked(root, name, paths)
    except (FileNotFoundError, NotADirectoryError):
        _download(root, name)
    except OSError as error:
        raise RuntimeError(
            f"A file of {name} cannot be read ({error}). Change its permissions, or "
            "set HBP_DATA to another folder."
        ) from error
    return _checked(root, name, paths)


def _checked(root: Path, name: str, paths: Iterable[str]) -> list[bytes]:
    """Read files below `root` and compare all of them, before any is used.

    Raises:
        FileNotFoundError: a file is not there.
        RuntimeError: some are not the official ones; the message lists them.
    """
    contents = {path: (root / path).read_bytes() for path in paths}
    wrong = [
        str(root / path)
        for path, content in contents.items()
        if _md5(content) != MD5[name][path]
    ]
    if wrong:
        raise RuntimeError(
            f"Not an official file of {name}: {', '.join(wrong)}. It is damaged or was "
            "replaced. Delete it and run again to download it anew."
        )
    return list(contents.values())


def _download(root: Path, name: str) -> None:
    """Download what is missing of `name`.

    Other processes may do the same at the same time, and this one may end at any
    moment. So torchvision works in a folder of this process alone; what passed its
    checksum is moved to its place at once, never over a file that is there. A process
    that was killed leaves a folder `hbp-download-...`, which nothing reads.
    """
    print(f"Downloading {name} to {root}")
    download = getattr(_extra("torchvision.datasets"), name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="hbp-download-", dir=root) as private:
            download(private, train=False, download=True)
            for path in MD5[name]:
                (content,) = _checked(Path(private), name, [path])
                _place(content, root, path, Path(private) / "checked")
    except (OSError, RuntimeError, HTTPException) as error:
        raise RuntimeError(
            f"{name} is not in {root} and could not be downloaded ({error}). Either "
            "set HBP_DATA to a folder that has it in torchvision's layout, or set "
            "HBP_TUTORIAL=quick to run on a small stand-in without a network."
        ) from error


def _place(content: bytes, root: Path, path: str, scratch: Path) -> None:
    """Write a file below `root`, whole or not at all, and nowhere else."""
    target = root / path
    if root.resolve() not in target.parent.resolve().parents:
        raise OSError(f"{target.parent} is a link that leads out of {root}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        scratch.write_bytes(content)
        scratch.replace(target)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _extra(module: str) -> Any:
    """Import a package that only the tutorials need."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"hbp.datasets needs {module.partition('.')[0]}, which could not be "
            f'imported ({error}). Install it with: pip install "hbp[tutorials]"'
        ) from error


# --- The stand-ins ------------------------------------------------------------


def _announce(count: int, what: str, instead_of: str, train: bool) -> None:
    split = "training" if train else "test"
    print(
        f"HBP_TUTORIAL=quick: {count} {what} stand in for {instead_of}'s {split} set."
    )


def _digits(train: bool) -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, enlarged; the last 297 are for testing."""
    digits = _extra("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).float().div_(16)[:, None]
    images = interpolate(images, size=(28, 28), mode="bilinear")
    part = slice(0, 1500) if train else slice(1500, None)
    return images[part], torch.from_numpy(digits.target).long()[part]


def _blobs(train: bool) -> tuple[Tensor, Tensor]:
    """Ten classes of soft colour patterns, under clutter and noise.

    A class has a brightness and two patterns of its own. Each image adds to them a
    brightness, a pattern and noise of its own, so no class stands apart from the
    others. As with photographs, brightness is the first thing to be learned, and
    does not lead far.

    The images are the same on every platform. So is the sequence of Python's random
    bytes, and all sums and products here are multiples of 1/64 that float32 holds
    exactly.
    """
    count, seed = (5000, 1) if train else (1000, 5)
    index = torch.arange(count)
    labels = index % 10
    brightness = 28 * torch.tensor([0, 7, 3, 9, 1, 6, 4, 8, 2, 5])
    patterns = _soft(_bytes(20, 3, 4, 4, seed=0))
    mix = 3 * brightness[labels].view(-1, 1, 1, 1) + 3 * patterns[index % 20]
    mix += 4 * _bytes(count, 1, 1, 1, seed=seed)
    mix += 4 * _soft(_bytes(count, 3, 4, 4, seed=seed + 1))
    mix += _bytes(count, 3, 32, 32, seed=seed + 2)
    # From 0 ... 15 · 255 to 0 ... 255, with nearly twice the contrast.
    images = (128 + (mix - 7.5 * 255) / 8).floor_().clamp_(0, 255)
    return images.div_(255), labels


def _soft(coarse: Tensor) -> Tensor:
    """Enlarge `[N, C, 4, 4]` to `[N, C, 32, 32]`, linearly between the given points."""
    distance = torch.arange(32)[:, None] / 8 - torch.arange(4)
    around = (distance + 2) % 4 - 2  # The right neighbour of the last is the first.
    weight = (1 - around.abs()).clamp(min=0)
    return weight @ coarse @ weight.T


def _bytes(*shape: int, seed: int) -> Tensor:
    """Whole numbers from 0 to 255, as float32, the same on every platform."""
    count = torch.Size(shape).numel()
    buffer = bytearray(random.Random(seed).randbytes(count))
    return torch.frombuffer(buffer, dtype=torch.uint8).float().view(shape)
