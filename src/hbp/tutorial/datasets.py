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

`recorded(name)` returns what a longer training left behind, `alice()` a text; the
package brings both along.
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

__all__ = ["alice", "cifar10", "data_root", "mnist", "quick", "recorded"]

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
        OSError: a file cannot be read.
        RuntimeError: a file is not the official one, or a download failed.
        ValueError: `HBP_TUTORIAL` has a value other than "quick".
    """
    if quick():
        return _digits(train)
    images, labels = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for content in _official("MNIST", "train-" if train else "t10k-")
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
        OSError: a file cannot be read.
        RuntimeError: a file is not the official one, or a download failed.
        ValueError: `HBP_TUTORIAL` has a value other than "quick".
    """
    if quick():
        return _blobs(train)
    _extra("numpy")  # The files are pickles of its arrays.
    contents = _official("CIFAR10", "data_batch" if train else "test_batch")
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
        FileNotFoundError: there is no record of this name.
    """
    record = files("hbp.tutorial") / "recorded" / f"{name}.json"
    return json.loads(record.read_text("utf-8"))


def alice() -> str:
    """The first four chapters of Alice's Adventures in Wonderland, 45,229 characters.

    Lewis Carroll, 1865, in the public domain. From the Canterbury corpus (alice29.txt,
    the Millennium Fulcrum edition 2.9), without indentation, rows of stars, and more
    than one blank in a row.
    """
    return (files("hbp.tutorial") / "recorded" / "alice.txt").read_text("utf-8")


# --- The official files -------------------------------------------------------


def _official(name: str, prefix: str) -> list[bytes]:
    """The contents of the files of `name` that begin so; each passed its checksum.

    If one is missing, all that are missing are downloaded first.
    """
    root = data_root()
    paths = [path for path in MD5[name] if Path(path).name.startswith(prefix)]
    try:
        return _checked(root, name, paths)
    except (FileNotFoundError, NotADirectoryError):
        _download(root, name)
    return _checked(root, name, paths)


def _checked(root: Path, name: str, paths: Iterable[str]) -> list[bytes]:
    """Read files below `root` and compare all of them, before any is used.

    Raises:
        OSError: a file is not there, or cannot be read.
        RuntimeError: some are not the official ones; the message lists them.
    """
    contents = {path: (root / path).read_bytes() for path in paths}
    sums = {
        path: hashlib.md5(content, usedforsecurity=False).hexdigest()
        for path, content in contents.items()
    }
    if wrong := [str(root / path) for path in sums if sums[path] != MD5[name][path]]:
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
            _checked(Path(private), name, MD5[name])
            for path in MD5[name]:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                if not (root / path).exists():
                    (Path(private) / path).replace(root / path)
    except (OSError, RuntimeError, HTTPException) as error:
        raise RuntimeError(
            f"{name} is not in {root} and could not be downloaded ({error}). Either "
            "set HBP_DATA to a folder that has it in torchvision's layout, or set "
            "HBP_TUTORIAL=quick to run on a small stand-in without a network."
        ) from error


def _extra(module: str) -> Any:
    """Import a package that only the tutorials need."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"hbp.tutorial.datasets needs {module.partition('.')[0]}, which could not "
            f'be imported ({error}). Install it with: pip install "hbp[tutorials]"'
        ) from error


# --- The stand-ins ------------------------------------------------------------


def _digits(train: bool) -> TensorDataset:
    """The 1,797 digits of scikit-learn, enlarged; the last 297 are for testing."""
    digits = _extra("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).float().div_(16)[:, None]
    images = interpolate(images, size=(28, 28), mode="bilinear")
    part = slice(0, 1500) if train else slice(1500, None)
    labels = torch.from_numpy(digits.target).long()[part]
    print(f"HBP_TUTORIAL=quick: {len(labels)} small digits stand in for MNIST.")
    return TensorDataset(images[part], labels)


def _blobs(train: bool) -> TensorDataset:
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
    mix = 4 * brightness[labels].view(-1, 1, 1, 1) + 3 * patterns[index % 20]
    mix += 2 * _bytes(count, 1, 1, 1, seed=seed)
    mix += 4 * _soft(_bytes(count, 3, 4, 4, seed=seed + 1))
    mix += _bytes(count, 3, 32, 32, seed=seed + 2)
    # From 0 ... 14 · 255 to 0 ... 255, with nearly twice the contrast.
    images = (128 + (mix - 7 * 255) / 8).floor_().clamp_(0, 255)
    print(f"HBP_TUTORIAL=quick: {count} generated images stand in for CIFAR-10.")
    return TensorDataset(images.div_(255), labels)


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
