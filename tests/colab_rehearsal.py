"""Run each tutorial as Colab would: the notebook alone, on a machine without hbp.

The machine is a bare environment with the packages that Colab brings along. The
notebook lies alone in an empty folder, and its install cell gets the wheel in `dist/`
instead of a package from the net: from the dialogue of Colab, as a file beside the
notebook, or by its name, in turn. Every cell has to run, those that solve exercises
too. A cell that the notebook does not mark as measured must print what the committed
notebook has. `make colab` runs this; `NOTEBOOKS="00 01"` those that begin so.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
# All of these are on Colab before a notebook begins: what hbp needs, what the
# tutorials draw and show progress with, where the small data come from, the kernel.
ON_COLAB = ["torch", "torchvision", "matplotlib", "scikit-learn", "tqdm", "ipykernel"]
# Colab's page runs the cells. Here this does.
RUNNER = ["nbclient"]
# Settings of this machine, which another one would not have.
OURS = ("HBP_", "IPYTHON", "JUPYTER", "MPL", "PIP_", "PYTHON", "UV_", "VIRTUAL_ENV")

# What stands in for Colab's dialogue: it saves the chosen file beside the notebook.
DIALOGUE = """
import shutil
from types import SimpleNamespace

def upload():
    return {{shutil.copy({wheel!r}, "."): b""}}

files = SimpleNamespace(upload=upload)
"""

# The folders of commands of those that are free.
Machines = SimpleQueue[Path]


def make_machine(folder: Path) -> Path:
    """Create the bare environment; return its folder of commands."""
    uv = [sys.executable, "-m", "uv"]
    venv = [*uv, "venv", "--quiet", "--seed", "--python", sys.executable]
    subprocess.run([*venv, folder], check=True)
    install = [*uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
    pins = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, *pins, *ON_COLAB, *RUNNER], check=True)
    return folder / "bin"


def offer(wheel: Path, way: int, folder: Path) -> dict[str, str]:
    """Let a notebook's install cell find the wheel; return settings for it."""
    if way == 0:
        colab = folder / "packages" / "google" / "colab" / "__init__.py"
        colab.parent.mkdir(parents=True)
        colab.write_text(DIALOGUE.format(wheel=str(wheel)))
        return {"PYTHONPATH": str(folder / "packages")}
    if way == 1:
        shutil.copy(wheel, folder)
        return {}
    return {"HBP_INSTALL": str(wheel)}


def run(notebook: Path, commands: Path, offered: dict[str, str]) -> bool:
    """Run a notebook in place, with hbp to be had only from what is offered."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    settings = offered | {
        "HBP_TUTORIAL": "quick",
        # The wheel must find all that it needs: pip would fetch what is missing, and
        # would remark on its own age in the output of the cell.
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    execute = [commands / "jupyter-execute", "--inplace", "--timeout=600"]
    done = subprocess.run(
        [*execute, notebook.name], cwd=notebook.parent, env=kept | settings
    )
    return done.returncode == 0


def code_cells(notebook: Path) -> list[NotebookNode]:
    """Return the cells of a notebook that can be run."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def compared_text(cells: list[NotebookNode]) -> list[str]:
    """Return the lines that exact and claim cells print, after the cells' numbers."""
    return [
        f"cell {number}: {line}"
        for number, cell in enumerate(cells, start=1)
        if "nbval-ignore-output" not in cell.metadata.get("tags", [])
        # The install cell may ask.
        and not cell.source.startswith("# @title")
        # A stream may arrive in pieces that end anywhere: join them first.
        for line in "".join(text(output) for output in cell.outputs).splitlines()
    ]


def text(output: NotebookNode) -> str:
    """Return the text of an output; figures have none that could be compared."""
    return output.get("text", output.get("data", {}).get("text/plain", ""))


def differences(here: Path, committed: Path) -> list[str]:
    """Say which cells did not run, and where an exact or a claim cell differs."""
    ran, stored = code_cells(here), code_cells(committed)
    skipped = [n for n, cell in enumerate(ran, start=1) if cell.execution_count != n]
    there, now = compared_text(stored), compared_text(ran)
    if not there:
        return ["the committed notebook has nothing to compare with"]
    return [
        *(f"cell {number} was not run" for number in skipped),
        *difflib.unified_diff(there, now, "committed", "here", lineterm="", n=0),
    ]


def rehearse(
    committed: Path, way: int, folder: Path, machines: Machines, wheel: Path
) -> bool:
    """Run a notebook alone in a folder, on a free machine; say what is wrong."""
    folder.mkdir()
    alone = Path(shutil.copy(committed, folder))
    commands = machines.get()
    start = time.perf_counter()
    wrong = ["it stops with an error"]
    try:
        if run(alone, commands, offer(wheel, way, folder)):
            wrong = differences(alone, committed)
        # The next notebook finds the machine as bare as the first one did.
        uninstall = [commands / "pip", "uninstall", "--quiet", "--yes", "hbp"]
        subprocess.run(uninstall, check=True)
    finally:
        machines.put(commands)
    seconds = f"{time.perf_counter() - start:.0f} s"
    verdict = "FAILED" if wrong else "runs alone, and its claims hold"
    lines = [f"{committed.name}: {verdict} ({seconds})", *wrong]
    print("\n".join(lines), flush=True)
    return not wrong


def main() -> None:
    """Rehearse every tutorial, two at a time, each in a bare environment."""
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"dist/ has {len(wheels)} wheels, not 1: `make wheel` first")
    notebooks = sorted((ROOT / "tutorials").glob("*.ipynb"))
    if chosen := tuple(sys.argv[1:]):
        notebooks = [path for path in notebooks if path.name.startswith(chosen)]
        if not notebooks:
            sys.exit(f"no notebook begins with {' or '.join(chosen)}")
    machines: Machines = SimpleQueue()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        for name in "ab":
            machines.put(commands := make_machine(Path(temporary) / name))
            look = [commands / "python", "-c", "import hbp"]
            found = subprocess.run(look, cwd=temporary, stderr=subprocess.DEVNULL)
            if found.returncode == 0:
                sys.exit("the bare environment has hbp already: nothing is rehearsed")
        folders = [Path(temporary) / notebook.stem for notebook in notebooks]
        ways = [number % 3 for number in range(len(notebooks))]
        ran = partial(rehearse, machines=machines, wheel=wheels[0])
        verdicts = pool.map(ran, notebooks, ways, folders)
        good = dict(zip(notebooks, verdicts, strict=True))
    if failed := [notebook.name for notebook in notebooks if not good[notebook]]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
