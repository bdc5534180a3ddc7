"""The interactive figure: by keyboard, on a phone, in the dark, without JavaScript."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import SITE, WIDTHS, Still, Visit, by_tab, check_drawings
from playwright.sync_api import Browser, Page, expect

OUTPUTS = ("when", "length", "residual", "predicted", "actual", "kept")


@pytest.fixture
def figure(visit: Visit) -> Iterator[Page]:
    yield visit.open("/explorer/")
    assert visit.troubles == []


def tip(page: Page) -> tuple[float, float]:
    """Where the arrow ends, in pixels of the drawing."""
    arrow = page.locator(".explorer .arrow")
    x, y = (float(arrow.get_attribute(name) or "nan") for name in ("x2", "y2"))
    return x, y


def read(page: Page) -> dict[str, str]:
    return {name: page.locator(f"#explorer-{name}").inner_text() for name in OUTPUTS}


def test_nothing_moves_when_the_script_starts(figure: Page, still: Still) -> None:
    """The drawing without JavaScript is the one that the script begins with."""
    plain = still("/explorer/")
    assert tip(plain) == tip(figure)
    assert read(plain) == read(figure)
    for name in (".iterates", ".real.marker", ".model.marker"):
        for attribute in ("points", "cx", "cy"):
            values = {p.locator(name).get_attribute(attribute) for p in (plain, figure)}
            assert len(values) == 1


def test_keys_move_the_step(figure: Page) -> None:
    by_tab(figure, "id", "explorer-alpha")
    slider = figure.locator("#explorer-alpha")
    start, before = tip(figure), read(figure)
    assert slider.get_attribute("aria-valuetext") == "α = 0.1"
    figure.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "α = 0.13"
    assert figure.locator("#explorer-alpha-value").inner_text() == "0.13"
    # More damping, a shorter step.
    assert tip(figure)[0] < start[0]
    assert float(read(figure)["length"]) < float(before["length"])

    figure.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "α = 0.0001"
    weakest = tip(figure)
    assert weakest[0] > start[0]
    assert weakest[1] < start[1]
    assert read(figure) == {
        "when": "At α = 0.0001, with 4 CG iterations:",
        "length": "12.14",
        "residual": "0 %",
        "predicted": "4.38",
        "actual": "−0.48",
        "kept": "−11 %",
    }
    figure.keyboard.press("End")
    assert slider.get_attribute("aria-valuetext") == "α = 1"
    assert read(figure)["kept"] == "98 %"


def test_keys_take_iterations_away(figure: Page) -> None:
    by_tab(figure, "id", "explorer-alpha")
    figure.keyboard.press("Home")
    solved = tip(figure)
    figure.keyboard.press("Tab")
    slider = figure.locator("#explorer-iterations")
    expect(slider).to_be_focused()
    figure.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "3 CG iterations"
    assert tip(figure) != solved
    figure.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "1 CG iteration"
    assert read(figure)["residual"] == "42 %"
    # Along the gradient: to the right.
    start = figure.locator(".explorer .arrow").get_attribute("y1")
    assert tip(figure)[1] == float(start or "nan")
    points = figure.locator(".explorer .iterates").get_attribute("points") or ""
    assert len(points.split()) == 2
    chosen = figure.locator(".explorer .chosen")
    assert {e.get_attribute("data-iterations") for e in chosen.all()} == {"1"}


def test_buttons_show_steps_of_note(figure: Page) -> None:
    buttons = figure.locator(".explorer .presets button")
    assert buttons.count() == 4
    told = []
    for button in buttons.all():
        button.focus()
        figure.keyboard.press("Enter")
        told.append(read(figure))
        box = button.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 24
    assert [row["when"] for row in told] == [
        "At α = 1, with 1 CG iteration:",
        "At α = 0.1, with 4 CG iterations:",
        "At α = 0.0001, with 4 CG iterations:",
        "At α = 0.0001, with 1 CG iteration:",
    ]
    assert figure.locator("#explorer-alpha").input_value() == "0"
    assert [row["actual"][0] == "−" for row in told] == [False, False, True, False]


def test_the_model_can_be_hidden(figure: Page) -> None:
    ellipse = figure.locator(".explorer ellipse").first
    expect(ellipse).to_be_visible()
    by_tab(figure, "id", "explorer-quadratic")
    figure.keyboard.press("Space")
    expect(ellipse).to_be_hidden()
    figure.keyboard.press("Space")
    expect(ellipse).to_be_visible()


def test_controls_are_named_and_large_enough(figure: Page) -> None:
    for name in ("alpha", "iterations", "quadratic"):
        control = figure.locator(f"#explorer-{name}")
        labels = control.evaluate("e => [...e.labels].map(l => l.innerText).join()")
        assert labels.strip()
        box = control.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 24
    assert figure.locator(".explorer output[aria-live=polite]").count() == 1


def test_figure_fits(figure: Page) -> None:
    width = figure.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0
    for element in figure.locator(
        ".explorer svg, .explorer input, .explorer .row"
    ).all():
        box = element.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= (figure.viewport_size or {})["width"]


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_lines_stand_out(figure: Page, scheme: str) -> None:
    """At least 3 to 1 where the map is deepest, as WCAG asks of drawings.

    Words have a rim in the colour of the page, and need 4.5 to 1.
    """
    figure.evaluate("s => document.body.dataset.mdColorScheme = s", scheme)
    for selector, least in [
        (".arrow", 3.0),
        (".path", 3.0),
        (".lowest", 3.0),
        ("ellipse.model", 3.0),
        ("text.model", 4.5),
        ("text.loss", 4.5),
        ("text.level", 4.5),
    ]:
        assert figure.evaluate(CONTRAST, selector) >= least, selector


# Of a line with the page and all bands behind it, or of a word with the page.
CONTRAST = """selector => {
  const context = document.createElement("canvas").getContext(
    "2d", {willReadFrequently: true});
  const paint = (...colours) => {
    for (const colour of colours) {
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(c => {
      c /= 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(`.explorer ${selector}`);
  const style = getComputedStyle(element);
  const behind = [getComputedStyle(document.body).backgroundColor];
  const isText = element.tagName === "text";
  if (!isText) {
    for (const band of document.querySelectorAll(".explorer .band")) {
      const {fill, fillOpacity} = getComputedStyle(band);
      behind.push(fill.replace("rgb(", "rgba(").replace(")", `, ${fillOpacity})`));
    }
  }
  const colour = isText ? style.fill : style.stroke;
  const shades = [paint(...behind), paint(...behind, colour)];
  const [low, high] = shades.sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.mark.parametrize("width", WIDTHS.values())
def test_without_javascript_the_figure_stands(still: Still, width: int) -> None:
    page = still("/explorer/", width)
    check_drawings(page, ".explorer")
    expect(page.locator(".explorer .arrow")).to_be_visible()
    expect(page.locator("#explorer-when")).to_contain_text("α = 0.1, with 4 CG")


def test_the_figure_works_from_a_file(browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto((SITE / "explorer" / "index.html").as_uri())
    page.locator("#explorer-alpha").press("End")
    assert read(page)["length"] == "0.82"
    context.close()
