"""What can be read from the files of the site, without a browser."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from conftest import SITE

PAGES = sorted(SITE.rglob("*.html"))
STYLES = sorted(SITE.rglob("*.css"))
# These links are for machines that read the page; the browser does not follow them.
NOT_LOADED = {"canonical", "prev", "next", "alternate"}
DATA_URL = re.compile(r"""url\(("data:[^"]*"|'data:[^']*'|data:[^)]*)\)""")


class Reader(HTMLParser):
    """The anchors of a page, the addresses it links to, and those it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values.get("id", ""), values.get("name", "")}
        self.loads += [values[name] for name in ("src", "poster") if name in values]
        if "href" in values:
            loaded = tag not in {"a", "area"} and values.get("rel") not in NOT_LOADED
            (self.loads if loaded else self.links).append(values["href"])


@cache
def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    return reader


def local(path: Path, address: str) -> tuple[Path, str] | None:
    """The file and the anchor an address leads to; none if it is another host's."""
    here = f"/{path.relative_to(SITE).as_posix()}"
    parts = urlsplit(urljoin(here, address))
    if parts.scheme or parts.netloc:
        return None
    file = SITE / unquote(parts.path).lstrip("/")
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def test_the_site_has_pages() -> None:
    assert len(PAGES) > 10
    assert len(STYLES) > 3


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_links_lead_somewhere(path: Path) -> None:
    reader = read(path)
    broken = []
    for address in {*reader.links, *reader.loads}:
        target = local(path, address)
        if target is None:
            continue
        file, anchor = target
        known = file.is_file() and (
            file.suffix != ".html" or not anchor or anchor in read(file).anchors
        )
        if not known:
            broken.append(address)
    assert reader.links
    assert reader.loads
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_pages_load_nothing_from_another_host(path: Path) -> None:
    loads = [a for a in read(path).loads if not a.startswith("data:")]
    assert [address for address in loads if local(path, address) is None] == []


@pytest.mark.parametrize("path", STYLES, ids=lambda path: path.name)
def test_styles_load_what_is_there(path: Path) -> None:
    css = DATA_URL.sub("", path.read_text("utf-8"))
    assert "@import" not in css
    for declaration in css.split(";"):
        addresses = re.findall(r"url\(\s*[\"']?([^\"')]+)", declaration)
        targets = [local(path, address) for address in addresses]
        assert None not in targets, addresses
        # Where there are several, the browser takes the first that it understands:
        # a font as WOFF2.
        if targets and targets[0]:
            assert targets[0][0].is_file(), addresses
