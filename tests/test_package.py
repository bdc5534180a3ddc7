"""What is shipped, and what importing it takes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def test_archives_hold_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    modules = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "hbp").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }

    (wheel,) = tmp_path.glob("*.whl")
    info = "hbp-0.1.0.dist-info"
    about = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == modules | {f"{info}/{x}" for x in about}
        metadata = archive.read(f"{info}/METADATA").decode()
    requirements = [x for x in metadata.splitlines() if x.startswith("Requires-Dist")]
    assert [x for x in requirements if "extra ==" not in x] == [
        "Requires-Dist: torch>=2.4"
    ]

    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    about = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    assert names == about | {f"src/{name}" for name in modules}
