"""MNIST and CIFAR-10: the official files, the stand-ins, and what can go wrong."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor

from hbp import datasets

torchvision_datasets = pytest.importorskip("torchvision.datasets")

LOADERS = {"MNIST": datasets.mnist, "CIFAR10": datasets.cifar10}
SHAPES = {"MNIST": (1, 28, 28), "CIFAR10": (3, 32, 32)}
STAND_IN_SIZES = {"MNIST": (1500, 297), "CIFAR10": (5000, 1000)}


@pytest.fixture(params=LOADERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBP_TUTORIAL", "quick")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for official files, and no way to download them."""
    monkeypatch.delenv("HBP_TUTORIAL", raising=False)
    monkeypatch.setenv("HBP_DATA", str(tmp_path))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    for module in ("mnist", "cifar"):
        target = f"torchvision.datasets.{module}.download_and_extract_archive"
        monkeypatch.setattr(target, fail)
    return tmp_path


def check_form(name: str, images: Tensor, labels: Tensor) -> None:
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.shape == (len(labels), *SHAPES[name])
    assert images.is_contiguous()
    assert (images.min(), images.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(10))


class TestStandIns:
    @pytest.mark.parametrize("train", [True, False])
    def test_form(self, quick: None, name: str, train: bool) -> None:
        images, labels = LOADERS[name](train).tensors
        check_form(name, images, labels)
        assert len(labels) == STAND_IN_SIZES[name][0 if train else 1]

    def test_are_announced(
        self, quick: None, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        LOADERS[name](train=False)
        said = capsys.readouterr()
        assert said.out.startswith("HBP_TUTORIAL=quick: ")
        assert "stand in for" in said.out
        assert said.err == ""

    def test_training_and_test_images_differ(self, quick: None, name: str) -> None:
        train, test = (LOADERS[name](part).tensors[0] for part in (True, False))
        seen = {image.numpy().tobytes() for image in train}
        assert not any(image.numpy().tobytes() in seen for image in test)

    @pytest.mark.parametrize(
        ("train", "digest"),
        [(True, "1a6be6add6bd81f4"), (False, "f51c036ce1e435b3")],
    )
    def test_generated_images_are_the_same_everywhere(
        self, quick: None, train: bool, digest: str
    ) -> None:
        images, labels = datasets.cifar10(train).tensors
        pixels = (255 * images).round().to(torch.uint8)
        content = pixels.numpy().tobytes() + labels.numpy().tobytes()
        assert hashlib.sha256(content).hexdigest()[:16] == digest

    def test_generated_images_are_neither_trivial_nor_hopeless(
        self, quick: None
    ) -> None:
        """The class with the nearest mean image is often right, often wrong."""
        images, labels = datasets.cifar10(train=True).tensors
        means = torch.stack([images[labels == k].mean(0) for k in range(10)])
        test_images, test_labels = datasets.cifar10(train=False).tensors
        guesses = torch.cdist(test_images.flatten(1), means.flatten(1)).argmin(1)
        accuracy = (guesses == test_labels).float().mean()
        assert 0.2 < accuracy < 0.8

    def test_need_no_torchvision(
        self, quick: None, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        assert len(LOADERS[name](train=False)) > 0


class TestMode:
    @pytest.mark.parametrize("value", ["Quick", "1", "official", " "])
    def test_unknown_value_is_an_error(
        self, value: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HBP_TUTORIAL", value)
        with pytest.raises(ValueError, match="Set it to 'quick'"):
            LOADERS[name](train=True)

    @pytest.mark.parametrize(("value", "mode"), [("", False), ("quick", True)])
    def test_quick(
        self, value: str, mode: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HBP_TUTORIAL", value)
        assert datasets.quick() is mode

    def test_data_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HBP_DATA", raising=False)
        assert datasets.data_root() == Path.home() / ".cache" / "hbp"
        monkeypatch.setenv("HBP_DATA", "~/elsewhere")
        assert datasets.data_root() == Path.home() / "elsewhere"


class TestOfficialFiles:
    def test_failed_download_says_what_to_do(self, root: Path, name: str) -> None:
        with pytest.raises(RuntimeError, match="no network") as error:
            LOADERS[name](train=True)
        assert f"{name} is not in {root}" in str(error.value)
        assert "set HBP_DATA" in str(error.value)
        assert "HBP_TUTORIAL=quick" in str(error.value)

    def test_download_is_announced(
        self, root: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(RuntimeError):
            LOADERS[name](train=True)
        assert f"Downloading {name} to {root}" in capsys.readouterr().out

    def test_damaged_file_is_named(self, root: Path) -> None:
        """Files of the right form, but with other digits."""
        folder = root / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for split in ("train", "t10k"):
            write_idx(folder / f"{split}-images-idx3-ubyte", torch.zeros(2, 28, 28))
            write_idx(folder / f"{split}-labels-idx1-ubyte", torch.zeros(2))
        with pytest.raises(RuntimeError, match=r"train-images.* is not the official"):
            datasets.mnist(train=False)

    def test_file_that_cannot_be_read_is_named(self, root: Path) -> None:
        """An empty file makes torchvision fail, in words of its own."""
        folder = root / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for file in datasets.MNIST_MD5:
            (folder / file).touch()
        with pytest.raises(RuntimeError, match=r"train-images.* is not the official"):
            datasets.mnist(train=False)

    @pytest.mark.parametrize("missing", ["torchvision", "torchvision.datasets"])
    def test_missing_extra_is_named(
        self, root: Path, name: str, missing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        with pytest.raises(ImportError, match=r"hbp\[tutorials\]"):
            LOADERS[name](train=True)

    @pytest.mark.parametrize("train", [True, False])
    def test_form(
        self, name: str, train: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only where HBP_DATA has the files."""
        monkeypatch.delenv("HBP_TUTORIAL", raising=False)
        dataset = getattr(torchvision_datasets, name)
        try:
            official = dataset(datasets.data_root(), train=train)
        except RuntimeError:
            pytest.skip(f"HBP_DATA has no {name}")
        images, labels = LOADERS[name](train).tensors
        check_form(name, images, labels)
        image, label = official[7]
        assert label == labels[7]
        to_tensor = pytest.importorskip("torchvision.transforms").ToTensor()
        assert torch.equal(to_tensor(image), images[7])


def write_idx(path: Path, values: Tensor) -> None:
    """Write the format of MNIST's files: type, number of sizes, sizes, bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    header = bytes([0, 0, 8, values.dim()])
    path.write_bytes(header + sizes + values.to(torch.uint8).numpy().tobytes())
