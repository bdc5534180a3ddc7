"""Run the tutorials, or bring their two files into step.

Every tutorial is a pair: the script `tutorials/NAME.py`, which people edit, and
the executed notebook `tutorials/NAME.ipynb`, which people read. The script always
wins here. That is why this file exists: `jupytext --sync` trusts modification
times, and a freshly run notebook would silently undo an edited script.

    python tools/notebooks.py sync                   scripts -> notebooks
    python tools/notebooks.py run                    run, and overwrite the notebooks
    python tools/notebooks.py run --into FOLDER      run, and leave them as they are
    python tools/notebooks.py time                   run, and note only how long it took

A notebook remembers how long its last run took, where and when, once for the CPU and
once for a GPU. `run` overwrites its outputs, too; `time` on a GPU does not.
"""

from __future__ import annotations

import argparse
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
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "tutorials"


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
        if "solution" in cell.metadata.get("tags", []):
            # The first folds the source in Colab, the second in Jupyter.
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


def run(script: Path, folder: Path, timeout: int) -> None:
    """Run a script as a notebook in a fresh kernel; write it to `folder`."""
    notebook = from_script(script)
    target = folder / f"{script.stem}.ipynb"
    try:
        notebook.metadata["hbp"] = execute(notebook, script, timeout)
    finally:
        # A failed run is written too, when it goes to a folder of its own: the
        # half-finished notebook shows what went wrong.
        if folder != script.parent:
            write(notebook, target)
    if folder == script.parent:
        write(notebook, target)
    print(f"{script.stem}: see {target}")


def note_time(script: Path, timeout: int) -> None:
    """Run a script; add to its notebook how long that took, and change nothing else."""
    target = script.with_suffix(".ipynb")
    runs = execute(from_script(script), script, timeout)
    notebook = nbformat.read(target, 4)
    notebook.metadata["hbp"] = runs
    nbformat.write(notebook, target)


def execute(notebook: NotebookNode, script: Path, timeout: int) -> dict[str, Any]:
    """Run all cells; return the runs on record, with this one among them."""
    total = len(notebook.cells)

    def show(cell: NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            print(f"{script.stem}: cell {cell_index + 1} of {total}", flush=True)

    start = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=show,
        resources={"metadata": {"path": str(script.parent)}},
    ).execute()
    seconds = time.perf_counter() - start
    print(f"{script.stem}: done in {seconds:.0f} s")
    return recorded_runs(script.with_suffix(".ipynb")) | record(seconds)


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
    parser.add_argument("action", choices=["sync", "run", "time"])
    parser.add_argument("scripts", nargs="*", type=Path, help="default: all tutorials")
    parser.add_argument("--into", type=Path, default=TUTORIALS)
    parser.add_argument("--timeout", type=int, default=7200, help="seconds per cell")
    arguments = parser.parse_args()
    for script in arguments.scripts or sorted(TUTORIALS.glob("[0-9]*.py")):
        script = script.resolve()
        if arguments.action == "sync":
            sync(script)
        elif arguments.action == "time":
            note_time(script, arguments.timeout)
        else:
            run(script, arguments.into.resolve(), arguments.timeout)


if __name__ == "__main__":
    main()
