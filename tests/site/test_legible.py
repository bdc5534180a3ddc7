"""Figures can be read: on white, on the site's dark pages, and in greyscale.

Contrast is that of WCAG 2.1: 4.5 is enough for small text, 3 for lines and marks.
"""

from __future__ import annotations

import re
from colorsys import hls_to_rgb
from importlib.resources import files
from itertools import combinations

import pytest
import torch
from helpers import ROOT

pytest.importorskip("material")
pytest.importorskip("matplotlib")

from hbp.tutorial.plotting import INK, NEGATIVE, POSITIVE, STYLES, ZERO, matrices

Colour = tuple[float, float, float]

TEXT, MARKS = 4.5, 3.0
CSS = ROOT / "docs" / "assets" / "site.css"
# The names beside the lines are text, and have the colours of the lines.
WRITTEN = {"ink": INK, **{style[0]: style[0] for style in STYLES}}


def from_hex(text: str) -> Colour:
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def luminance(colour: Colour) -> float:
    red, green, blue = (
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Colour, other: Colour) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def in_the_dark(colour: Colour) -> Colour:
    """What the site's style sheet makes of a figure's colour on dark pages."""
    rule = r'slate"\] \.md-typeset img\[src\$="\.svg"\] \{\s*filter: ([^;]+);'
    found = re.search(rule, CSS.read_text("utf-8"))
    assert found is not None
    assert found[1] == "invert(1) hue-rotate(180deg)"
    inverted = [1 - x for x in colour]
    # The matrix of the specification of filter effects, for half a turn.
    grey = 2 * (0.213 * inverted[0] + 0.715 * inverted[1] + 0.072 * inverted[2])
    red, green, blue = (min(1.0, max(0.0, grey - x)) for x in inverted)
    return red, green, blue


def dark_page() -> Colour:
    """The ground of the theme's dark pages."""
    folder = files("material") / "templates" / "assets" / "stylesheets"
    (sheet,) = [f for f in folder.iterdir() if re.match(r"palette.*css$", f.name)]
    css = sheet.read_text("utf-8")
    ground = (
        r"slate\]\{.*?--md-default-bg-color:hsla\(var\(--md-hue\), (\d+)%, (\d+)%, 1"
    )
    found = re.search(ground, css)
    assert found is not None
    saturation, lightness = int(found[1]) / 100, int(found[2]) / 100
    return hls_to_rgb(225 / 360, lightness, saturation)


WHITE: Colour = (1.0, 1.0, 1.0)


@pytest.mark.parametrize("colour", WRITTEN.values(), ids=list(WRITTEN))
def test_what_is_written_can_be_read(colour: str) -> None:
    own = from_hex(colour)
    assert contrast(own, WHITE) >= TEXT
    assert contrast(in_the_dark(own), dark_page()) >= TEXT
    # A notebook in a dark editor has no such style sheet.
    assert contrast(own, dark_page()) >= MARKS


@pytest.mark.parametrize("end", [NEGATIVE, POSITIVE])
def test_large_entries_stand_out_from_zeros(end: str) -> None:
    own, zero = from_hex(end), from_hex(ZERO)
    assert contrast(own, zero) >= MARKS
    assert contrast(in_the_dark(own), in_the_dark(zero)) >= MARKS


def test_signs_differ_in_greyscale() -> None:
    """Both ends of the colours are dark, so negative entries carry a minus."""
    (axes,) = matrices({"a": torch.tensor([[1.0, -1.0], [-0.5, 0.0]])}).figure.axes
    (minus,) = axes.collections
    assert sorted(map(tuple, minus.get_offsets().tolist())) == [(0, 1), (1, 0)]


def test_lines_differ_in_greyscale() -> None:
    """Their colours are equally dark, so dashes and markers tell them apart."""
    for one, other in combinations(STYLES, 2):
        assert one[1] != other[1]
        assert one[2] != other[2]


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast(from_hex("#000000"), WHITE) == pytest.approx(21)
    assert contrast(from_hex("#777777"), WHITE) == pytest.approx(4.48, abs=0.01)
    assert in_the_dark(WHITE) == pytest.approx((0, 0, 0))
    assert in_the_dark((1, 0, 0)) == pytest.approx((1, 0.574, 0.574))
