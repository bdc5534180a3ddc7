"""The workflows of GitHub run what runs here; zizmor, in `make lint`, sees the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from packaging.specifiers import SpecifierSet

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_targets_and_scripts_of_ours(path: Path) -> None:
    commands = "\n".join(step.get("run", "") for step in steps(path))
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


def test_published_is_what_make_docs_builds() -> None:
    site = yaml.safe_load((ROOT / ".github" / "workflows" / "site.yml").read_text())
    pages, docs, upload = site["jobs"]["check"]["steps"][-3:]
    assert docs["env"]["SITE_URL"] == f"${{{{ steps.{pages['id']}.outputs.base_url }}}}"
    mkdocs = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.findall(r"^site_url: !ENV \[(\w+),", mkdocs, re.M) == ["SITE_URL"]
    assert re.findall(r"^site_dir: (.+)", mkdocs, re.M) == [upload["with"]["path"]]
