"""The figure of curvature on its way: by keyboard, on a phone, without JavaScript."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import SITE, WIDTHS, Still, Visit, by_tab, check_drawings
from playwright.sync_api import Browser, Page, expect


@pytest.fixture
def figure(visit: Visit) -> Iterator[Page]:
    yield visit.open("/flow/")
    assert visit.troubles == []


def tiles(page: Page) -> list[str]:
    return [tile.inner_html() for tile in page.locator(".flow .tile").all()]


CELLS = """e => [...e.querySelectorAll(".cells rect")].map(
  r => [r.getAttribute("fill-opacity"), r.classList.contains("negative")])"""


def rows(page: Page) -> list[str]:
    return page.locator("#flow-rows .row").all_inner_texts()


DRAWN = """() => [...document.querySelectorAll(".flow .layers *, .flow .step *")].map(
  e => [e.tagName, ...[...e.attributes].filter(a => a.value).map(
    a => `${a.name}=${a.value}`).sort(), e.children.length ? "" : e.textContent])"""


def test_nothing_moves_when_the_script_starts(figure: Page, still: Still) -> None:
    """The drawing without JavaScript is the one that the script begins with."""
    plain = still("/flow/")
    assert plain.evaluate(DRAWN) == figure.evaluate(DRAWN)
    for selector in (".told", ".walk output"):
        words = {p.locator(f".flow {selector}").inner_text() for p in (plain, figure)}
        assert len(words) == 1


def test_keys_change_the_tiles(figure: Page) -> None:
    before = tiles(figure)
    assert figure.locator(".flow .mark.negative").count() > 3
    by_tab(figure, "name", "flow-treatment")
    figure.keyboard.press("ArrowRight")
    expect(figure.locator("#flow-when")).to_contain_text("GGN, averaged Jacobian")
    after = tiles(figure)
    # Nothing is treated at the output.
    assert [a != b for a, b in zip(before, after, strict=True)] == [True] * 3 + [False]
    assert figure.locator(".flow .mark.negative").count() == 0
    assert rows(figure)[-1] == "Layer 1: from about 0 to 0.00615; 8 of 8 below α"

    by_tab(figure, "name", "flow-scheme")
    figure.keyboard.press("ArrowRight")
    assert tiles(figure) != after
    figure.keyboard.press("Tab")
    figure.keyboard.press("ArrowLeft")
    expect(figure.locator("#flow-when")).to_contain_text("batch size 1, sigmoid")
    one = tiles(figure)
    figure.keyboard.press("Shift+Tab")
    figure.keyboard.press("ArrowRight")
    expect(figure.locator("#flow-when")).to_contain_text("exact, batch size 1")
    assert tiles(figure) == one


def test_the_figure_of_the_home_page_is_alive(visit: Visit) -> None:
    home = visit.open("/")
    before = tiles(home)
    assert len(before) == 4
    home.locator("input[name=flow-treatment][value=ggn]").check()
    expect(home.locator("#flow-when")).to_contain_text("GGN, averaged Jacobian")
    assert tiles(home) != before
    assert home.locator(".flow").bounding_box()["width"] <= 36 * 20
    assert visit.troubles == []


def test_keys_move_alpha(figure: Page) -> None:
    line = figure.locator(".flow line.alpha")
    before = float(line.get_attribute("y1") or "nan")
    by_tab(figure, "name", "flow-alpha")
    figure.keyboard.press("ArrowLeft")
    expect(figure.locator("#flow-when")).to_contain_text("α = 0.1.")
    assert float(line.get_attribute("y1") or "nan") < before
    assert [row.rpartition("; ")[2] for row in rows(figure)[-2:]] == [
        "8 of 8 below α"
    ] * 2


def test_steps_lead_from_the_output_to_the_first_layer(figure: Page) -> None:
    button = figure.locator("#flow-step")
    large = figure.locator(".flow .step")
    operations, seen = [], []
    for _ in range(10):
        operations.append(figure.locator("#flow-operation").inner_text())
        seen.append(large.evaluate(CELLS))
        button.press("Enter")
    assert operations == ["H, at the output"] + ["WᵀHW", "D H D", "+ diag(r)"] * 3
    assert len({str(cells) for cells in seen}) == 10
    # It begins again.
    assert large.evaluate(CELLS) == seen[0]
    # The last is the tile of the first layer.
    for _ in range(9):
        button.press("Enter")
    first = figure.locator(".flow .tile").first
    assert large.evaluate(CELLS) == first.evaluate(CELLS)
    expect(figure.locator("#flow-where")).to_contain_text("outputs of layer 1")
    assert (
        figure.locator("#flow-largest").inner_text()
        == figure.locator(".flow text.largest").first.text_content()
    )
    figure.locator("input[value=exact]").check()
    expect(button).to_be_disabled()


def test_controls_are_named_and_large_enough(figure: Page) -> None:
    groups = figure.get_by_role("group")
    for name in ("Treatment", "Batch scheme", "Batch size", "Activation", "α"):
        expect(
            groups.and_(figure.get_by_role("group", name=name)).first
        ).to_be_visible()
    controls = figure.locator(".flow input, .flow button").all()
    assert len(controls) == 16
    for control in controls:
        box = control.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 24


def test_figure_fits(figure: Page) -> None:
    width = figure.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0
    for element in figure.locator(
        ".flow svg, .flow svg text, .flow label, .flow .row, .flow button"
    ).all():
        box = element.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= (figure.viewport_size or {})["width"]


def test_letters_in_the_drawing_are_large_enough(figure: Page) -> None:
    """At least 10 pixels, on a phone too."""
    size = figure.evaluate("""() => {
      const svg = document.querySelector(".flow .layers");
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return Math.min(...[...svg.querySelectorAll("text")].map(
        t => scale * parseFloat(getComputedStyle(t).fontSize)));
    }""")
    assert size >= 10


@pytest.mark.parametrize("width", WIDTHS.values())
def test_without_javascript_the_figure_stands(still: Still, width: int) -> None:
    page = still("/flow/", width)
    check_drawings(page, ".flow")
    expect(page.locator("#flow-when")).to_contain_text("Hessian, averaged Jacobian")
    expect(page.locator("#flow-step")).to_be_hidden()


def test_the_figure_works_from_a_file(browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto((SITE / "flow" / "index.html").as_uri())
    page.locator("input[name=flow-treatment][value=abs]").check()
    assert rows(page)[-1].startswith("Layer 1: from 0.000934 to 0.0291")
    context.close()
