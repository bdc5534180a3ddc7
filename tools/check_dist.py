"""Look at the two archives in `dist` as an index and a user will.

    python tools/check_dist.py            check what `make wheel` built
    python tools/check_dist.py v1.2.3     and that this tag may name it

The archives hold the files of this working tree, byte for byte, and nothing else.
Their metadata are valid and say what `pyproject.toml` says. A second build, from the
unpacked source distribution, gives the same bytes. In an environment with torch and
nothing else the wheel installs and takes a step, a figure asks for matplotlib, and a
type checker sees the types; beside scikit-learn, whose digits it takes, the README's
example runs. `make check-dist` runs this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
UV = [sys.executable, "-m", "uv"]

# Whatever else lies in the package is not meant to be shipped.
SHIPPED = {".py", ".typed", ".json", ".txt"}
ABOUT = ("LICENSE", "README.md", "pyproject.toml")
# Hatchling adds it, so that a build from the archive leaves out the same files.
ADDED = (".gitignore",)

# Run in the environment that has torch and nothing else.
ALONE = """
import pathlib, sys
import hbp, torch

assert pathlib.Path(hbp.__file__).is_relative_to(sys.prefix), hbp.__file__
layer = hbp.HBPLinear(2, 3)
outputs = layer(torch.rand(5, 2))
hbp.backward(layer, outputs, outputs.square().mean())
hbp.CGNewton(layer.parameters()).step()
try:
    import hbp.tutorial.plotting
except ImportError as error:
    assert "hbp[tutorials]" in str(error), error
else:
    raise AssertionError("figures can be drawn without matplotlib")
"""

# Right but for its last word. A type checker that sees the package says just that.
CLIENT = """
from hbp import CGNewton, HBPLinear
layer = HBPLinear(2, 3)
optimizer: CGNewton = CGNewton(layer.parameters(), 0.1, alpha="some")
"""

Files = Mapping[str, bytes]


def shipped(root: Path) -> dict[str, bytes]:
    """The files of the package, by their paths below `src`."""
    source = root / "src"
    return {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in (source / "hbp").rglob("*")
        if path.suffix in SHIPPED and ".ipynb_checkpoints" not in path.parts
    }


def in_wheel(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def in_sdist(sdist: Path) -> dict[str, bytes]:
    """The files of a source distribution, by name; all are in one folder."""
    with tarfile.open(sdist) as archive:
        return {
            member.name: file.read()
            for member in archive.getmembers()
            if (file := archive.extractfile(member)) is not None
        }


def wrong_files(found: Files, given: Files, made: set[str]) -> Iterator[str]:
    """Compare an archive with the files it is made of, and those made for it."""
    expected = given.keys() | made
    yield from (f"lacks {name}" for name in sorted(expected - found.keys()))
    yield from (f"should not hold {name}" for name in sorted(found.keys() - expected))
    for name in sorted(given.keys() & found.keys()):
        if found[name] != given[name]:
            yield f"holds another {name} than this working tree; `make wheel` again"


def wrong_wheel(found: Files, root: Path, version: str) -> Iterator[str]:
    """Say what is wrong with the files of a wheel."""
    info = f"hbp-{version}.dist-info"
    licence = {f"{info}/licenses/LICENSE": (root / "LICENSE").read_bytes()}
    made = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL")}
    yield from wrong_files(found, shipped(root) | licence, made)


def wrong_sdist(found: Files, root: Path, version: str) -> Iterator[str]:
    """Say what is wrong with the files of a source distribution."""
    files = {f"src/{name}": content for name, content in shipped(root).items()}
    files |= {name: (root / name).read_bytes() for name in ABOUT + ADDED}
    top = f"hbp-{version}"
    given = {f"{top}/{name}": content for name, content in files.items()}
    yield from wrong_files(found, given, {f"{top}/PKG-INFO"})


def wrong_metadata(raw: bytes, root: Path, version: str) -> Iterator[str]:
    """Say what is wrong with the metadata of an archive."""
    try:
        metadata = Metadata.from_email(raw, validate=True)
    except ExceptionGroup as error:
        yield from (f"has invalid metadata: {part}" for part in error.exceptions)
        return
    if str(metadata.version) != version:
        yield f"says version {metadata.version}, not {version}"
    if lost := relative_targets(metadata.description or ""):
        yield f"has a readme with links that an index cannot follow: {lost}"
    if metadata.description_content_type != "text/markdown":
        yield f"describes itself in {metadata.description_content_type}, not Markdown"
    readme = (root / "README.md").read_text("utf-8")
    if without_targets(metadata.description or "") != without_targets(readme):
        yield "describes itself in other words than README.md"
    if "tutorials" not in (metadata.provides_extra or []):
        yield "lacks the extra tutorials, which error messages recommend"
    needed = [str(x) for x in metadata.requires_dist or [] if x.marker is None]
    if not (len(needed) == 1 and needed[0].startswith("torch>=")):
        yield f"requires {', '.join(needed) or 'nothing'}, not torch alone"


def wrong_tag(tag: str, version: str, root: Path) -> str | None:
    """Say why a tag does not stand for a release of this version."""
    if tag != f"v{version}":
        return f"the tag is {tag}, and the version in pyproject.toml {version}"
    changelog = (root / "docs" / "changelog.md").read_text("utf-8")
    if f"\n## {version}\n" not in changelog:
        return f"docs/changelog.md has no section {version}"
    return None


def without_targets(text: str) -> list[str]:
    """The words of a README, without its pictures, and without where links lead."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).split()


