"""Every page, wide and narrow, light and dark, as a reader would see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from conftest import SITE
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response

PAGES = sorted(
    path.parent.relative_to(SITE).as_posix() for path in SITE.rglob("index.html")
)
WIDTHS = {"wide": 1440, "narrow": 390}
SCHEMES = {"light": "default", "dark": "slate"}


@dataclass
class Visit:
    """A page, and what went wrong while it was shown."""

    page: Page
    troubles: list[str] = field(default_factory=list)


def listen(visit: Visit, site: str) -> None:
    """Note whatever a page complains about, misses or asks of another host."""
    page, note = visit.page, visit.troubles.append

    def on_console(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            note(message.text)

    def on_request(request: Request) -> None:
        if not request.url.startswith((site, "data:", "blob:")):
            note(f"external: {request.url}")

    def on_response(response: Response) -> None:
        if response.status >= 400:
            note(f"{response.status}: {response.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: note(str(error)))
    page.on("request", on_request)
    page.on("requestfailed", lambda request: note(f"failed: {request.url}"))
    page.on("response", on_response)


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=WIDTHS)
def visit(
    request: pytest.FixtureRequest, browser: Browser, site: str, scheme: str
) -> Iterator[Visit]:
    context = browser.new_context(
        viewport={"width": WIDTHS[request.param], "height": 900},
        color_scheme=scheme,
        base_url=site,
    )
    page = context.new_page()
    visit = Visit(page)
    listen(visit, site)
    yield visit
    context.close()


def test_all_pages_are_visited() -> None:
    assert {".", "api", "mathematics", "tutorials/01_single_layer_mnist"} <= {*PAGES}


@pytest.mark.parametrize("path", PAGES)
def test_page(visit: Visit, path: str, scheme: str) -> None:
    page = visit.page
    page.goto(f"/{path}/", wait_until="networkidle")
    assert page.locator("body").get_attribute("data-md-color-scheme") == SCHEMES[scheme]
    assert page.locator("h1").count() == 1

    formulas = page.locator(".arithmatex")
    assert page.locator(".arithmatex:has(.katex)").count() == formulas.count()
    assert page.locator(".katex-error").count() == 0
    if path == "mathematics":
        assert formulas.count() > 50

    too_wide = page.evaluate(
        "() => document.documentElement.scrollWidth - window.innerWidth"
    )
    assert too_wide <= 0, f"the page is {too_wide} pixels too wide"

    for image in page.locator("article img").all():
        image.scroll_into_view_if_needed()
        assert image.get_attribute("alt")
        assert image.evaluate("image => image.naturalWidth") > 0
    assert visit.troubles == []


def test_search_finds_a_page(visit: Visit) -> None:
    page = visit.page
    page.goto("/")
    if page.viewport_size and page.viewport_size["width"] < 600:
        page.locator("label[for=__search].md-header__button").click()
    page.locator("input[name=query]").press_sequentially("Kronecker")
    page.locator(".md-search-result__link").first.wait_for()
    assert visit.troubles == []
