"""MNIST and CIFAR-10: the official files, the stand-ins, and what can go wrong.

Damage and downloads are tried on small files in place of the official ones. They have
the same names and formats; their checksums take the place of the official ones, and a
server on this machine hands them out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from hbp.tutorial import datasets

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
    """An empty folder for official files."""
    monkeypatch.delenv("HBP_TUTORIAL", raising=False)
    monkeypatch.setenv("HBP_DATA", str(tmp_path / "data"))
    # Whoever wants a folder for temporary files outside the data root gets none.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    return tmp_path / "data"


class Site(ThreadingHTTPServer):
    """Hands out archives. Amid the body of a request it waits for `pace`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.archives: dict[str, bytes] = {}
        self.pace: Callable[[], object] = lambda: None
        self.cut = False  # End every answer in the middle.
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"


class Request(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        body = self.server.archives[self.path[1:]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        try:
            self.wfile.write(body[:half])
            # torchvision asks twice, and reads no body the first time.
            if self.headers["Method"] != "HEAD":
                self.server.pace()
            self.wfile.write(b"" if self.server.cut else body[half:])
        except ConnectionError:  # Whoever asked has gone, or was killed.
            pass

    def log_message(self, *args: object) -> None:
        pass


Files = dict[str, bytes]


def idx(values: Tensor) -> bytes:
    """The format of MNIST's files: type, number of sizes, sizes, bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    header = bytes([0, 0, 8, values.dim()])
    return header + sizes + values.to(torch.uint8).numpy().tobytes()


@cache
def small_files(name: str) -> Files:
    """Files as the official ones, with ten or twenty images each."""
    content: dict[str, bytes] = {}
    for path in datasets.MD5[name]:
        count = 10 if "t10k" in path else 20
        labels = torch.arange(count) % 10
        pixels = torch.randint(256, (count, 3072))
        pixels[0, :2] = torch.tensor([0, 255])
        if "images" in path:
            content[path] = idx(pixels[:, :784].view(count, 28, 28))
        elif "labels" in path:
            content[path] = idx(labels)
        else:
            batch = {"data": pixels.byte().numpy(), "labels": labels.tolist()}
            named = {"label_names": list("abcdefghij")}
            values = named if path.endswith("meta") else batch
            content[path] = pickle.dumps(values, protocol=2)
    return content


@cache
def small_archives(name: str) -> Files:
    """Those files as the site has them."""
    if name == "CIFAR10":
        return {"cifar-10-python.tar.gz": tar(small_files(name))}
    return {
        f"{Path(path).name}.gz": gzip.compress(content, compresslevel=1)
        for path, content in small_files(name).items()
    }


def tar(members: Files, target: Path | None = None) -> bytes:
    """An archive with these files and, before them, a `link` to the target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        if target:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(target)
            archive.addfile(link)
        for path, content in members.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Where torchvision now looks for its files."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # The lock of progress bars is shared with forked processes: one that is killed
    # while it holds the lock would stop all others.
    monkeypatch.setattr("torchvision.datasets.utils.tqdm", MagicMock())
    with Site() as site:
        threading.Thread(target=site.serve_forever, args=(0.01,)).start()
        monkeypatch.setattr(torchvision_datasets.MNIST, "mirrors", [site.address])
        url = site.address + "cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision_datasets.CIFAR10, "url", url)
        yield site
        site.shutdown()


@pytest.fixture
def small(name: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Small files in place of the official ones of `name`, also on the site."""
    files = small_files(name)
    sums = {path: md5(content) for path, content in files.items()}
    monkeypatch.setitem(datasets.MD5, name, sums)
    site.archives = dict(small_archives(name))
    archives = [(file, md5(content)) for file, content in site.archives.items()]
    kind = getattr(torchvision_datasets, name)
    if name == "MNIST":
        monkeypatch.setattr(kind, "resources", archives)
    else:
        listed = [[Path(path).name, checksum] for path, checksum in sums.items()]
        monkeypatch.setattr(kind, "tgz_md5", archives[0][1])
        monkeypatch.setattr(kind, "train_list", listed[:5])
        monkeypatch.setattr(kind, "test_list", listed[5:6])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": listed[6][1]})
    return dict(files)


def put(files: Files, root: Path) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def found(root: Path) -> Files:
    """Every file below `root`; in an empty or missing folder, none."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def is_training(path: str) -> bool:
    return "train-" in path or "data_batch" in path


def count(name: str, train: bool) -> int:
    return len(LOADERS[name](train))


def sizes(name: str) -> list[int]:
    return [count(name, train) for train in (True, False)]


SMALL_SIZES = {"MNIST": [20, 10], "CIFAR10": [100, 20]}

# A child that is forked sees the small files, too. No test here has a GPU's context.
needs_fork = pytest.mark.skipif(
    "fork" not in get_all_start_methods(), reason="processes cannot be forked here"
)


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
        count = STAND_IN_SIZES[name][1]
        assert re.search(rf" {count} .* stand in for {name[:5]}", said.out)
        assert said.err == ""

    def test_training_and_test_images_differ(self, quick: None, name: str) -> None:
        train, test = (LOADERS[name](part).tensors[0] for part in (True, False))
        seen = {image.numpy().tobytes() for image in train}
        assert not any(image.numpy().tobytes() in seen for image in test)

    @pytest.mark.parametrize(
        ("train", "digest"),
        [(True, "63eb4158f01c9e8f"), (False, "451d698bd65db2ac")],
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


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


PATHS = [(name, path) for name in datasets.MD5 for path in datasets.MD5[name]]
READ = [(name, path) for name, path in PATHS if not path.endswith("meta")]
FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "another pixel": lambda content: content[:900] + b"\x07" + content[901:],
}
SWAPPED = [
    ("MNIST", "MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-images-idx3-ubyte"),
    ("MNIST", "MNIST/raw/train-labels-idx1-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"),
    ("CIFAR10", "cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"),
    ("CIFAR10", "cifar-10-batches-py/data_batch_2", "cifar-10-batches-py/data_batch_5"),
]


class TestDamage:
    """Found before anything is made of any file, and said; nothing is changed."""

    @pytest.fixture(autouse=True)
    def _nothing_is_parsed(
        self, small: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(small, root)
        self.parsed = 0

        def refuse(*args: Any, **kwargs: Any) -> None:
            self.parsed += 1
            raise AssertionError("a file was parsed")

        monkeypatch.setattr(datasets.pickle, "loads", refuse)
        monkeypatch.setattr(torch, "frombuffer", refuse)

    def refused(self, name: str, train: bool, root: Path, *paths: str) -> None:
        before = found(root)
        with pytest.raises(RuntimeError) as error:
            LOADERS[name](train)
        message = str(error.value)
        assert ", ".join(str(root / path) for path in paths) + ". It is" in message
        assert "Delete it and run again" in message
        assert self.parsed == 0
        assert found(root) == before

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize(("name", "path"), READ)
    def test_a_damaged_file_is_named(
        self, small: Files, root: Path, name: str, path: str, fault: str
    ) -> None:
        damaged = FAULTS[fault](small[path])
        assert damaged != small[path]
        put({path: damaged}, root)
        self.refused(name, is_training(path), root, path)

    @pytest.mark.parametrize(("name", "one", "other"), SWAPPED)
    def test_swapped_files_are_named(
        self, small: Files, root: Path, name: str, one: str, other: str
    ) -> None:
        put({one: small[other], other: small[one]}, root)
        if is_training(other):
            self.refused(name, True, root, one, other)
        else:
            self.refused(name, True, root, one)
            self.refused(name, False, root, other)

    def test_all_damaged_files_are_named(
        self, small: Files, root: Path, name: str
    ) -> None:
        put(dict.fromkeys(small, b""), root)
        for train in (True, False):
            read = [
                path
                for path in small
                if is_training(path) is train and not path.endswith("meta")
            ]
            self.refused(name, train, root, *read)


class TestPickles:
    """What a pickle says is done only if its checksum is the official one."""

    @pytest.fixture
    def bomb(self, tmp_path: Path) -> bytes:
        mark = tmp_path / "mark"
        content = pickle.dumps(Bomb(mark), protocol=2)
        pickle.loads(content)
        mark.rmdir()  # It works.
        return content

    @pytest.mark.parametrize("name", ["CIFAR10"])
    def test_another_pickle_is_not_loaded(
        self, small: Files, root: Path, name: str, bomb: bytes, tmp_path: Path
    ) -> None:
        put(dict.fromkeys(small, bomb), root)
        for train in (True, False):
            with pytest.raises(RuntimeError, match="Not an official file"):
                datasets.cifar10(train)
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("name", ["CIFAR10"])
    def test_what_is_loaded_is_what_was_checked(
        self,
        small: Files,
        root: Path,
        name: str,
        bomb: bytes,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A file that changes once it was read makes no difference."""
        put(small, root)
        expected = [datasets.cifar10(train).tensors for train in (True, False)]
        read = Path.read_bytes

        def read_then_replace(path: Path) -> bytes:
            content = read(path)
            path.write_bytes(bomb)
            return content

        monkeypatch.setattr(Path, "read_bytes", read_then_replace)
        for train, (images, labels) in zip((True, False), expected, strict=True):
            now = datasets.cifar10(train).tensors
            assert torch.equal(now[0], images)
            assert torch.equal(now[1], labels)
        assert read(root / "cifar-10-batches-py" / "data_batch_1") == bomb
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("name", ["MNIST"])
    def test_old_files_of_torchvision_are_not_read(
        self, small: Files, root: Path, name: str, bomb: bytes, tmp_path: Path
    ) -> None:
        """Early versions kept MNIST as pickles, and later ones prefer those."""
        processed = ("MNIST/processed/training.pt", "MNIST/processed/test.pt")
        put(small | dict.fromkeys(processed, bomb), root)
        assert sizes(name) == SMALL_SIZES[name]
        assert not (tmp_path / "mark").exists()


class TestDownload:
    def test_brings_the_files_and_nothing_else(
        self, small: Files, root: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images, labels = LOADERS[name](train=True).tensors
        check_form(name, images, labels)
        assert f"Downloading {name} to {root}" in capsys.readouterr().out
        assert found(root.parent) == {f"data/{path}": small[path] for path in small}
        assert sizes(name) == SMALL_SIZES[name]
        assert "Downloading" not in capsys.readouterr().out
        # torchvision finds what it looks for.
        official = getattr(torchvision_datasets, name)(root, train=True)
        assert official[3][1] == labels[3]

    def test_leaves_alone_what_is_there(
        self, small: Files, root: Path, name: str
    ) -> None:
        """One file is missing; of the others, one that is not needed is damaged."""
        missing, *kept = small
        damaged = kept[-2]
        put(small | {damaged: b"mine"}, root)
        (root / missing).unlink()
        inodes = [(root / path).stat().st_ino for path in kept]
        assert count(name, train=True) == SMALL_SIZES[name][0]
        assert [(root / path).stat().st_ino for path in kept] == inodes
        assert found(root) == small | {damaged: b"mine"}

    def test_cut_off_leaves_nothing(
        self, small: Files, root: Path, name: str, site: Site
    ) -> None:
        site.cut = True
        with pytest.raises(RuntimeError, match="could not be downloaded"):
            count(name, train=True)
        assert found(root) == {}
        site.cut = False
        assert sizes(name) == SMALL_SIZES[name]

    def test_other_content_is_refused(
        self, small: Files, root: Path, name: str, site: Site
    ) -> None:
        for path, content in site.archives.items():
            site.archives[path] = FAULTS["one bit"](content)
        with pytest.raises(RuntimeError, match="could not be downloaded"):
            count(name, train=True)
        assert found(root) == {}

    @needs_fork
    def test_killed_at_any_moment(
        self, small: Files, root: Path, name: str, site: Site
    ) -> None:
        """Each file is there as a whole or not at all, and the next run goes on."""
        site.pace = lambda: time.sleep(0.01)
        fork = get_context("fork")
        start = time.monotonic()
        assert sizes(name) == SMALL_SIZES[name]
        duration = time.monotonic() - start
        draw = random.Random(0)
        for _ in range(10):
            shutil.rmtree(root)
            child = fork.Process(target=count, args=(name, True))
            child.start()
            time.sleep(draw.uniform(0, duration))
            child.kill()
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL)
            kept = {path: x for path, x in found(root).items() if path in small}
            assert kept == {path: small[path] for path in kept}
            assert sizes(name) == SMALL_SIZES[name]

    @needs_fork
    @pytest.mark.parametrize("placed", range(4))
    def test_killed_between_two_files(
        self,
        small: Files,
        root: Path,
        name: str,
        placed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed_after(placed))
            child = get_context("fork").Process(target=count, args=(name, True))
            child.start()
            child.join()
        assert child.exitcode == -signal.SIGKILL
        there = {path: small[path] for path in list(small)[:placed]}
        assert {path: x for path, x in found(root).items() if path in small} == there
        assert sizes(name) == SMALL_SIZES[name]

    @needs_fork
    def test_several_processes_at_once(
        self, small: Files, root: Path, name: str, site: Site
    ) -> None:
        """Each answer begins once all have asked, so that all write at a time."""
        together = threading.Barrier(3)
        site.pace = lambda: together.wait(timeout=20)
        with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
            done = [pool.submit(count, name, train=True) for _ in range(3)]
            assert [child.result() for child in done] == 3 * SMALL_SIZES[name][:1]
        assert not together.broken
        assert found(root) == small
        assert sizes(name) == SMALL_SIZES[name]


def killed_after(placed: int) -> Callable[..., None]:
    """What puts that many files in their place, and then ends the process."""
    place, done = Path.replace, []

    def place_or_end(file: Path, target: Path) -> None:
        if len(done) == placed:
            os.kill(os.getpid(), signal.SIGKILL)
        place(file, target)
        done.append(target)

    return place_or_end


class TestOutside:
    """Nothing is written outside the data root, unless its owner has a link there."""

    def test_a_folder_may_be_a_link(
        self, small: Files, root: Path, name: str, tmp_path: Path
    ) -> None:
        root.mkdir()
        top = Path(next(iter(small))).parts[0]
        (tmp_path / "outside" / top).mkdir(parents=True)
        (root / top).symlink_to(tmp_path / "outside" / top)
        assert sizes(name) == SMALL_SIZES[name]
        assert found(tmp_path / "outside") == small
        assert (root / top).is_symlink()

    def test_a_file_that_leads_out_is_not_written_to(
        self, small: Files, root: Path, name: str, tmp_path: Path
    ) -> None:
        target = root / next(iter(small))
        target.parent.mkdir(parents=True)
        target.symlink_to(tmp_path / "outside")  # which does not exist
        assert sizes(name) == SMALL_SIZES[name]
        assert not (tmp_path / "outside").exists()
        assert not target.is_symlink()

    @pytest.mark.parametrize("name", ["CIFAR10"])
    @pytest.mark.parametrize("up", ["../../outside", "{tmp}/outside", "link/outside"])
    def test_an_archive_that_leads_out_is_not_unpacked(
        self, small: Files, root: Path, name: str, up: str, site: Site, tmp_path: Path
    ) -> None:
        """Its checksum is not the official one, so no member of it is looked at."""
        members = small | {up.format(tmp=tmp_path): b"outside"}
        site.archives = {path: tar(members, tmp_path) for path in site.archives}
        with pytest.raises(RuntimeError, match="could not be downloaded"):
            count(name, train=True)
        assert found(tmp_path) == {}


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody can reach; pytest's own are the user's alone."""
    monkeypatch.delenv("HBP_TUTORIAL", raising=False)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("HBP_DATA", folder)
        yield Path(folder)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755)


def as_nobody(folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Call in a process that cannot write to the folder, also where root runs tests."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        pool.submit(give_up_rights, folder).result()
        return pool.submit(function, *args).result()


def give_up_rights(folder: Path) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    with pytest.raises(PermissionError):
        (folder / "attempt").touch()


@needs_fork
class TestReadOnly:
    def test_is_enough_to_read(self, small: Files, sealed: Path, name: str) -> None:
        put(small, sealed)
        assert as_nobody(sealed, sizes, name) == SMALL_SIZES[name]

    @pytest.mark.parametrize("below", ["", "new/folder"])
    def test_is_named_if_a_file_is_missing(
        self,
        small: Files,
        sealed: Path,
        name: str,
        below: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        root = sealed / below
        monkeypatch.setenv("HBP_DATA", str(root))
        with pytest.raises(RuntimeError, match="Permission denied") as error:
            as_nobody(sealed, sizes, name)
        assert f"{name} is not in {root}" in str(error.value)
        assert "set HBP_DATA" in str(error.value)
        assert found(sealed) == {}

    def test_a_file_that_cannot_be_read_is_named(
        self, small: Files, sealed: Path, name: str
    ) -> None:
        put(small, sealed)
        (sealed / next(iter(small))).unlink()
        (sealed / next(iter(small))).mkdir()
        with pytest.raises(OSError, match=str(sealed / next(iter(small)))):
            as_nobody(sealed, sizes, name)

    def test_a_file_in_place_of_the_folder_is_named(
        self, small: Files, root: Path, name: str
    ) -> None:
        root.touch()
        with pytest.raises(RuntimeError, match=f"not in {root}.*set HBP_DATA"):
            count(name, train=True)


class TestOfficialFiles:
    def test_failed_download_says_what_to_do(
        self, root: Path, name: str, site: Site
    ) -> None:
        """The site knows no file."""
        with pytest.raises(RuntimeError, match="could not be downloaded") as error:
            LOADERS[name](train=True)
        assert f"{name} is not in {root}" in str(error.value)
        assert "set HBP_DATA" in str(error.value)
        assert "HBP_TUTORIAL=quick" in str(error.value)

    def test_checksums_are_those_of_torchvision(self) -> None:
        """Of MNIST it knows those of the archives only; `test_form` reads the files."""
        kind = torchvision_datasets.CIFAR10
        meta = [kind.meta["filename"], kind.meta["md5"]]
        assert datasets.MD5["CIFAR10"] == {
            f"{kind.base_folder}/{file}": checksum
            for file, checksum in [*kind.train_list, *kind.test_list, meta]
        }

    @pytest.mark.parametrize("missing", ["torchvision", "torchvision.datasets"])
    def test_missing_extra_is_named(
        self, root: Path, name: str, missing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        with pytest.raises(ImportError, match=r"hbp\[tutorials\]"):
            LOADERS[name](train=True)

    @pytest.mark.parametrize("name", ["CIFAR10"])
    def test_missing_numpy_is_named(
        self, small: Files, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(small, root)
        monkeypatch.setitem(sys.modules, "numpy", None)
        with pytest.raises(ImportError, match=r"needs numpy.*hbp\[tutorials\]"):
            datasets.cifar10(train=True)

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
        assert labels.tolist() == list(map(int, official.targets))


def test_alice() -> None:
    """Four chapters, in plain characters: a tutorial learns to spell from them."""
    text = datasets.alice()
    assert len(text) == 45_229
    assert text.startswith("CHAPTER I\n\nDown the Rabbit-Hole\n\nAlice was beginning")
    assert text.isascii()
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "  " not in text
