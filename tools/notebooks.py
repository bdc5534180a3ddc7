"""Run the tutorials, or bring their two files into step.

Every tutorial is a pair: the script `tutorials/NAME.py`, which people edit, and
the executed notebook `tutorials/NAME.ipynb`, which people read. The script always
wins here. That is why this file exists: `jupytext --sync` trusts modification
times, and a freshly run notebook would silently undo an edited script.

    python tools/notebooks.py sync                   scripts -> notebooks
    python tools/notebooks.py run                    run, and overwrite the notebooks
    python tools/notebooks.py run --into FOLDER      run, and leave them as they are
    python tools/notebooks.py time                   run, and note only how long it took
    python tools/notebooks.py stale                  name what was run with other code
    python tools/notebooks.py vouch NAME             note: it prints the same with this

A notebook remembers how long its last run took, where and when, once for the CPU and
once for a GPU. `run` overwrites its outputs, too; `time` on a GPU does not. It also
remembers what its outputs depend on, as a hash: while that is the same, a run on the
official data would print what it printed, and nobody has to wait for it.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import hashlib
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import torch
from jupytext.combine import combine_inputs_with_outputs
from jupytext.config import load_jupytext_config
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "tutorials"


class Log:
    """Takes the place of a terminal where lines cannot be rewritten, as in a file."""

    last = ""

    def write(self, text: str) -> None:
        """Print a line of progress once, and nothing for what moves the cursor."""
        text = text.strip("\r\n ")
        if "cell" in text and text != self.last:
            print(text, file=sys.stderr, flush=True)
            self.last = text

    def flush(self) -> None:
        """Lines were flushed when they were printed."""


TERMINAL = sys.stderr.isatty()
# A line for each notebook, with its cells and seconds.
BAR: dict[str, Any] = {
    "bar_format": "{desc:<28} cell {n_fmt:>3} of {total_fmt}, {elapsed}",
    "mininterval": 0.1 if TERMINAL else 20.0,
    "file": None if TERMINAL else Log(),
}


def from_script(script: Path) -> NotebookNode:
    """The notebook that a script stands for, without outputs."""
    notebook = jupytext.read(script, config=load_jupytext_config(str(script)))
    tidy(notebook)
    return notebook


def tidy(notebook: NotebookNode) -> None:
    """Drop what changes from run to run, so that a second run changes no byte."""
    for key in set(notebook.metadata) - {"kernelspec", "accelerator", "colab", "hbp"}:
        del notebook.metadata[key]
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        # cellView folds the source in Colab, source_hidden in Jupyter.
        if cell.source.startswith("# @title"):
            cell.metadata.update(cellView="form")
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata.update(cellView="form", jupyter={"source_hidden": True})
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()


def recorded_runs(target: Path) -> dict[str, Any]:
    """What an executed notebook remembers of its runs, by device."""
    if not target.exists():
        return {}
    return dict(nbformat.read(target, 4).metadata.get("hbp", {}))


def record(seconds: float) -> dict[str, Any]:
    """A run that ended now, by device: how long it took, where and when."""
    sys.path.append(str(ROOT / "tests"))
    from benchmarks.measure import provenance

    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = provenance(device)
    changed = " with changes" if facts["uncommitted_changes"] else ""
    run: dict[str, Any] = {
        "seconds": round(seconds),
        "machine": facts["machine"],
        "date": str(facts["date"])[:10],
        "torch": torch.__version__.partition("+")[0],
        "commit": f"{facts['commit']}{changed}",
    }
    if device == "cpu":
        threads = torch.get_num_threads()
        run["machine"] += f", {threads} thread{'s' * (threads > 1)}"
    return {device: run}


def longest_first(scripts: list[Path]) -> list[Path]:
    """By their last runs on a CPU, so that what starts last is short."""

    def seconds(script: Path) -> float:
        runs = recorded_runs(script.with_suffix(".ipynb"))
        return runs["cpu"]["seconds"] if "cpu" in runs else math.inf

    return sorted(scripts, key=seconds, reverse=True)


def sync(script: Path) -> None:
    """Write the notebook of a script, keeping the outputs of unchanged cells."""
    notebook = from_script(script)
    target = script.with_suffix(".ipynb")
    if target.exists():
        notebook = combine_inputs_with_outputs(notebook, nbformat.read(target, 4))
        notebook.metadata["hbp"] = recorded_runs(target)
        tidy(notebook)
    nbformat.write(notebook, target)
    print(f"{script.stem}: notebook written from its script")


def fingerprint(script: Path) -> str:
    """A hash of what the outputs of a tutorial depend on.

    That is the package and the tutorial's own code, both without comments and
    docstrings, and the pinned versions of what computes.
    """
    files = [*sorted((ROOT / "src" / "hbp").rglob("*.py")), script]
    codes = [bare_code(path, shown=path == script) for path in files]
    pairs = zip(files, codes, strict=True)
    parts = [f"{path.relative_to(ROOT)}\n{code}" for path, code in pairs]
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    parts += re.findall(r"^(?:torch|torchvision|numpy|scikit-learn)==.*", pins, re.M)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def bare_code(path: Path, shown: bool = False) -> str:
    """The code of a file, as text that neither comments nor docstrings change.

    Args:
        path: Of the file.
        shown: Whether a string that stands alone may be the output of a cell. In other
            files it is the docstring of what stands before it.
    """
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            # The body of what has a docstring is never empty.
            rest = node.body[ast.get_docstring(node) is not None :]
            node.body = [line for line in rest if shown or not is_text(line)]
    return ast.unparse(tree)


def is_text(line: ast.stmt) -> bool:
    """Whether it is a string and nothing else, as a docstring is."""
    alone = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    return alone and isinstance(line.value.value, str)


def stale(script: Path) -> bool:
    """Whether the committed outputs are those of other code, or of an unknown one."""
    notebook = nbformat.read(script.with_suffix(".ipynb"), 4)
    return notebook.metadata["hbp"].get("code") != fingerprint(script)


def vouch(script: Path) -> None:
    """Note that the outputs were compared with a run of the code as it is now."""
    target = script.with_suffix(".ipynb")
    notebook = nbformat.read(target, 4)
    notebook.metadata["hbp"]["code"] = fingerprint(script)
    nbformat.write(notebook, target)


async def run(script: Path, folder: Path, timeout: int, bar: tqdm) -> None:
    """Run a script as a notebook in a fresh kernel; write it to `folder`."""
    notebook = from_script(script)
    target = folder / f"{script.stem}.ipynb"
    code = fingerprint(script)
    try:
        runs = await execute(notebook, script, timeout, bar)
        notebook.metadata["hbp"] = runs | {"code": code}
    finally:
        # A failed run is written too, when it goes to a folder of its own: the
        # half-finished notebook shows what went wrong.
        if folder != script.parent:
            write(notebook, target)
    if folder == script.parent:
        write(notebook, target)


async def note_time(script: Path, timeout: int, bar: tqdm) -> None:
    """Run a script; add to its notebook how long that took, and change nothing else."""
    target = script.with_suffix(".ipynb")
    runs = await execute(from_script(script), script, timeout, bar)
    notebook = nbformat.read(target, 4)
    notebook.metadata["hbp"] = runs
    nbformat.write(notebook, target)


async def execute(
    notebook: NotebookNode, script: Path, timeout: int, bar: tqdm
) -> dict[str, Any]:
    """Run all cells; return the runs on record, with this one among them."""
    start = time.perf_counter()
    await NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # It remarks on its own sockets.
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=lambda cell, cell_index: bar.update(cell_index - bar.n),
        resources={"metadata": {"path": str(script.parent)}},
    ).async_execute()
    bar.update(bar.total - bar.n)
    seconds = time.perf_counter() - start
    return recorded_runs(script.with_suffix(".ipynb")) | record(seconds)


async def run_each(scripts: list[Path], arguments: argparse.Namespace) -> list[str]:
    """Run the scripts, with a line of progress for each; return what went wrong."""
    free = asyncio.Semaphore(arguments.jobs)
    wrong = []

    async def one(script: Path, line: int) -> None:
        cells = len(from_script(script).cells)
        async with free:
            with tqdm(total=cells, desc=script.stem, position=line, **BAR) as bar:
                try:
                    if arguments.action == "time":
                        await note_time(script, arguments.timeout, bar)
                    else:
                        into = arguments.into.resolve()
                        await run(script, into, arguments.timeout, bar)
                except (CellControlSignal, DeadKernelError) as error:
                    wrong.append(f"{script.stem}: {error}")

    await asyncio.gather(*(one(script, line) for line, script in enumerate(scripts)))
    return wrong


def write(notebook: NotebookNode, target: Path) -> None:
    """Write a notebook, and beside a copy in a build folder a page to look at."""
    tidy(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    if target.parent != TUTORIALS:
        from nbconvert import HTMLExporter

        page, _ = HTMLExporter().from_notebook_node(notebook)
        target.with_suffix(".html").write_text(page, encoding="utf-8")


def main() -> None:
    """Read the command line and do it for every tutorial, or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = ["sync", "run", "time", "stale", "vouch"]
    parser.add_argument("action", choices=actions)
    parser.add_argument("scripts", nargs="*", type=Path, help="default: all tutorials")
    parser.add_argument("--into", type=Path, default=TUTORIALS)
    parser.add_argument("--timeout", type=int, default=7200, help="seconds per cell")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    arguments = parser.parse_args()
    found = arguments.scripts or sorted(TUTORIALS.glob("[0-9]*.py"))
    scripts = [script.resolve().with_suffix(".py") for script in found]
    if arguments.action in ("sync", "vouch"):
        for script in scripts:
            sync(script) if arguments.action == "sync" else vouch(script)
    elif arguments.action == "stale":
        for script in filter(stale, longest_first(scripts)):
            print(script.with_suffix(".ipynb").relative_to(ROOT))
    else:
        run_all(scripts, arguments)


def run_all(scripts: list[Path], arguments: argparse.Namespace) -> None:
    """Run the scripts, some at a time; say where to look, and what went wrong."""
    if arguments.jobs > 1:
        # Processes that all want all cores would slow each other down.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)  # As the kernels; it goes on record.
    wrong = asyncio.run(run_each(longest_first(scripts), arguments))
    if arguments.into != TUTORIALS:
        print("Open these in a browser or a notebook editor:")
        for script in sorted(scripts):
            print(f"  {(arguments.into / script.stem).with_suffix('.html')}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
