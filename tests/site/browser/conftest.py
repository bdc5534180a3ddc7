"""The built site, served to chromium on this machine.

`HBP_SITE` names its folder, by default `build/site`, where `make docs` puts it.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers import ROOT
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Response,
    ViewportSize,
    expect,
)

SITE = ROOT / os.environ.get("HBP_SITE", "build/site")
WIDTHS = {"wide": 1440, "narrow": 390}
# A browser asks its maker's servers for this and that unless told not to.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Still = Callable[..., Page]
"""From a path and perhaps a width to the page, without JavaScript."""
# A colour on its way to another is neither.
STILL = "*, ::before, ::after { transition: none !important }"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing: the tests report what was not found."""


@pytest.fixture(scope="session")
def browser_type_launch_args(
    browser_type_launch_args: dict[str, Any],
) -> dict[str, Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is missing: on Debian, apt-get install chromium")
    return {**browser_type_launch_args, "executable_path": chromium, "args": QUIET}


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The address of the served site."""
    if not (SITE / "index.html").exists():
        pytest.fail(f"There is no site in {SITE}: `make docs` builds it")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Visit:
    """A page of the site, and what went wrong while it was shown."""

    def __init__(self, page: Page, site: str) -> None:
        self.page = page
        self.troubles: list[str] = []
        note = self.troubles.append

        def on_console(message: ConsoleMessage) -> None:
            note(f"console, {message.type}: {message.text}")

        def on_request(request: Request) -> None:
            if not request.url.startswith((site, "data:", "blob:")):
                note(f"asks another host: {request.url}")

        def on_response(response: Response) -> None:
            if response.status >= 400:
                note(f"{response.status}: {response.url}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: note(f"script: {error}"))
        page.on("request", on_request)
        page.on("requestfailed", lambda request: note(f"failed: {request.url}"))
        page.on("response", on_response)

    @property
    def narrow(self) -> bool:
        """Whether the page is as wide as a phone."""
        return self.page.viewport_size == {"width": WIDTHS["narrow"], "height": 900}

    def open(self, path: str) -> Page:
        """Load a page, and stop everything that moves."""
        self.page.goto(path)
        self.page.add_style_tag(content=STILL)
        return self.page


def by_tab(page: Page, attribute: str, value: str) -> Locator:
    """Go on to a control as a reader without a mouse does."""
    for _ in range(80):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if focused.get_attribute(attribute) == value:
            return focused
    pytest.fail(f"no Tab leads to {value}")


@pytest.fixture
def still(browser: Browser, site: str) -> Iterator[Still]:
    """Open a page, of some width, without JavaScript."""
    contexts = []

    def opened(path: str, width: int = WIDTHS["wide"]) -> Page:
        size: ViewportSize = {"width": width, "height": 900}
        context = browser.new_context(java_script_enabled=False, viewport=size)
        contexts.append(context)
        page = context.new_page()
        page.goto(site + path)
        return page

    yield opened
    for context in contexts:
        context.close()


def check_drawings(page: Page, figure: str) -> None:
    """Its drawings are there and described, and what would not work is hidden."""
    for image in page.locator(f"{figure} svg").all():
        expect(image).to_be_visible()
        assert len(image.get_attribute("aria-label") or "") > 100
    expect(page.locator(f"{figure} .controls")).to_be_hidden()


@pytest.fixture(scope="session", params=WIDTHS)
def width_context(
    request: pytest.FixtureRequest, browser: Browser, site: str
) -> Iterator[BrowserContext]:
    """One reader with a wide window, and one with a phone."""
    context = browser.new_context(
        viewport={"width": WIDTHS[request.param], "height": 900}, base_url=site
    )
    yield context
    context.close()


@pytest.fixture
def visit(width_context: BrowserContext, site: str) -> Iterator[Visit]:
    page = width_context.new_page()
    yield Visit(page, site)
    page.close()
