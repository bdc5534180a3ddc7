"""The address of the repository, and all that follows from it.

It stands in `pyproject.toml`, as `Repository` under `[project.urls]`, and only there.
From it come the links of the site, the badges of the README and what the tutorials
install where hbp is missing. While there is none, the links and badges are absent.

    python docs/hooks/repository.py    write what follows, outside of the site
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "main"
COLAB = "https://colab.research.google.com"


def address(root: Path = ROOT) -> str:
    """The address without a slash at its end; empty if there is none."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    found = pyproject["project"].get("urls", {}).get("Repository", "")
    return str(found).rstrip("/").removesuffix(".git")


def source_link(where: str, path: str) -> str:
    """The address of a file, as the repository's site shows it."""
    return where and f"{where}/blob/{BRANCH}/{path}"


def colab_link(where: str, notebook: str) -> str:
    """The address that opens a notebook in Colab, which reads it from GitHub."""
    _, _, repository = where.partition("github.com/")
    return repository and f"{COLAB}/github/{repository}/blob/{BRANCH}/{notebook}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the repository in the footer: in the header, the theme would query it."""
    if where := address():
        icon = "fontawesome/brands/git-alt"
        config.extra["social"] = [{"icon": icon, "link": where, "name": "Repository"}]
    return config


def badges(where: str) -> str:
    """Badges for the README: whether the tests pass, and a way into Colab."""
    if not where:
        return ""
    workflow = f"{where}/actions/workflows/site.yml"
    shown = [f"[![Tests]({workflow}/badge.svg)]({workflow})"]
    if colab := colab_link(where, "tutorials/00_hbp_in_a_hundred_lines.ipynb"):
        shown.append(f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({colab})")
    return "\n".join(shown) + "\n"


def with_badges(readme: str, where: str) -> str:
    """The README with its badges, which stand between two comments."""
    between = re.compile(r"(<!-- badges -->\n).*?(<!-- end of badges -->)", re.S)
    return between.sub(rf"\g<1>{badges(where)}\g<2>", readme)


def with_install_source(script: str, where: str) -> str:
    """A tutorial whose install cell takes hbp from the repository."""
    found = f"hbp[tutorials] @ git+{where}" if where else ""
    return re.sub(r'^hbp_source = ".*"$', f'hbp_source = "{found}"', script, flags=re.M)


def with_readme_links(pyproject: str, where: str) -> str:
    """The settings by which the README's pictures and links survive on an index."""
    picture = rf"![\1]({where}/raw/{BRANCH}/\2)" if where else ""
    link = rf"[\1]({where}/blob/{BRANCH}/\2)" if where else r"\1"
    written = iter([picture, link])
    return re.sub(
        r"^replacement = '.*'$",
        lambda _: f"replacement = '{next(written)}'",
        pyproject,
        flags=re.M,
    )


def writers() -> dict[Path, Callable[[str, str], str]]:
    """What follows from the address, by file."""
    tutorials = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
    return {
        ROOT / "README.md": with_badges,
        ROOT / "pyproject.toml": with_readme_links,
        **dict.fromkeys(tutorials, with_install_source),
    }


def main() -> None:
    """Write it anew."""
    where = address()
    for path, write in writers().items():
        path.write_text(write(path.read_text(encoding="utf-8"), where), "utf-8")
    print(f"Repository: {where or 'none is set in pyproject.toml'}")


if __name__ == "__main__":
    main()
