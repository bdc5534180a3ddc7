"""Every page, wide and narrow, light and dark, as a reader would see it."""

from __future__ import annotations

import re
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import nbformat
import pytest
from conftest import ROOT, SITE, Visit
from playwright.sync_api import Browser, Page, expect

PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SCHEMES = {"light": "default", "dark": "slate"}

AXE = ROOT / "docs" / "hooks" / "node_modules" / "axe-core" / "axe.min.js"
STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
# The rest does not depend on colours, and holds in the dark if it does in the light.
OF_COLOURS = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
# The numbers of equations that are out of sight, or cover their equation.
HIDDEN_NUMBERS = """() => {
    const isHidden = tag => {
        const number = tag.getBoundingClientRect();
        const parts = tag.parentElement.querySelectorAll(":scope > .katex-base");
        const covers = [...parts].some(part => {
            const box = part.getBoundingClientRect();
            return box.right > number.left && box.left < number.right
                && box.bottom > number.top && box.top < number.bottom;
        });
        return covers || number.left < 0 || number.right > window.innerWidth;
    };
    const numbers = [...document.querySelectorAll(".katex-html > .katex-tag")];
    return numbers.filter(isHidden).map(number => number.textContent);
}"""
# Most elements of a page are parts of formulas, which have the colour of the text
# around them, and pieces of code, of which many look the same. axe-core would take a
# minute for them. A formula keeps its size, so that what had to scroll still has to.
WITHOUT_REPETITION = """() => {
    for (const formula of document.querySelectorAll(".katex")) {
        const {width, height} = formula.getBoundingClientRect();
        formula.textContent = "formula";
        formula.style.cssText =
            `display: inline-block; width: ${width}px; height: ${height}px`;
    }
    const seen = new Set();
    for (const piece of document.querySelectorAll("pre code span")) {
        const ground = getComputedStyle(piece.closest("code")).backgroundColor;
        const look = `${getComputedStyle(piece).color} on ${ground} ${piece.className}`;
        if (seen.has(look)) piece.replaceWith(...piece.childNodes);
        seen.add(look);
    }
}"""
RUN_AXE = """rules => axe.run({runOnly: rules, resultTypes: ["violations"]})
    .then(found => found.violations)"""


def test_all_pages_are_visited() -> None:
    names = {"index.html", "404.html"}
    names |= {"api/layers/index.html", "mathematics/index.html"}
    names |= {f"tutorials/{path.stem}/index.html" for path in TUTORIALS}
    assert TUTORIALS
    assert names <= {*PAGES}


@pytest.mark.parametrize("path", PAGES)
def test_page(visit: Visit, path: str) -> None:
    page = visit.open(f"/{path.removesuffix('index.html')}")
    assert page.locator("h1").count() == 1
    check_formulas(page, path)
    check_width(page)
    check_images(page)
    check_by_axe(page)
    assert visit.troubles == []


def check_by_axe(page: Page) -> None:
    """Contrast in both schemes, landmarks, names, and whatever else it knows."""
    page.evaluate(WITHOUT_REPETITION)
    page.add_script_tag(path=AXE)
    for scheme, value in SCHEMES.items():
        page.evaluate("value => document.body.dataset.mdColorScheme = value", value)
        rules = STANDARDS if scheme == "light" else OF_COLOURS
        found = page.evaluate(RUN_AXE, rules)
        assert not found, f"in the {scheme}:\n{in_words(found)}"


def check_formulas(page: Page, path: str) -> None:
    formulas = page.locator(".arithmatex")
    assert page.locator(".arithmatex:has(.katex)").count() == formulas.count()
    assert page.locator(".katex-error").count() == 0
    if path.startswith("mathematics"):
        assert formulas.count() > 50
    # Under other names than KaTeX's, the next check would find nothing to check.
    for part in (".katex-html > .katex-tag", ".katex-html:has(> .katex-base)"):
        numbers = page.locator(f".equation {part}").count()
        assert numbers == page.locator(".equation").count()
    assert page.evaluate(HIDDEN_NUMBERS) == []


