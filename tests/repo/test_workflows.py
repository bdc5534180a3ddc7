"""The workflows of GitHub, as files: what can be known of them without GitHub.

A workflow runs the targets that run here, with official actions and no more rights
than each job needs. The last test breaks every rule once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from packaging.specifiers import SpecifierSet

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.M))
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
PYTHON = SpecifierSet(re.findall(r'^requires-python = "(.+)"', PYPROJECT, re.M)[0])

# GitHub's own actions by their major version, and the one of the package index.
OFFICIAL = re.compile(r"actions/[a-z-]+@v\d+|pypa/gh-action-pypi-publish@release/v1")
# What a job may do, if it is not just to read this repository.
RIGHTS = {
    "check": {"contents": "read", "pages": "read"},
    "publish": {"pages": "write", "id-token": "write"},
    "release": {"contents": "write"},
    "index": {"id-token": "write"},
}
HOST = re.compile(r"\w://|\b[\w-]+\.(?:com|org|io|net|dev)\b")
MINUTES = 60


def steps(workflow: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for job, content in workflow["jobs"].items():
        for step in content["steps"]:
            yield job, step


def commands(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for _, step in steps(workflow) if "run" in step]


def unknown_targets(workflow: dict[str, Any]) -> Iterator[str]:
    ours = 0
    for command in commands(workflow):
        for script in re.findall(r"^bash (\S+)", command, re.M):
            ours += 1
            if not (ROOT / script).is_file():
                yield f"{script} does not exist"
        for line in re.findall(r"\bmake (.*)", command):
            ours += 1
            for target in set(line.split()) - TARGETS:
                yield f"make has no target {target}"
    if not ours:
        yield "nothing runs that runs here"


def foreign_actions(workflow: dict[str, Any]) -> Iterator[str]:
    for _, step in steps(workflow):
        if "uses" in step and not OFFICIAL.fullmatch(step["uses"]):
            yield f"{step['uses']} is not an official action at a major version"


def too_many_rights(workflow: dict[str, Any]) -> Iterator[str]:
    if workflow.get("permissions") != {"contents": "read"}:
        yield "more may be done than reading this repository"
    for name, job in workflow["jobs"].items():
        if job.get("permissions", {}) != RIGHTS.get(name, {}):
            yield f"the rights of {name} are {job.get('permissions')}"
    for name, step in steps(workflow):
        # Code that others propose, or that a package brings, gets no right to write.
        code = str(step.get("uses")).startswith("actions/checkout")
        if code and "write" in RIGHTS.get(name, {}).values():
            yield f"{name} may write, and runs the code of the repository"
        if code and step.get("with", {}).get("persist-credentials") is not False:
            yield f"{name} leaves the key of the repository on its disk"


def pythons(workflow: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for name, step in steps(workflow):
        version = step.get("with", {}).get("python-version")
        if version == "${{ matrix.python }}":
            found += workflow["jobs"][name]["strategy"]["matrix"]["python"]
        elif version is not None:
            found.append(version)
    return found


def wrong_pythons(workflow: dict[str, Any]) -> Iterator[str]:
    for version in pythons(workflow):
        # Without quotes, YAML reads 3.10 as the number 3.1.
        if not (isinstance(version, str) and version in PYTHON):
            yield f"Python {version} is not {PYTHON}"


def named_hosts(workflow: dict[str, Any]) -> Iterator[str]:
    for command in commands(workflow):
        yield from (f"{host} names a host" for host in HOST.findall(command))


def spliced_text(workflow: dict[str, Any]) -> Iterator[str]:
    """Text from outside, such as a tag's name, must not become part of a command."""
    for command in commands(workflow):
        if "${{" in command:
            yield f"{command!r} splices text in; pass it as a variable"


def no_limits(workflow: dict[str, Any]) -> Iterator[str]:
    if "group" not in workflow.get("concurrency", {}):
        yield "nothing keeps runs of the same branch apart"
    for name, job in workflow["jobs"].items():
        if not job.get("timeout-minutes", 360) <= MINUTES:
            yield f"{name} may run for longer than {MINUTES} minutes"
        if job["runs-on"].endswith("latest"):
            yield f"{name} runs on whatever is latest"


