"""How many of the tests of "What is tested, and how" pass, and how long they take.

Run it as ``PYTHONPATH=tests python -m benchmarks.suite``; it takes some minutes. The
areas and their files are those of the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tested.md"


def areas() -> dict[str, list[str]]:
    """The areas of the page, and the names of their test files."""
    found = re.findall(
        r"^### (.+?)\n(?:(?!^###).)*?^Tests: (.+?)\.$",
        PAGE.read_text("utf-8"),
        re.M | re.S,
    )
    return {area: re.findall(r"test_\w+", names) for area, names in found}


def path(name: str) -> Path:
    """The file of tests with a name."""
    (found,) = (ROOT / "tests").rglob(f"{name}.py")
    return found


def run(names: list[str]) -> tuple[int, int, float]:
    """How many tests passed, how many did not, and the seconds of all.

    Those that are skipped, as they need a GPU or another package, count for neither.
    """
    files = [str(path(name)) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            stdout=subprocess.DEVNULL,
            check=False,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in .ci/run
        )
        suite = ElementTree.parse(report).getroot()[0].attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - failed - int(suite["skipped"])
    return passed, failed, float(suite["time"])


def main() -> None:
    """Run the tests of each area, and print a row for it."""
    print("| area | passed | failed | seconds |")
    print("|---|---:|---:|---:|")
    for area, names in areas().items():
        passed, failed, seconds = run(names)
        print(f"| {area} | {passed} | {failed} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
