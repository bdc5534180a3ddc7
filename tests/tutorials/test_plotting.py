"""The tutorials' figures: they show what they are given, the same way every time."""

from __future__ import annotations

import re
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("matplotlib")

from hbp.tutorial.plotting import STYLES, Drawing, Panel, curves, matrices

LINES = {"HBP": ([0, 1, 2], [2.3, 1.5, 1.0]), "Adam": ([0, 1, 2], [2.3, 1.2, 1.0])}


def draw_curves() -> Drawing:
    panel = Panel("epochs", "loss", LINES, levels={"guessing": 2.3})
    return curves([panel, Panel("seconds", "loss", LINES)])


def draw_matrices() -> Drawing:
    return matrices({"a": torch.eye(3), "zero": torch.zeros(2, 3)})


DRAWINGS = pytest.mark.parametrize("draw", [draw_curves, draw_matrices])


@DRAWINGS
def test_same_numbers_same_bytes(draw) -> None:
    drawing = draw()
    first = drawing.svg()
    assert drawing.svg() == first
    assert draw().svg() == first


@DRAWINGS
def test_no_background_date_or_address(draw) -> None:
    svg = draw().svg()
    assert svg.startswith("<?xml")
    assert set(re.findall(r"\w+://([\w.]+)", svg)) == {"www.w3.org"}
    assert "date" not in svg
    assert not re.search(r"fill: (#ffffff|white)", svg)


@DRAWINGS
def test_does_not_touch_pyplot(draw) -> None:
    """Else a notebook would show every figure twice."""
    plt = pytest.importorskip("matplotlib.pyplot")
    draw()
    assert plt.get_fignums() == []


def test_panels_hold_the_lines() -> None:
    left, right = draw_curves().figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("epochs", "seconds")
    drawn = [list(line.get_ydata()) for line in left.get_lines()]
    assert drawn[:2] == [y for _, y in LINES.values()]
    assert [text.get_text() for text in left.texts] == ["guessing", "● HBP", "■ Adam"]


def test_lines_can_be_told_apart_without_colour() -> None:
    _, dashes, markers, letters = zip(*STYLES, strict=True)
    for styles in (dashes, markers, letters):
        assert len(set(styles)) == len(STYLES)


def test_names_do_not_overlap() -> None:
    """Both lines end at the same height."""
    (axes, _) = draw_curves().figure.axes
    low, high = sorted(text.get_position()[1] for text in axes.texts[1:])
    assert high - low >= 0.08


def test_a_line_may_be_empty() -> None:
    """A run that was interrupted early has nothing to show."""
    svg = curves([Panel("epochs", "loss", {**LINES, "SGD": ([], [])})]).svg()
    assert svg.startswith("<?xml")


def test_a_notebook_shows_the_svg() -> None:
    drawing = draw_curves()
    assert drawing._repr_svg_() == drawing.svg()


def test_describes_itself() -> None:
    assert repr(draw_curves()) == "Drawing with 2 panels"


@pytest.mark.filterwarnings("error")
def test_tensors_with_gradient_can_be_drawn() -> None:
    assert matrices({"W": torch.ones(2, 2, requires_grad=True)})


@pytest.mark.parametrize(
    ("same_scale", "limits"), [(False, [1, 3, 1]), (True, [3, 3, 3])]
)
def test_scale_of_matrices(same_scale: bool, limits: list[float]) -> None:
    tiles = {"a": torch.eye(2), "b": -3 * torch.eye(2), "zero": torch.zeros(2, 2)}
    drawn = matrices(tiles, same_scale=same_scale).figure.axes
    assert [axes.get_images()[0].get_clim() for axes in drawn] == [
        (-limit, limit) for limit in limits
    ]


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        curves([])
    with pytest.raises(ValueError, match="nothing to draw"):
        matrices({})


def test_too_many_lines() -> None:
    lines = {str(k): ([0], [k]) for k in range(len(STYLES) + 1)}
    with pytest.raises(ValueError, match="7 lines in one panel; 6 can"):
        curves([Panel("x", "y", lines)])


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hbp.tutorial.plotting")
    with pytest.raises(ImportError, match=r"needs matplotlib.*hbp\[tutorials\]"):
        import_module("hbp.tutorial.plotting")
