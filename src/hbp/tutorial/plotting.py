"""The figures that the tutorials share.

`curves` draws lines in panels side by side, `matrices` draws matrices as tiles.
Both return a `Drawing`, which shows itself in a notebook.

The figures read on light and on dark pages: no background, and ink of middle
brightness. Lines differ in dash pattern and marker as well as in colour, and carry
their names at their right end. The same numbers give the same bytes: no date, no
random identifiers. Needs the packages of `pip install "hbp[tutorials]"`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "hbp.tutorial.plotting needs matplotlib, which could not be imported "
        f'({error}). Install it with: pip install "hbp[tutorials]"'
    ) from error

__all__ = ["Drawing", "Panel", "curves", "matrices"]

Line = tuple[Sequence[float], Sequence[float]]

INK = "#6b717c"
# Colour, dashes, marker, and the marker as a letter for the name beside the line.
STYLES = [
    ("#3a6bc4", "-", "o", "●"),
    ("#b8520f", (0, (5, 1.5)), "s", "■"),
    ("#1f7a55", (0, (1.5, 1.2)), "^", "▲"),
    ("#9050b8", (0, (6, 1.5, 1.5, 1.5)), "D", "◆"),
    ("#c23b4b", (0, (3, 1, 1, 1)), "v", "▼"),
    ("#6b717c", (0, (8, 1.5, 1, 1.5)), "x", "✕"),
]
NEGATIVE, ZERO, POSITIVE = "#d9480f", "#eceff4", "#3f51b5"
# Up to this many rows and columns, negative entries carry a minus.
SIGNED = 24
# Any: matplotlib's type of settings lists each name that it knows.
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "hbp",  # Identifiers that do not change from run to run.
    "svg.fonttype": "path",  # The same letters on every machine.
    "font.family": "DejaVu Sans",  # The font that comes with matplotlib.
    "font.size": 10,
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], INK),
    **dict.fromkeys(["xtick.color", "ytick.color", "grid.color"], INK),
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "none",
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

    def __post_init__(self) -> None:
        # The layout would otherwise move a little with every rendering.
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def svg(self) -> str:
        """The figure as the text of an SVG file."""
        buffer = io.BytesIO()
        # None leaves an entry out: no date, no address of the program's home page.
        nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        with rc_context(SETTINGS):
            self.figure.savefig(
                buffer, format="svg", transparent=True, metadata=nothing
            )
        return buffer.getvalue().decode()

    _repr_svg_ = svg  # What a notebook asks for.

    def __repr__(self) -> str:
        return f"Drawing with {len(self.figure.axes)} panels"


def curves(panels: Sequence[Panel], columns: int = 2) -> Drawing:
    """Draw lines in panels.

    Args:
        panels: What to draw.
        columns: How many panels stand side by side.

    Raises:
        ValueError: there is no panel, or one has more lines than there are styles.
    """
    with rc_context(SETTINGS):
        figure, grid = _figure(len(panels), columns, width=3.6, height=2.9)
        for axes, panel in zip(grid, panels, strict=True):
            _draw_panel(axes, panel)
        return Drawing(figure)


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
        ValueError: there is no tile.
    """
    colours = LinearSegmentedColormap.from_list("", [NEGATIVE, ZERO, POSITIVE])
    values = [tile.detach().cpu() for tile in tiles.values()]
    largest = [float(tile.abs().max()) for tile in values]
    with rc_context(SETTINGS):
        figure, grid = _figure(len(tiles), columns, width=1.8, height=2.0)
        for axes, title, tile, size in zip(grid, tiles, values, largest, strict=True):
            # Zeros need some limit too.
            limit = (max(largest) if same_scale else size) or 1
            axes.imshow(tile.numpy(), cmap=colours, vmin=-limit, vmax=limit)
            if max(tile.shape) <= SIGNED:
                _mark_negative(axes, tile, limit)
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
        return Drawing(figure)


def _mark_negative(axes: Axes, tile: Tensor, limit: float) -> None:
    """Write a minus into negative entries: in greyscale, both signs are dark."""
    # An entry that is nearly zero has no colour either.
    rows, columns = (tile < -0.05 * limit).nonzero(as_tuple=True)
    size = (50 / max(tile.shape)) ** 2
    axes.scatter(columns, rows, s=size, marker="_", color="#1d2230", linewidths=0.8)


def _figure(
    count: int, columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` coordinate systems; sizes are per panel, in inches."""
    if not count:
        raise ValueError("There is nothing to draw: no panel, or no matrix.")
    columns = min(columns, count)
    rows = -(-count // columns)
    # Not by pyplot: it would keep every figure in memory, and show it once more.
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(count)]


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
            fontsize=9,
        )
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.grid(True)
    _name_lines(axes, panel.lines)


def _name_lines(axes: Axes, lines: Mapping[str, Line]) -> None:
    """Write each line's name where it ends, or above the name below it."""
    low, high = axes.get_ylim()
    ends = {
        name: (y[-1] - low) / (high - low) for name, (_, y) in lines.items() if len(y)
    }
    place, places = float("-inf"), {}
    for name in sorted(ends, key=ends.__getitem__):
        places[name] = place = max(ends[name], place + 0.09)
    for name, (colour, _, _, letter) in zip(lines, STYLES, strict=False):
        if name in places:
            text, at = f"{letter} {name}", axes.transAxes
            axes.text(1.02, places[name], text, color=colour, va="center", transform=at)
