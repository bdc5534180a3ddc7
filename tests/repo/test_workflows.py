"""The workflows of GitHub run what runs here; zizmor, in `make lint`, sees the rest."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from helpers import ROOT
from packaging.specifiers import SpecifierSet

WORKFLOWS = sorted(path.name for path in (ROOT / ".github" / "workflows").iterdir())
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def read(name: str) -> dict[Any, Any]:
    path = ROOT / ".github" / "workflows" / name
    return yaml.safe_load(path.read_text("utf-8"))


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in read(name)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_commands_are_targets_and_scripts_of_ours(name: str) -> None:
    commands = "\n".join(step.get("run", "") for step in steps(name))
    targets = {t for line in re.findall(r"\bmake (.+)", commands) for t in line.split()}
    scripts = re.findall(r"^bash (\S+)", commands, re.M)
    assert targets or scripts
    assert targets <= TARGETS
    assert all((ROOT / script).is_file() for script in scripts)


def test_every_promised_python_is_tried() -> None:
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    (required,) = re.findall(r'^requires-python = "(.+)"', PYPROJECT, re.M)
    site = (ROOT / ".github" / "workflows" / "site.yml").read_text("utf-8")
    tried = set(re.findall(r'"(3\.\d+)"', site))
    assert tried == set(promised)
    assert all(version in SpecifierSet(required) for version in tried)
    assert re.findall(r">=(3\.\d+)", required) == [promised[0]]


def test_site_is_checked_then_published_from_main_alone() -> None:
    site = read("site.yml")
    # YAML 1.1, which PyYAML reads, takes the word `on` for true.
    assert site[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    publish = site["jobs"]["publish"]
    assert publish["if"] == "github.event_name == 'push'"
    assert set(publish["needs"]) == set(site["jobs"]) - {"publish"}
    runs = {step.get("run") for step in steps("site.yml")}
    assert {"bash .ci/run", "make oldest"} <= runs


def test_release_is_that_of_a_tag_and_checked_first() -> None:
    release = read("release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["release"]["needs"] == "build"
    assert release["jobs"]["index"]["needs"] == "build"
    (check,) = (s for s in steps("release.yml") if "check-dist" in s.get("run", ""))
    assert check["env"] == {"TAG": "${{ github.ref_name }}"}
    assert 'tools/check_dist.py "$$TAG"' in (ROOT / "Makefile").read_text("utf-8")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_job_runs_for_ever_or_on_whatever_is_latest(name: str) -> None:
    for job in read(name)["jobs"].values():
        assert job["timeout-minutes"] <= 180
        assert not job["runs-on"].endswith("latest")
    assert read(name)["concurrency"]["group"]


def test_published_is_what_make_docs_builds() -> None:
    pages, docs, upload = read("site.yml")["jobs"]["check"]["steps"][-3:]
    assert docs["env"]["SITE_URL"] == f"${{{{ steps.{pages['id']}.outputs.base_url }}}}"
    mkdocs = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.findall(r"^site_url: !ENV \[(\w+),", mkdocs, re.M) == ["SITE_URL"]
    assert re.findall(r"^site_dir: (.+)", mkdocs, re.M) == [upload["with"]["path"]]
