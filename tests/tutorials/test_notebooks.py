"""What nbval does not see: the tutorials as files.

nbval passes a notebook that was never run, since there is nothing to compare. So
these tests look at what is stored. They take a second and run nothing.
"""

from __future__ import annotations

import ast
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from helpers import ROOT, load
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

TUTORIALS = ROOT / "tutorials"
SCRIPTS = sorted(TUTORIALS.glob("[0-9]*.py"))
LINE_LENGTH = 70  # the width of a code column on the site
KNOWN_TAGS = {"nbval-ignore-output", "solution"}
WITH_EXERCISES = [
    "01_single",
    "02_sequential_cifar10",
    "03a_what",
    "03b_negative",
    "04_write_your_own_layer",
    "05_convolutional",
    "06_when",
    "07_is_muon",
]


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(script: Path) -> NotebookNode:
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


@pytest.fixture
def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cells: list[NotebookNode]) -> list[tuple[NotebookNode, Any]]:
    return [(cell, output) for cell in cells for output in cell.outputs]


def is_figure(output: NotebookNode) -> bool:
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def test_tutorials_come_in_pairs() -> None:
    notebooks = {path.stem for path in TUTORIALS.glob("*.ipynb")}
    assert notebooks == {path.stem for path in SCRIPTS}
    assert {"00_hbp_in_a_hundred_lines", "01_single_layer_mnist"} <= notebooks


def test_notebooks_import_what_colab_has(code_cells: list[NotebookNode]) -> None:
    """And the package: so that a rehearsal of two of them speaks for all."""
    trees = [ast.parse(cell.source) for cell in code_cells]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [
        n.name for node in nodes if isinstance(node, ast.Import) for n in node.names
    ]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    found = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert "hbp" in found
    known = load(ROOT / "tests" / "colab_rehearsal.py").ON_COLAB
    assert found <= {"google", "hbp", "sklearn", *known} - {"scikit-learn"}


def test_script_and_notebook_are_the_same(script: Path, notebook: NotebookNode) -> None:
    config = load_jupytext_config(str(script))
    from_notebook = jupytext.writes(notebook, fmt="py:percent", config=config)
    assert from_notebook == script.read_text(encoding="utf-8"), (
        "the notebook is not that of its script: `make sync` writes it anew"
    )


def test_notebook_is_valid(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)


def test_cells_were_run_in_order(code_cells: list[NotebookNode]) -> None:
    counts = [cell.execution_count for cell in code_cells]
    assert counts == list(range(1, len(code_cells) + 1)), "`make execute` runs them"


def test_no_error_or_warning_is_stored(code_cells: list[NotebookNode]) -> None:
    for cell, output in outputs(code_cells):
        assert output.output_type != "error", cell.source
        assert output.get("name") != "stderr", output.text


def test_something_is_compared(code_cells: list[NotebookNode]) -> None:
    """A notebook of measured cells alone would pass with any numbers."""
    compared = [
        output
        for cell, output in outputs(code_cells)
        if "nbval-ignore-output" not in cell.metadata.get("tags", [])
        and not is_figure(output)
    ]
    assert len(compared) >= 3


def test_lines_fit_the_page(code_cells: list[NotebookNode]) -> None:
    lines = [line for cell in code_cells for line in cell.source.splitlines()]
    # The address of the repository is as long as it is.
    lines = [line for line in lines if not line.startswith("hbp_source = ")]
    assert [line for line in lines if len(line) > LINE_LENGTH] == []


def test_every_figure_has_a_text_alternative(code_cells: list[NotebookNode]) -> None:
    figures = [cell for cell, output in outputs(code_cells) if is_figure(output)]
    assert figures, "the tutorial shows nothing"
    for cell in figures:
        assert len(cell.metadata.get("alt", "")) >= 20, cell.source


def test_no_text_alternative_without_a_figure(code_cells: list[NotebookNode]) -> None:
    for cell in code_cells:
        if "alt" in cell.metadata:
            assert any(is_figure(output) for output in cell.outputs), cell.source


def test_tags_are_known(notebook: NotebookNode) -> None:
    """A misspelt tag has no effect, in silence."""
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert tags <= KNOWN_TAGS


def test_metadata_asks_for_a_gpu_and_tells_of_runs(notebook: NotebookNode) -> None:
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"accelerator", "colab", "hbp", "kernelspec"}
    runs = {key: run for key, run in notebook.metadata.hbp.items() if key != "code"}
    assert {"cpu"} <= set(runs) <= {"cpu", "cuda"}
    for run in runs.values():
        assert set(run) == {"seconds", "machine", "date", "torch", "commit"}
        assert run["seconds"] > 0


def is_solution(cell: NotebookNode) -> bool:
    return "solution" in cell.metadata.get("tags", [])


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_exercises_have_solutions(name: str) -> None:
    (path,) = TUTORIALS.glob(f"{name}*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    exercises = [k for k, cell in enumerate(cells) if "**Exercise" in cell.source]
    assert len(exercises) >= 3
    assert all(is_solution(cells[k + 1]) for k in exercises)


def test_solutions_are_folded_and_checked(notebook: NotebookNode) -> None:
    for solution, group in groupby(notebook.cells, is_solution):
        if solution:
            cells = list(group)
            assert all(cell.metadata.cellView == "form" for cell in cells)
            assert all(cell.metadata.jupyter.source_hidden for cell in cells)
            assert "assert" in "".join(cell.source for cell in cells)


def test_long_output_is_not_the_page(code_cells: list[NotebookNode]) -> None:
    """A figure is a file beside the page, whose size the reader pays for as well."""
    for cell, output in outputs(code_cells):
        svg = output.get("data", {}).get("image/svg+xml", "")
        assert len(svg) < 250_000, cell.source


def test_the_hash_of_code_sees_what_computes_alone(tmp_path: Path) -> None:
    """Comments and docstrings are free; a number, a name or another pin is not."""
    bare_code = load(ROOT / "tools" / "notebooks.py").bare_code
    path = tmp_path / "a.py"

    def bare(text: str, shown: bool = False) -> str:
        path.write_text(text, "utf-8")
        return bare_code(path, shown)

    code = 'def f(x):\n    """Say."""\n    return x + 1\n'
    same = (
        '# %%\n# Say.\ndef f(x):\n    """Tell\n\n    more."""\n    return x+1 # one\n'
    )
    assert bare(code) == bare(same)
    assert bare(code) != bare(code.replace("1", "2"))
    assert bare(code) != bare(code.replace("return x", "return f(x)"))
    # A text counts unless it stands alone.
    assert bare("x = 'a'") != bare("x = 'b'")
    assert bare("x = 1\n'It is one.'") == bare("x = 1")
    # So does one that is the output of a cell.
    assert bare("x = 1\n'a'", shown=True) != bare("x = 1\n'b'", shown=True)


def test_the_hash_reads_the_package_the_script_and_the_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load(ROOT / "tools" / "notebooks.py")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    files = {"src/hbp/a.py": "x = 1", "constraints.txt": "torch==1\nruff==1\n"}
    files["tutorials/01.py"] = "y = 1"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = tmp_path / "tutorials" / "01.py"
    before = tool.fingerprint(script)
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace("1", "2", 1))
        assert tool.fingerprint(script) != before
        (tmp_path / name).write_text(text)
    (tmp_path / "constraints.txt").write_text("torch==1\nruff==2\n")
    assert tool.fingerprint(script) == before
