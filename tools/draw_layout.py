"""Draw docs/assets/layout.svg: the way of one matrix through the code.

The squares are what the code really handles, in a network 4 -> Linear -> 5 -> Sigmoid
-> 5 -> Linear -> 3 at one sample, on the way to the first weight; the stronger a cell,
the larger its entry.

    python tools/draw_layout.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hbp import HBPLinear, HBPSequential, HBPSigmoid, batch_summed_hessian

TARGET = Path(__file__).resolve().parents[1] / "docs" / "assets" / "layout.svg"
WIDTH, HEIGHT = 720, 688
ALPHA = 0.1
ALTERNATIVE = (
    "Six boxes inside a frame named core, one below the other, with a drawing of the "
    "matrix beside each: the output Hessian, 3 by 3; pull_back, which makes it 5 by 5; "
    "p.hessian, 20 by 20; its system, 6 by 6; the solution, 6 numbers, and StepInfo; "
    "the step of the weight, 5 by 4. Outside the frame stand four boxes with dashed "
    "borders, whose dashed arrows lead in: Batch and Jacobian to pull_back, system and "
    "solve_damped to the making of the system, StepInfo to what the solution tells."
)
# As a part of a page, the figure takes the colours that the page sets. As a file of
# its own, it asks whether the reader prefers a dark background.
STYLE = """
.hbp-layout{--ink:#1f2433;--ahead:#3f51b5;--back:#b23c0a;--box:#e7eaf6;--paper:#fff}
@media(prefers-color-scheme:dark){
.hbp-layout{--ink:#e6e8ef;--ahead:#a6b1f5;--back:#f2905a;--box:#2b3050;--paper:#1e2129}}
.hbp-layout text{font:13px system-ui,sans-serif;fill:var(--ink)}
.hbp-layout .code{font:600 13.5px ui-monospace,monospace}
.hbp-layout .file{font:13px ui-monospace,monospace;fill:var(--ahead)}
.hbp-layout .room{font-weight:600;font-size:15px}
.hbp-layout .right{text-anchor:end}
.hbp-layout .middle{text-anchor:middle}
.hbp-layout .core{fill:var(--box);stroke:var(--ahead);stroke-width:1.5}
.hbp-layout .step{fill:var(--paper);stroke:var(--ahead)}
.hbp-layout .hook{fill:var(--paper);stroke:var(--back);stroke-dasharray:5 3}
.hbp-layout .way{stroke:var(--ahead);stroke-width:2.2;fill:none}
.hbp-layout .joins{stroke:var(--back);stroke-width:1.6;stroke-dasharray:5 3;fill:none}
.hbp-layout #head-way path{fill:var(--ahead)}
.hbp-layout #head-joins path{fill:var(--back)}
.hbp-layout .cell{fill:var(--ahead)}
"""
LEVELS = 4  # of strength


def matrices() -> list[Tensor]:
    """One matrix on its way, and what became of it."""
    torch.manual_seed(3)
    model = HBPSequential(HBPLinear(4, 5), HBPSigmoid(), HBPLinear(5, 3)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    outputs = model(torch.randn(1, 4, dtype=torch.float64))
    loss = cross_entropy(outputs, torch.tensor([0]))
    output_hessian = batch_summed_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(output_hessian, modify_2nd_order_terms="abs")

    weight = model[0].weight
    system = weight.hessian.system(weight.grad.flatten())
    H = system.operator.to_dense()
    damped = ALPHA * torch.eye(len(H) + 1).to(H)
    damped[:-1, :-1] += (1 - ALPHA) * system.scales * H
    y = torch.linalg.solve(damped, system.rhs.T)
    step = torch.zeros(weight.numel()).to(H)
    system.add_to(step, y.T, -1.0)
    block = weight.hessian.to_dense()
    return [output_hessian, H, block, damped, y, step.view(weight.shape)]


def grid(matrix: Tensor, centre: float, middle: float, cell: float) -> str:
    """Draw a matrix as a grid of cells, the larger an entry the stronger."""
    # The cube root lets small entries be seen beside the largest.
    scaled = (matrix.abs() / matrix.abs().max()) ** (1 / 3)
    level = (LEVELS * scaled).round().int()
    rows, columns = matrix.shape
    left, top = centre - columns * cell / 2, middle - rows * cell / 2
    size = cell - (1 if cell > 6 else 0.4)
    paths = []
    for value in range(LEVELS + 1):
        steps = "".join(
            f"M{left + c * cell:.4g} {top + r * cell:.4g}h{size:g}v{size:g}h-{size:g}z"
            for r, c in (level == value).nonzero().tolist()
        )
        opacity = 0.1 + 0.9 * value / LEVELS
        if steps:
            paths.append(f'<path class="cell" opacity="{opacity:.3g}" d="{steps}"/>')
    return "\n".join(paths)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Write words, from x on or up to it."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def arrow(way: str, kind: str) -> str:
    """Draw an arrow along a path; its kind is "way" or "joins"."""
    return f'<path class="{kind}" marker-end="url(#head-{kind})" d="{way}"/>'


def head(kind: str) -> str:
    """Define the head of one kind of arrow."""
    return (
        f'<marker id="head-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" '
        'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker>'
    )


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Draw a frame."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
        f'class="{kind}"/>'
    )


# Name, files, what it says below, and the height of the box.
STEPS = [
    ("output Hessian", "losses.py", ["of the loss, w.r.t. the network's output"], 60),
    (
        "pull_back",
        "module.py, containers.py",
        [
            "Hₓ = JᵀHJ + R, from the last layer to the first:",
            "each states J as a map, and the batch is read",
            "by E[J], by E[JᵀHJ], or sample by sample",
        ],
        100,
    ),
    ("p.hessian", "operators.py", ["JᵀHJ once more, with J = ∂z/∂θ"], 60),
    ("System", "operators.py", ["(1-α)λH + αI, in as few numbers as will do"], 60),
    ("cg_rows", "cg.py", ["all small systems at once, or each directly"], 60),
    ("θ ← θ + lr·d", "newton.py", ["in place, by what the system knows of d"], 60),
]
GAPS = ["as_operator", "a block for each θ", "system", "", "StepInfo"]
# Name, what it decides, who joins by it, and the end of its arrow.
HOOKS = [
    (
        "Batch",
        ["where means come from,", "chosen by as_batch"],
        "fast.py, distributed.py",
        (470, 172),
    ),
    (
        "Jacobian",
        ["congruence, mean and", "mean_congruence: structure"],
        "layers/, your layers",
        (470, 232),
    ),
    (
        "system, solve_damped",
        ["of an operator: shortcuts,", "sub-blocks"],
        "fast.py, blocks.py",
        (214, 378),
    ),
    (
        "StepInfo",
        ["what a step promised, for", "whoever adapts α"],
        "damping.py",
        (230, 586),
    ),
]


def draw() -> str:
    """Compose the figure."""
    left, width, gap, top = 112, 356, 44, 48
    parts = [
        text(6, 20, "core", "room"),
        text(498, 20, "joins from outside", "room"),
        box(4, 30, 476, HEIGHT - 34, "core"),
    ]
    cells = [14, 13, 3.4, 10, 9, 11]
    stations = zip(STEPS, matrices(), cells, [*GAPS, None], strict=True)
    for (name, files, lines, height), matrix, cell, label in stations:
        middle = top + height / 2
        parts.append(box(left, top, width, height, "step"))
        parts.append(text(left + 12, top + 24, name, "code"))
        parts.append(text(left + width - 12, top + 24, files, "file right"))
        parts += [
            text(left + 12, top + 46 + 20 * k, line) for k, line in enumerate(lines)
        ]
        rows, columns = matrix.shape
        parts.append(grid(matrix, 58, middle - 6, cell))
        size = f"{rows} × {columns}"
        parts.append(text(58, middle + rows * cell / 2 + 10, size, "middle"))
        top += height
        if label is not None:
            parts.append(arrow(f"M{left + 24} {top}V{top + gap - 2}", "way"))
            parts.append(text(left + 40, top + 26, label, "code"))
        top += gap
    for (name, lines, files, (x, y)), top in zip(
        HOOKS, [108, 208, 334, 542], strict=True
    ):
        parts.append(box(498, top, 218, 88, "hook"))
        parts.append(text(510, top + 22, name, "code"))
        parts += [text(510, top + 41 + 17 * k, line) for k, line in enumerate(lines)]
        parts.append(text(510, top + 78, files, "file"))
        parts.append(arrow(f"M498 {y}H{x}", "joins"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'class="hbp-layout" role="img" aria-label="{ALTERNATIVE}">',
            f"<style>{STYLE}</style>",
            f"<defs>{head('way')}{head('joins')}</defs>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1024:.0f} KiB")
