"""What is shipped, and what importing it takes."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, load

import hbp

check = load(ROOT / "tools" / "check_dist.py")
VERSION = "0.1.0"
INFO = f"hbp-{VERSION}.dist-info"
TOP = f"hbp-{VERSION}"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture
def wheel(archives: Path) -> dict[str, bytes]:
    return check.in_wheel(next(archives.glob("*.whl")))


@pytest.fixture
def sdist(archives: Path) -> dict[str, bytes]:
    return check.in_sdist(next(archives.glob("*.tar.gz")))


def test_import_needs_only_torch() -> None:
    """Pretend that nothing else of what the tutorials use is installed."""
    extras = ["matplotlib", "numpy", "sklearn", "torchvision", "tqdm", "scipy"]
    code = (
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')  # torch says that it misses NumPy\n"
        f"sys.modules.update(dict.fromkeys({extras}))\n"
        "import hbp\n"
        "hbp.set_seeds(0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_archives_hold_the_package_and_nothing_else(wheel, sdist) -> None:
    assert list(check.wrong_wheel(wheel, ROOT, VERSION)) == []
    assert list(check.wrong_sdist(sdist, ROOT, VERSION)) == []
    assert "hbp/py.typed" in wheel
    assert f"{TOP}/src/hbp/py.typed" in sdist


def test_metadata_say_what_the_project_says(wheel, sdist) -> None:
    for metadata in (wheel[f"{INFO}/METADATA"], sdist[f"{TOP}/PKG-INFO"]):
        assert list(check.wrong_metadata(metadata, ROOT, VERSION)) == []


def test_the_readme_names_the_oldest_versions() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    (python,) = re.findall(r'^requires-python = ">=(.+)"', project, re.M)
    (torch,) = re.findall(r'^dependencies = \["torch>=(.+)"\]', project, re.M)
    assert f"Python {python} or newer" in readme
    assert f"torch {torch} or newer" in readme


def test_the_version_is_the_same_everywhere() -> None:
    assert hbp.__version__ == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_a_wrong_file_is_noticed(wheel, sdist) -> None:
    """The checker is checked: `make check-dist` lets no release pass without it."""
    del wheel["hbp/py.typed"]
    wheel |= {"hbp/notes.txt": b"", "hbp/seeds.py": b""}
    assert list(check.wrong_wheel(wheel, ROOT, VERSION)) == [
        "lacks hbp/py.typed",
        "should not hold hbp/notes.txt",
        "holds another hbp/seeds.py than this working tree; `make wheel` again",
    ]
    del sdist[f"{TOP}/LICENSE"]
    sdist |= {f"{TOP}/tests/test_a.py": b""}
    assert list(check.wrong_sdist(sdist, ROOT, VERSION)) == [
        f"lacks {TOP}/LICENSE",
        f"should not hold {TOP}/tests/test_a.py",
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("Version: 0.1.0", "Version: 0.2.0", "says version 0.2.0, not 0.1.0"),
        ("Name: hbp", "Name: -hbp", "invalid metadata"),
        ("Requires-Python: >=3.11", "Requires-Python: new", "invalid metadata"),
        ("text/markdown", "text/plain", "in text/plain, not Markdown"),
        ("# hbp: Hessian", "# hbp: Jacobian", "other words than README.md"),
        ("Released under the", "Sold under the", "other words than README.md"),
        ("](https://arxiv.org/", "](docs/", "an index cannot follow: ['docs/abs/19"),
        ("Provides-Extra: tutorials", "Provides-Extra: extra", "lacks the extra"),
        ("torch>=2.4", "torch>=2.4\nRequires-Dist: numpy", "not torch alone"),
    ],
)
def test_wrong_metadata_are_noticed(
    wheel, right: str, wrong: str, problem: str
) -> None:
    metadata = wheel[f"{INFO}/METADATA"].decode()
    assert right in metadata
    found = check.wrong_metadata(
        metadata.replace(right, wrong, 1).encode(), ROOT, VERSION
    )
    assert any(problem in line for line in found)


def test_a_type_checker_sees_the_types(archives: Path, tmp_path: Path) -> None:
    """As long as `py.typed` is installed, too."""
    machine = tmp_path / "machine"
    venv.create(machine, with_pip=False)
    python = machine / "bin" / "python"
    (packages,) = machine.glob("lib/python*/site-packages")
    with zipfile.ZipFile(next(archives.glob("*.whl"))) as archive:
        archive.extractall(packages)
    assert list(check.wrong_types(python)) == []
    (packages / "hbp" / "py.typed").unlink()
    (problem,) = check.wrong_types(python)
    assert "[import-untyped]" in problem


def test_a_tag_names_the_version_and_the_changelog_has_it(tmp_path: Path) -> None:
    assert check.wrong_tag("v0.1.0", VERSION, ROOT) is None
    assert "the tag is v0.2.0" in check.wrong_tag("v0.2.0", VERSION, ROOT)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "changelog.md").write_text("# Changelog\n\n## 0.0.9\n")
    assert "no section 0.1.0" in check.wrong_tag("v0.1.0", VERSION, tmp_path)


def test_links_that_an_index_cannot_follow_are_named() -> None:
    text = "[a](docs/a.md) ![b](b.svg) [c](https://arxiv.org) [d](#e) [f](mailto:g)"
    assert check.relative_targets(text) == ["docs/a.md", "b.svg"]


def test_a_second_build_with_other_bytes_is_noticed(archives: Path) -> None:
    wheel, sdist = next(archives.glob("*.whl")), next(archives.glob("*.tar.gz"))
    assert list(check.wrong_second_build(wheel, sdist)) == []
    wheel.write_bytes(wheel.read_bytes() + b" ")
    assert list(check.wrong_second_build(wheel, sdist)) == [
        f"{wheel.name} has other bytes when built once more"
    ]
