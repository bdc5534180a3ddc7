"""The first cell of every tutorial, on a machine without hbp."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
import pytest
from helpers import ROOT

Install = Callable[..., Any]


def install_cell(script: Path) -> str:
    (cell,) = [
        cell.source
        for cell in jupytext.read(script).cells
        if cell.source.startswith("# @title")
    ]
    return str(cell)


CELLS = {
    path.stem: install_cell(path)
    for path in sorted((ROOT / "tutorials").glob("[0-9]*.py"))
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Run a cell in an empty folder; return what pip was asked to install."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HBP_INSTALL", raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", None)  # is not found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda pip, check: asked.append(pip))

    def run(cell: str = CELLS["00_hbp_in_a_hundred_lines"]) -> Any:
        exec(cell, {})
        for *pip, package in asked:
            assert pip == [sys.executable, "-m", "pip", "install", "-q"]
            return package
        return None

    return run


def test_the_cells_are_one() -> None:
    """But for the lines of the box."""
    box = re.compile(r"# @markdown(?:.+\n)+\n")
    assert len(CELLS) >= 8
    assert len({box.sub("", cell) for cell in CELLS.values()}) == 1


@pytest.mark.parametrize("name", CELLS)
def test_a_quick_run_can_be_chosen(
    name: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a box, where there is something to choose."""
    monkeypatch.setenv("HBP_INSTALL", "hbp")
    monkeypatch.setenv("HBP_TUTORIAL", "")
    cell = CELLS[name]
    text = (ROOT / "tutorials" / f"{name}.py").read_text("utf-8")
    assert ("quick_run = False" in cell) == ("quick()" in text)
    install(cell)
    assert os.environ["HBP_TUTORIAL"] == ""
    if "quick_run" in cell:
        exec(cell.replace("quick_run = False", "quick_run = True"), {})
        assert os.environ["HBP_TUTORIAL"] == "quick"


def test_by_name(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hbp-1-py3-none-any.whl").touch()
    monkeypatch.setenv("HBP_INSTALL", "../hbp")
    assert install() == "../hbp"


def test_a_wheel_beside_the_notebook(install: Install) -> None:
    Path("hbp-1-py3-none-any.whl").touch()
    assert Path(install()).name == "hbp-1-py3-none-any.whl"


def test_a_checkout_around_it(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src" / "hbp").mkdir(parents=True)
    (tmp_path / "tutorials").mkdir()
    monkeypatch.chdir(tmp_path / "tutorials")
    assert install() == tmp_path


def test_the_repository_once_it_is_named(install: Install) -> None:
    cell = CELLS["00_hbp_in_a_hundred_lines"]
    named = cell.replace('hbp_source = ""', 'hbp_source = "hbp @ git+there"')
    assert install(named) == "hbp @ git+there"


def test_colab_opens_its_dialogue(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SimpleNamespace(upload=lambda: {"hbp-1-py3-none-any.whl": b""})
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=files))
    assert install() == "hbp-1-py3-none-any.whl"


def test_elsewhere_it_says_what_to_do(install: Install) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"hbp-\*\.whl, beside.*HBP_INSTALL="):
        install()


def test_where_hbp_is_it_does_nothing(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    assert install() is None