RULES = [
    unknown_targets,
    foreign_actions,
    too_many_rights,
    wrong_pythons,
    named_hosts,
    spliced_text,
    no_limits,
]


def problems(text: str) -> list[str]:
    workflow = yaml.safe_load(text)
    return [problem for rule in RULES for problem in rule(workflow)]


def read(name: str) -> str:
    return (ROOT / ".github" / "workflows" / name).read_text("utf-8")


def test_the_workflows_are_those() -> None:
    assert [path.name for path in WORKFLOWS] == ["release.yml", "site.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_keeps_the_rules(path: Path) -> None:
    assert problems(path.read_text("utf-8")) == []


def test_the_oldest_versions_are_tried() -> None:
    site = yaml.safe_load(read("site.yml"))
    versions = pythons(site)
    assert "make oldest" in commands(site)
    assert "3.9" not in PYTHON
    assert "3.10" in PYTHON
    assert "3.10" in versions


def test_site_is_checked_then_published_from_main_alone() -> None:
    site = yaml.safe_load(read("site.yml"))
    # YAML 1.1, which PyYAML reads, takes the word `on` for true.
    assert site[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    publish = site["jobs"]["publish"]
    assert publish["if"] == "github.event_name == 'push'"
    assert set(publish["needs"]) == set(site["jobs"]) - {"publish"}
    assert "bash .ci/run" in commands(site)


def test_published_is_what_make_docs_builds() -> None:
    checked = yaml.safe_load(read("site.yml"))["jobs"]["check"]["steps"]
    pages, docs, upload = checked[-3:]
    assert {step["if"] for step in checked[-3:]} == {"github.event_name == 'push'"}
    assert docs["run"] == "make docs"
    assert docs["env"] == {
        "SITE_URL": f"${{{{ steps.{pages['id']}.outputs.base_url }}}}"
    }
    mkdocs = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.findall(r"^site_url: !ENV \[(\w+),", mkdocs, re.M) == ["SITE_URL"]
    assert re.findall(r"^site_dir: (.+)", mkdocs, re.M) == [upload["with"]["path"]]


def test_release_is_that_of_a_tag_and_checked_first() -> None:
    release = yaml.safe_load(read("release.yml"))
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["release"]["needs"] == "build"
    assert release["jobs"]["index"]["needs"] == "build"
    (check,) = (s for _, s in steps(release) if "check-dist" in s.get("run", ""))
    assert check["env"] == {"TAG": "${{ github.ref_name }}"}
    assert 'tools/check_dist.py "$$TAG"' in MAKEFILE


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("site.yml", "make docs test", "make docs tset", "make has no target tset"),
        ("site.yml", "bash .ci/run", "bash .ci/runs", ".ci/runs does not exist"),
        ("release.yml", "run: make", "run: echo", "nothing runs that runs here"),
        ("site.yml", "actions/checkout@v7", "actions/checkout@main", "not an official"),
        ("site.yml", "actions/deploy-pages", "some/deploy", "not an official"),
        ("release.yml", "  contents: read", "  contents: write", "more may be done"),
        ("release.yml", "permissions:\n  contents: read", "", "more may be done"),
        ("site.yml", "pages: write", "contents: write", "the rights of publish"),
        (
            "release.yml",
            "actions/download-artifact@v8",
            "actions/checkout@v7",
            "may write",
        ),
        ("site.yml", "persist-credentials: false", "fetch-depth: 1", "on its disk"),
        ("site.yml", '"3.10"', "3.10", "Python 3.1 is not >=3.10"),
        ("site.yml", '"3.11"', '"3.9"', "Python 3.9 is not >=3.10"),
        ("release.yml", "gh release", "curl example.org; gh release", "names a host"),
        ("release.yml", '"$TAG"', "${{ github.ref_name }}", "splices text in"),
        ("site.yml", "concurrency:", "unused:", "runs of the same branch"),
        ("site.yml", "timeout-minutes: 15", "", "publish may run for longer"),
        ("site.yml", "ubuntu-24.04", "ubuntu-latest", "whatever is latest"),
    ],
)
def test_a_broken_rule_is_noticed(name: str, old: str, new: str, problem: str) -> None:
    text = read(name)
    assert old in text
    found = problems(text.replace(old, new))
    assert any(problem in line for line in found), found
