"""The numbers of docs/tested.md are those of the tests."""

from __future__ import annotations

import parallel_worker
import pytest
import test_bad_days
import test_checkpoint
import test_datasets
import test_fuzz
import test_long_runs
import test_parallel
from benchmarks import endurance, joint, precision, suite
from helpers import ROOT

PAGE = (ROOT / "docs" / "tested.md").read_text("utf-8")


@pytest.mark.parametrize(
    "said",
    [
        f"| {len(list(parallel_worker.tasks()))} trainings each: "
        f"{len(parallel_worker.NETS)} networks,",
        f"| {len(test_parallel.FAULTS)} ways | an error in all processes",
        f"| {test_checkpoint.KILLS} times | it goes on from its file",
        f"| {test_long_runs.INTERRUPTS} times | metrics and figures",
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
    areas = suite.areas()
    assert len(areas) == PAGE.count("| what happens |") > 5
    for names in areas.values():
        assert names
        assert all(suite.path(name) for name in names)


def table(name: str) -> list[list[str]]:
    """The rows of a table that `make bench-tested` has written, but for its head."""
    path = ROOT / "docs" / "assets" / "measured" / f"{name}.md"
    lines = path.read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def numbers(row: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in row]


def test_tables_have_the_rows_of_their_script() -> None:
    assert [row[0] for row in table("joint")] == list(joint.SCHEMES)
    assert [row[0] for row in table("suite")] == list(suite.areas())
    forward = {row[1] for row in table("precision")}
    assert forward == {p.name for p in (precision.EXACT, *precision.PRECISIONS)}


def test_all_tests_of_every_area_passed() -> None:
    for _, passed, failed, seconds in table("suite"):
        assert int(passed) > 0
        assert int(failed) == 0
        assert float(seconds) > 0


def test_memory_did_not_grow() -> None:
    """Measured: the same MiB and tensors at 100, 1,000 and 10,000 steps."""
    first, *others = map(numbers, table("endurance"))
    assert [first[0], *(row[0] for row in others)] == [100, 1000, 10000]
    for row in others:
        assert row[1] < first[1] + 8
        assert row[2:4] == first[2:4]


def test_the_projection_reckons_with_the_measured_stages() -> None:
    """What docs/parallel.md says of a fixed batch, and the bytes of the gradients."""
    page = (ROOT / "docs" / "parallel.md").read_text("utf-8")
    assets = ROOT / "docs" / "assets" / "benchmarks"
    lines = (assets / "cpu-stages-mid-training-cg.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[2:]]
    ms = {stage: float(seconds) for stage, seconds in cells}
    batch = ms["forward"] + ms["output Hessian"] + ms["backward"]
    curvature = ms["Hessian backpropagation"] + ms["solve"] + ms["update"]
    # The page's numbers are rounded, and so are those of the table.
    assert f"= {batch:.1f} ms" in page
    assert f"= {curvature:.1f} ms" in page
    limit = (batch + curvature) / curvature
    assert f"at most {limit:.1f} times as fast" in page

    parameters = sum(p.numel() for p in joint.network().parameters())
    assert f"{parameters / 1e6:.1f}\nmillion parameters" in page
    assert f"hence {4 * parameters / 2**20:.1f} MiB of gradients" in page