def relative_targets(description: str) -> list[str]:
    """Links and images that lead nowhere where the repository's files are not."""
    targets = re.findall(r"\]\(([^)\s]+)", description)
    return [t for t in targets if not re.match(r"[a-z]+:|#", t)]


def wrong_second_build(wheel: Path, sdist: Path) -> Iterator[str]:
    """Build once more, in another folder, with other permissions and times."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.iterdir()
        for path in (source, *source.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.utime(path)
        build = [sys.executable, "-m", "build", "--no-isolation"]
        into = ["--outdir", str(folder), str(source)]
        subprocess.run([*build, *into], check=True, stdout=subprocess.DEVNULL)
        for first in (wheel, sdist):
            if (folder / first.name).read_bytes() != first.read_bytes():
                yield f"{first.name} has other bytes when built once more"


def wrong_in_use(wheel: Path) -> Iterator[str]:
    """Install the wheel in an empty environment, and do what the README says."""
    readme = (ROOT / "README.md").read_text("utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    if not examples:
        yield "README.md has no example to try"
    pins = ["--constraint", str(ROOT / "constraints.txt")]
    with tempfile.TemporaryDirectory() as temporary:
        machine = Path(temporary) / "machine"
        python = machine / "bin" / "python"
        alone, trial = Path(temporary) / "alone.py", Path(temporary) / "trial.py"
        alone.write_text(ALONE, "utf-8")
        trial.write_text("\n".join(examples), "utf-8")
        into = ["--quiet", "--python", str(python)]
        for command in (
            [*UV, "venv", "--quiet", "--python", sys.executable, str(machine)],
            [*UV, "pip", "install", *into, *pins, str(wheel)],
            [*UV, "pip", "check", *into],
            # Isolated: neither this working tree nor its environment is seen.
            [str(python), "-I", str(alone)],
            [*UV, "pip", "install", *into, *pins, "scikit-learn"],  # for its digits
            [str(python), "-I", str(trial)],
        ):
            done = subprocess.run(
                command, cwd=temporary, capture_output=True, text=True
            )
            if done.returncode:
                yield f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
                return
        yield from wrong_types(python)


# Where a type checker would find another hbp than the one that is installed.
SEARCHED = {"PYTHONPATH", "MYPYPATH"}


def wrong_types(python: Path) -> Iterator[str]:
    """Check the types of a client of the package, as that Python has it installed."""
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "client.py").write_text(CLIENT, "utf-8")
        # Neither the settings of this project nor what an earlier run found.
        strict = ["--strict", "--config-file=", f"--cache-dir={os.devnull}"]
        seen_by = ["--python-executable", str(python), "client.py"]
        done = subprocess.run(
            [sys.executable, "-m", "mypy", *strict, *seen_by],
            cwd=temporary,
            env={k: v for k, v in os.environ.items() if k not in SEARCHED},
            capture_output=True,
            text=True,
        )
    one = r'client\.py:4: error: Argument "alpha" .* \[arg-type\]\nFound 1 error .*\n'
    if not re.fullmatch(one, done.stdout):
        yield f"a type checker says of a wrong alpha:\n{done.stdout}{done.stderr}"


def main() -> None:
    """Check everything, name every problem, and fail if there is one."""
    tag = sys.argv[1] if len(sys.argv) > 1 else ""
    version = subprocess.run(
        [sys.executable, "-m", "hatchling", "version"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    if tag and (problem := wrong_tag(tag, version, ROOT)):
        sys.exit(problem)
    wheel = ROOT / "dist" / f"hbp-{version}-py3-none-any.whl"
    sdist = ROOT / "dist" / f"hbp-{version}.tar.gz"
    names = {path.name for path in (ROOT / "dist").glob("*")}
    if names != {wheel.name, sdist.name}:
        sys.exit(f"dist has {sorted(names)}, not one build of {version}: `make wheel`")

    files, sources = in_wheel(wheel), in_sdist(sdist)
    metadata = files.get(f"hbp-{version}.dist-info/METADATA", b"")
    info = sources.get(f"hbp-{version}/PKG-INFO", b"")
    checks = {
        "files of the wheel": wrong_wheel(files, ROOT, version),
        "files of the source distribution": wrong_sdist(sources, ROOT, version),
        "metadata of the wheel": wrong_metadata(metadata, ROOT, version),
        "metadata of the source distribution": wrong_metadata(info, ROOT, version),
        "a second build": wrong_second_build(wheel, sdist),
        "the wheel in use": wrong_in_use(wheel),
    }
    failed = False
    for name, problems in checks.items():
        found = list(problems)
        failed = failed or bool(found)
        print(f"{name}: {'' if found else 'as it should be'}", flush=True)
        print(*(f"  {problem}\n" for problem in found), sep="", end="", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
