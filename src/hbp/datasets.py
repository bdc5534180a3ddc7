"""MNIST and CIFAR-10 as plain tensors, and recorded runs, for the tutorials.

`mnist(train)` and `cifar10(train)` return a `TensorDataset` of float images in
[0, 1] and integer labels. Two environment variables decide where they come from:

- `HBP_DATA`: the folder of the official files, in torchvision's layout (default
  `~/.cache/hbp`). Missing files are downloaded into it.
- `HBP_TUTORIAL=quick`: no official files at all. Small stand-ins of the same
  shapes take their place, so that a tutorial runs in under a minute and without
  a network. They are never chosen silently.

Both sets fit in memory, so the images are converted once, here, and not again in
every epoch. Needs the packages of `pip install "hbp[tutorials]"`.

`recorded(name)` returns what a longer training left behind; the package brings it
along, and it needs no other.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from http.client import HTTPException
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

__all__ = ["cifar10", "data_root", "mnist", "quick", "recorded"]

# torchvision compares the MD5 of what it downloads, and of CIFAR-10's files whenever
# it reads them. Of MNIST's files it only asks whether they exist. So we compare them.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist(train: bool) -> TensorDataset:
    """Handwritten digits: images `[N, 1, 28, 28]` in [0, 1], labels `[N]` (int64).

    60,000 training or 10,000 test images; with `HBP_TUTORIAL=quick` 1,500 or 297
    of scikit-learn's digits instead, which are real handwriting at 8 × 8 pixels.

    Raises:
        ImportError: torchvision (or, in quick mode, scikit-learn) is missing.
        RuntimeError: a download failed, or a file is not the official one.
        ValueError: `HBP_TUTORIAL` has a value other than "quick".
    """
    if quick():
        images, labels = _digits(train)
        _announce(len(labels), "of scikit-learn's 8x8 digits", "MNIST", train)
        return TensorDataset(images, labels)
    for name, checksum in MNIST_MD5.items():
        _check_file(data_root() / "MNIST" / "raw" / name, checksum)
    official = _official("MNIST", train)
    images = official.data[:, None].float().div_(255)
    return TensorDataset(images, official.targets.long())


def cifar10(train: bool) -> TensorDataset:
    """Photographs in ten classes: images `[N, 3, 32, 32]` in [0, 1], labels `[N]`.

    50,000 training or 10,000 test images; with `HBP_TUTORIAL=quick` 5,000 or 1,000
    images that are made here from a seed.

    Raises:
        ImportError: torchvision is missing (quick mode does without).
        RuntimeError: a download failed.
        ValueError: `HBP_TUTORIAL` has a value other than "quick".
    """
    if quick():
        images, labels = _blobs(train)
        _announce(len(labels), "generated images", "CIFAR-10", train)
        return TensorDataset(images, labels)
    # torchvision compares the MD5 of every CIFAR-10 file before it unpickles one.
    official = _official("CIFAR10", train)
    images = torch.from_numpy(official.data).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images.float().div_(255), torch.tensor(official.targets))


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


def _official(name: str, train: bool) -> Any:
    """The torchvision data set `name`, downloaded if its files are not there yet."""
    dataset: Callable[..., Any] = getattr(_extra("torchvision.datasets"), name)
    root = data_root()
    try:
        return dataset(root, train=train)
    except RuntimeError:  # torchvision's "not found or corrupted"
        print(f"Downloading {name} to {root}")
    try:
        return dataset(root, train=train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise RuntimeError(
            f"{name} is not in {root} and could not be downloaded ({error}). Either "
            "set HBP_DATA to a folder that has it in torchvision's layout, or set "
            "HBP_TUTORIAL=quick to run on a small stand-in without a network."
        ) from error


def _check_file(path: Path, checksum: str) -> None:
    """Raise a `RuntimeError` if the file exists and its MD5 is not `checksum`."""
    if not path.exists():
        return
    if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != checksum:
        raise RuntimeError(
            f"{path} is not the official file: it is damaged or was replaced. "
            "Delete it and run again to download it anew."
        )


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
