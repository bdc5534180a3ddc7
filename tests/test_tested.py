"""The numbers of docs/tested.md are those of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import parallel_worker
import pytest
import test_bad_days
import test_datasets
import test_fuzz
import test_long_runs
import test_parallel
from benchmarks import endurance

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tested.md").read_text("utf-8")


@pytest.mark.parametrize(
    "said",
    [
        f"| {len(list(parallel_worker.tasks()))} trainings each: "
        f"{len(parallel_worker.NETS)} networks,",
        f"| {len(test_parallel.FAULTS)} ways | an error in all processes",
        f"| {test_long_runs.KILLS} times | it goes on from its checkpoint",
        f"| {len(test_bad_days.FAULTS)} faults in {len(test_bad_days.NETWORKS)} "
        f"networks, with a sample of {len(test_bad_days.SETTINGS)} settings |",
        f"| {len(test_fuzz.CALLS)} functions and classes |",
        f"| {len(test_datasets.FAULTS) * len(test_datasets.READ)} ways | the file is",
        f"| {len(endurance.WAYS)} ways of stepping |",
    ],
)
def test_the_page_counts_as_the_tests_do(said: str) -> None:
    assert said in PAGE


def test_every_table_names_tests_that_exist() -> None:
    lines = re.findall(r"^Tests: (.*)$", PAGE, re.M)
    assert len(lines) == PAGE.count("| what happens |") > 5
    for name in re.findall(r"test_\w+", " ".join(lines)):
        assert (ROOT / "tests" / f"{name}.py").exists()


@pytest.mark.parametrize("name", ["endurance", "joint", "precision"])
def test_tables_have_the_rows_of_their_script(name: str) -> None:
    table = (ROOT / "docs" / "assets" / "measured" / f"{name}.md").read_text("utf-8")
    assert all(line.startswith("|") for line in table.splitlines())
    assert f'--8<-- "{name}.md"' in PAGE + (ROOT / "docs/precision.md").read_text()


def test_memory_did_not_grow() -> None:
    """Measured: the same MiB at 100, 1,000 and 10,000 steps."""
    table = (ROOT / "docs" / "assets" / "measured" / "endurance.md").read_text("utf-8")
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    cells = [[float(cell.replace(",", "")) for cell in row] for row in rows]
    assert [row[0] for row in cells] == [100, 1000, 10000]
    first, *others = cells
    for row in others:
        assert row[1] < first[1] + 8
        assert row[2:4] == first[2:4]