def check_width(page: Page) -> None:
    too_wide = page.evaluate(
        "() => document.documentElement.scrollWidth - window.innerWidth"
    )
    assert too_wide <= 0, f"the page is {too_wide} pixels too wide"


def check_images(page: Page) -> None:
    for image in page.locator("article img").all():
        assert image.get_attribute("alt")
        assert image.evaluate("image => image.complete && image.naturalWidth") > 0


def in_words(violations: list[dict[str, Any]]) -> str:
    """Each rule that axe found broken, with the elements and what to do."""
    lines = []
    for violation in violations:
        lines.append(f"{violation['id']}: {violation['help']}")
        for node in violation["nodes"]:
            remedy = re.sub(r"\s*\n\s*", " ", node["failureSummary"])
            html = re.sub(r"\s+", " ", node["html"])[:120]
            lines.append(
                f"  {' '.join(map(str, node['target']))}  {html}\n    {remedy}"
            )
    return "\n".join(lines)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_are_those_the_reader_prefers(
    browser: Browser, site: str, scheme: str
) -> None:
    """And the switch in the header changes them."""
    first, other = SCHEMES[scheme], ({*SCHEMES.values()} - {SCHEMES[scheme]}).pop()
    page = browser.new_page(base_url=site, color_scheme=scheme)
    page.goto("/")
    body = page.locator("body")
    expect(body).to_have_attribute("data-md-color-scheme", first)
    page.locator("label[for^=__palette]:visible").click()
    expect(body).to_have_attribute("data-md-color-scheme", other)
    page.close()


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{6,}", text.lower()))


def word_only_in(tutorial: Path) -> str:
    """A word of a tutorial's text that no other page has, in any form.

    Not one of a solution, which is folded: the reader is to see it.
    """
    cells = nbformat.read(tutorial, as_version=4).cells
    text = [
        cell.source
        for cell in cells
        if cell.cell_type == "markdown"
        and "solution" not in cell.metadata.get("tags", [])
    ]
    own = words("\n".join(text))
    others = {
        word[:6]
        for path in PAGES
        if tutorial.stem not in path
        for word in words(unescape(re.sub(r"<[^>]+>", " ", (SITE / path).read_text())))
    }
    return max(sorted(word for word in own if word[:6] not in others), key=len)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_search_finds_a_word_of_a_tutorial(visit: Visit, tutorial: Path) -> None:
    word = word_only_in(tutorial)
    page = visit.open("/")
    if visit.narrow:
        page.locator("label[for=__search].md-header__button").click()
    page.locator("input[name=query]").press_sequentially(word)
    # Until the last letter is searched for, there are results for the ones before.
    page.wait_for_function(
        """own => {
            const links = document.querySelectorAll(".md-search-result__link");
            return links.length && [...links].every(link => link.pathname === own);
        }""",
        arg=f"/tutorials/{tutorial.stem}/",
    )
    page.locator(".md-search-result__link").first.click()
    page.wait_for_url(f"**/tutorials/{tutorial.stem}/**")
    assert word in page.locator("article").inner_text().lower()
    assert visit.troubles == []


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_downloads(visit: Visit, tutorial: Path) -> None:
    page = visit.open(f"/tutorials/{tutorial.stem}/")
    links = page.get_by_role("navigation", name="This tutorial").get_by_role("link")
    saved = {}
    for link in links.and_(page.locator("[download]")).all():
        with page.expect_download() as download:
            link.click()
        saved[download.value.suggested_filename] = download.value.path().read_bytes()
    script = tutorial.with_suffix(".py")
    assert set(saved) == {script.name, tutorial.name, f"{tutorial.stem}.zip"}
    assert saved[script.name] == script.read_bytes()
    with ZipFile(BytesIO(saved[f"{tutorial.stem}.zip"])) as archive:
        wheel, notebook = sorted(archive.namelist(), reverse=True)
        assert archive.read(notebook) == saved[notebook]
    assert re.fullmatch(r"hbp-.*-none-any\.whl", wheel)
    # The other actions need a repository, and its address is set in one place.
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    if not re.search(r"^Repository *=", project, re.M):
        assert links.count() == len(saved)
    assert visit.troubles == []
