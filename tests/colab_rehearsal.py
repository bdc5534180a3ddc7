"""Run each tutorial as Colab would: the notebook alone, on a machine without hbp.

The machine is a bare environment with the packages that Colab brings along. The
notebook lies alone in an empty folder, and its install cell gets the wheel in
`dist/` instead of a package from the net. A cell that the notebook does not mark as
measured must print what the committed notebook has. `make colab` runs this.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
ON_COLAB = ["torch", "torchvision", "matplotlib", "scikit-learn", "tqdm", "ipykernel"]


def make_machine(folder: Path) -> Path:
    """Create the bare environment; return its folder of commands."""
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--seed", folder], check=True)
    install = [*uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
    pins = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, *pins, *ON_COLAB, "nbclient"], check=True)
    return folder / "bin"


def run(notebook: Path, commands: Path, wheel: Path) -> None:
    """Run a notebook in place, with hbp to be had only from the wheel."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HBP_"))}
    subprocess.run(
        [commands / "jupyter-execute", "--inplace", "--timeout=600", notebook.name],
        cwd=notebook.parent,
        env=kept | {"HBP_TUTORIAL": "quick", "HBP_INSTALL": str(wheel)},
        check=True,
    )


def compared_text(notebook: Path) -> list[str]:
    """Return what the exact and the claim cells of a notebook print."""
    return [
        "".join(text(output) for output in cell.outputs)
        for cell in nbformat.read(notebook, as_version=4).cells
        if cell.cell_type == "code"
        and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]


def text(output: NotebookNode) -> str:
    """Return the text of an output; figures have none that could be compared."""
    return output.get("text", output.get("data", {}).get("text/plain", ""))


def main() -> None:
    """Rehearse every tutorial in one bare environment."""
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"dist/ has {len(wheels)} wheels, not 1: `make clean wheel` first")
    with tempfile.TemporaryDirectory() as temporary:
        commands = make_machine(Path(temporary) / "machine")
        if not subprocess.run([commands / "python", "-c", "import hbp"]).returncode:
            sys.exit("the bare environment has hbp already: nothing is rehearsed")
        for committed in sorted((ROOT / "tutorials").glob("*.ipynb")):
            folder = Path(temporary) / committed.stem
            folder.mkdir()
            alone = Path(shutil.copy(committed, folder))
            run(alone, commands, wheels[0])
            here, there = compared_text(alone), compared_text(committed)
            if here != there:
                print(*difflib.unified_diff(there, here, "committed", "here"), sep="\n")
                sys.exit(f"{committed.name}: an exact or claim cell says otherwise")
            print(f"{committed.name}: runs alone, and its claims hold")


if __name__ == "__main__":
    main()
