"""The figures that the tutorials share.

`curves` draws lines in panels side by side, `matrices` draws matrices as tiles.
Both return a `Drawing`, which shows itself in a notebook and saves itself to a file.

The figures read on light and on dark pages: no background, and ink of middle
brightness. Lines differ in dash pattern and marker as well as in colour, and carry
their names at their right end. The same numbers give the same bytes: no date, no
random identifiers. Needs the packages of `pip install "hbp[tutorials]"`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawing", "Panel", "curves", "matrices"]

Line = tuple[Sequence[float], Sequence[float]]

INK = "#6b717c"
# Colour, dashes, marker, and the marker as a letter for the name beside the line.
STYLES = [
    ("#3a6bc4", "-", "o", "●"),
    ("#b8520f", (0, (5, 1.5)), "s", "■"),
    ("#1f7a55", (0, (1.5, 1.2)), "^", "▲"),
    ("#9050b8", (0, (6, 1.5, 1.5, 1.5)), "D", "◆"),
]
NEGATIVE, ZERO, POSITIVE = "#d9480f", "#eceff4", "#3f51b5"
# Up to this many rows and columns, negative entries carry a minus.
SIGNED = 24
SETTINGS = {
    "svg.hashsalt": "hbp",  # Identifiers that do not change from run to run.
    "svg.fonttype": "path",  # The same letters on every machine.
    "font.family": "DejaVu Sans",  # The font that comes with matplotlib.
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class Panel:
    """One coordinate system of `curves`.

    Args:
        xlabel: What runs to the right.
        ylabel: What runs upward.
        lines: For each name, its x and its y values. A name has the same colour,
            dashes and marker in every panel if all panels list it at the same place.
        levels: Heights of horizontal reference lines, by name.
    """

    xlabel: str
    ylabel: str
    lines: Mapping[str, Line]
    levels: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Drawing:
    """A finished figure. As the last value of a notebook cell it shows itself.

    Args:
        figure: The matplotlib figure, to be changed at will.
    """

    figure: Figure

    def save(self, path: str | Path) -> None:
        """Write the figure to a file; its ending (.svg, .png, .pdf) says how."""
        kind = Path(path).suffix.lstrip(".")
        Path(path).write_bytes(self._render(kind))

    def _repr_svg_(self) -> str:
        return self._render("svg").decode()

    def __repr__(self) -> str:
        return f"Drawing with {len(self.figure.axes)} panels"

    def _render(self, kind: str) -> bytes:
        # None leaves an entry out: no date, no address of the program's home page.
        empty = ("Date", "Creator", "Format", "Type") if kind == "svg" else ()
        buffer = io.BytesIO()
        with _matplotlib().rc_context(SETTINGS):
            self.figure.savefig(
                buffer,
                format=kind,
                transparent=True,
                metadata=dict.fromkeys(empty),
            )
        return buffer.getvalue()


def curves(panels: Sequence[Panel], columns: int = 2) -> Drawing:
    """Draw lines in panels, `columns` of them side by side.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no panel, or one has more lines than there are styles.
    """
    if not panels:
        raise ValueError("panels is empty; there is nothing to draw.")
    with _matplotlib().rc_context(SETTINGS):
        figure, grid = _figure(len(panels), columns, width=4.4, height=2.9)
        for axes, panel in zip(grid, panels, strict=True):
            _draw_panel(axes, panel)
        return _finished(figure)


def matrices(
    tiles: Mapping[str, Tensor], columns: int = 5, same_scale: bool = False
) -> Drawing:
    """Draw matrices, by title: blue where positive, orange where negative.

    Negative entries of a small matrix also carry a minus, for readers without colour.

    Args:
        tiles: Matrices [rows, columns] by title.
        columns: How many tiles stand side by side.
        same_scale: Whether a colour means the same number in every tile. If not,
            each tile has a scale of its own, so compare patterns, not sizes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no tile.
    """
    if not tiles:
        raise ValueError("tiles is empty; there is nothing to draw.")
    colours = _matplotlib("colors").LinearSegmentedColormap.from_list(
        "curvature", [NEGATIVE, ZERO, POSITIVE]
    )
    values = {title: tile.detach().cpu() for title, tile in tiles.items()}
    largest = {title: float(tile.abs().max()) for title, tile in values.items()}
    with _matplotlib().rc_context(SETTINGS):
        figure, grid = _figure(len(tiles), columns, width=1.8, height=2.0)
        for axes, (title, tile) in zip(grid, values.items(), strict=True):
            # Zeros need some limit too.
            limit = (max(largest.values()) if same_scale else largest[title]) or 1
            axes.imshow(
                tile.numpy(),
                cmap=colours,
                vmin=-limit,
                vmax=limit,
                interpolation="none",
            )
            _mark_negative(axes, tile, limit)
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
        return _finished(figure)


def _mark_negative(axes: Axes, tile: Tensor, limit: float) -> None:
    """Write a minus into negative entries: in greyscale, both signs are dark."""
    size = max(tile.shape)
    if size > SIGNED:
        return
    # An entry that is nearly zero has no colour either.
    rows, columns = (tile < -0.05 * limit).nonzero(as_tuple=True)
    axes.scatter(
        columns, rows, s=(50 / size) ** 2, marker="_", color="#1d2230", linewidths=0.8
    )


def _figure(
    count: int, columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` coordinate systems; sizes are per panel, in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    # Not by pyplot: it would keep every figure in memory, and show it once more.
    figure = _matplotlib("figure").Figure(
        figsize=(width * columns, height * rows), layout="constrained"
    )
    grid = [figure.add_subplot(rows, columns, k + 1) for k in range(count)]
    return figure, grid


def _finished(figure: Figure) -> Drawing:
    """Fix the layout, which would otherwise move a little with every rendering."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return Drawing(figure)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    if len(panel.lines) > len(STYLES):
        raise ValueError(
            f"{len(panel.lines)} lines in one panel; {len(STYLES)} can be told apart. "
            "Draw them in several panels."
        )
    for (x, y), style in zip(panel.lines.values(), STYLES, strict=False):
        colour, dashes, marker, _ = style
        # A marker on every point would hide the line.
        every = max(1, len(x) // 8)
        axes.plot(
            x, y, color=colour, ls=dashes, lw=1.7, marker=marker, ms=5, markevery=every
        )
    for name, height in (panel.levels or {}).items():
        axes.axhline(height, color=INK, lw=1, ls=(0, (2, 3)))
        axes.annotate(
            name,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.grid(True)
    _name_lines(axes, panel.lines)


def _name_lines(axes: Axes, lines: Mapping[str, Line]) -> None:
    """Write each line's name beside the height at which it ends."""
    low, high = axes.get_ylim()
    named = [
        (name, (float(y[-1]) - low) / (high - low), style)
        for (name, (_, y)), style in zip(lines.items(), STYLES, strict=False)
        if len(y)
    ]
    places = _spread([height for _, height, _ in named], gap=0.09)
    for (name, _, style), place in zip(named, places, strict=True):
        colour, _, _, letter = style
        axes.text(
            1.02,
            place,
            f"{letter} {name}",
            color=colour,
            va="center",
            transform=axes.transAxes,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart, upward, until neighbours have at least `gap` between them."""
    places = list(heights)
    order = sorted(range(len(places)), key=places.__getitem__)
    for below, above in pairwise(order):
        places[above] = max(places[above], places[below] + gap)
    return places


def _matplotlib(module: str = "") -> Any:
    """Import matplotlib, or a module of it: only the tutorials need it."""
    try:
        return import_module(f"matplotlib.{module}".rstrip("."))
    except ImportError as error:
        raise ImportError(
            f"hbp.plotting needs matplotlib, which could not be imported ({error}). "
            'Install it with: pip install "hbp[tutorials]"'
        ) from error
