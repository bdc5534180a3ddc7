"""Draw docs/assets/overview.svg: curvature flowing back through a small network.

The squares are not an artist's impression. They are the matrices of a network
4 -> Linear -> 5 -> Sigmoid -> 5 -> Linear -> 3 -> cross-entropy at one sample,
each entry one cell: blue where positive, orange where negative.

    python tools/draw_overview.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

TARGET = Path(__file__).resolve().parents[1] / "docs" / "assets" / "overview.svg"
WIDTH, HEIGHT = 912, 342
ALTERNATIVE = (
    "Values flow forward through Linear, Sigmoid and Linear to the loss. Below, the "
    "curvature flows back: from the 3 by 3 Hessian at the logits, through one matrix "
    "rule per layer, to the input, and each Linear layer drops a weight block on the "
    "way."
)
# As a part of a page, the figure takes the colours that the page sets. As a file of
# its own, it asks whether the reader prefers a dark background.
STYLE = """
.hbp-overview{--ink:#1f2433;--ahead:#3f51b5;--back:#b23c0a;--box:#e7eaf6}
@media(prefers-color-scheme:dark){
.hbp-overview{--ink:#e6e8ef;--ahead:#a6b1f5;--back:#f2905a;--box:#2b3050}}
.hbp-overview text{font:15px system-ui,sans-serif;fill:var(--ink);text-anchor:middle}
.hbp-overview .left{text-anchor:start}
.hbp-overview .bold{font-weight:600}
.hbp-overview .symbol{font-style:italic;font-size:17px}
.hbp-overview .rule{font-size:14px}
.hbp-overview .ahead{fill:var(--ahead);font-weight:600}
.hbp-overview .back{fill:var(--back);font-weight:600}
.hbp-overview .forward{stroke:var(--ahead);stroke-width:1.8;fill:none}
.hbp-overview .backward{stroke:var(--back);stroke-width:1.8;fill:none}
.hbp-overview .module{stroke:var(--ahead);fill:var(--box)}
.hbp-overview #forward path{fill:var(--ahead)}
.hbp-overview #backward path{fill:var(--back)}
"""
COLOURS = {
    -3: "#d9480f",
    -2: "#f08c4a",
    -1: "#f9cfae",
    0: "#eceff4",
    1: "#c3cdf0",
    2: "#8093d8",
    3: "#3f51b5",
}


def curvature() -> dict[str, Tensor]:
    """Send the output Hessian back by hand, one line for each rule."""
    torch.manual_seed(3)
    x = torch.randn(4)
    first, second = torch.randn(5, 4), torch.randn(3, 5)
    z = first @ x
    a = torch.sigmoid(z)
    p = torch.softmax(second @ a, dim=0)
    delta = p - torch.tensor([1.0, 0.0, 0.0])  # the gradient at the logits

    h_logits = torch.diag(p) - torch.outer(p, p)
    h_a = second.T @ h_logits @ second
    slope, bend = a * (1 - a), a * (1 - a) * (1 - 2 * a)
    second_order = (bend * (second.T @ delta)).abs()
    h_z = slope[:, None] * h_a * slope + torch.diag(second_order)
    h_x = first.T @ h_z @ first
    return {
        "x": h_x,
        "z": h_z,
        "a": h_a,
        "logits": h_logits,
        "W1": torch.kron(h_z, torch.outer(x, x)),
        "W2": torch.kron(h_logits, torch.outer(a, a)),
    }


def grid(matrix: Tensor, centre: float, top: float, cell: float) -> str:
    """Draw a matrix as a grid of cells, one path for each colour."""
    scaled = matrix / matrix.abs().max()
    # The cube root lets small entries be seen beside the largest.
    level = (3 * scaled.sign() * scaled.abs() ** (1 / 3)).round().int()
    columns = matrix.shape[1]
    left = centre - columns * cell / 2
    size = cell - (1 if cell > 6 else 0.4)
    paths = []
    for value, colour in COLOURS.items():
        where = (level == value).nonzero().tolist()
        steps = "".join(
            f"M{left + c * cell:.4g} {top + r * cell:.4g}h{size:g}v{size:g}h-{size:g}z"
            for r, c in where
        )
        if steps:
            paths.append(f'<path fill="{colour}" d="{steps}"/>')
    return "\n".join(paths)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Write centred words."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Draw an arrow; its kind is "forward" or "backward"."""
    return (
        f'<path class="{kind}" marker-end="url(#{kind})" '
        f'd="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>'
    )


def head(kind: str) -> str:
    """Define the head of one kind of arrow."""
    return (
        f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker>'
    )


def draw() -> str:
    """Compose the figure."""
    blocks = curvature()
    places = {"x": 115, "z": 345, "a": 575, "logits": 805}
    modules = {"Linear": 230, "Sigmoid": 460, "Linear ": 690}
    rules = ["Wᵀ H W", "D H D + diag(r)", "Wᵀ H W"]
    forward_y, middle, below, cell = 52, 162, 246, 15
    parts = [
        text(2, 20, "forward: values", "left ahead"),
        text(2, 112, "backward: curvature", "left back"),
    ]
    for name, place in places.items():
        parts.append(text(place, forward_y + 6, name, "symbol"))
        size = len(blocks[name]) * cell
        parts.append(grid(blocks[name], place, middle - size / 2, cell))
    parts.append(text(890, forward_y + 6, "loss", "symbol"))
    parts.append(arrow(838, forward_y, 866, forward_y, "forward"))
    parts.append(f'<path class="backward" d="M890 {forward_y + 14}V{middle}"/>')
    parts.append(arrow(890, middle, 838, middle, "backward"))
    for (module, place), rule in zip(modules.items(), rules, strict=True):
        parts.append(
            f'<rect x="{place - 48}" y="{forward_y - 22}" width="96" height="44" '
            'rx="8" class="module"/>'
        )
        parts.append(text(place, forward_y + 5, module.strip()))
        parts.append(arrow(place - 90, forward_y, place - 52, forward_y, "forward"))
        parts.append(arrow(place + 50, forward_y, place + 84, forward_y, "forward"))
        parts.append(arrow(place + 66, middle, place - 66, middle, "backward"))
        parts.append(text(place, middle - 12, rule, "rule"))
    for name, place, block, small, formula in [
        ("W1", 230, "z", 4.6, "H ⊗ xxᵀ"),
        ("W2", 690, "logits", 6, "H ⊗ aaᵀ"),
    ]:
        size = len(blocks[name]) * small
        x, bend = places[block], below - 26
        parts.append(
            f'<path class="backward" d="M{x} {middle + 42}V{bend - 10}'
            f"Q{x} {bend} {x - 10} {bend}H{place + 10}"
            f'Q{place} {bend} {place} {bend + 10}"/>'
        )
        parts.append(arrow(place, below - 18, place, below - 5, "backward"))
        parts.append(grid(blocks[name], place, below, small))
        side = place + size / 2 + 14
        parts.append(text(side, below + 34, "weight block", "left bold"))
        parts.append(text(side, below + 56, formula, "left rule"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'class="hbp-overview" role="img" aria-label="{ALTERNATIVE}">',
            f"<style>{STYLE}</style>",
            f"<defs>{head('forward')}{head('backward')}</defs>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1024:.0f} KiB")
