"""Draw docs/assets/flow/flow.html: curvature on its way back through a network.

Four linear layers, with a sigmoid or ReLU between them, on scikit-learn's digits 0 to
3. For each treatment, batch scheme and batch size, the figure shows the curvature with
respect to the outputs of each layer, which is the block of its bias, and its
eigenvalues beside α. For averaged Jacobians it also walks from block to block, one
operation at a time.

The page is a fragment, included in docs/flow.md and on the home page, which say where
its style and script are. It shows itself without JavaScript; flow.js changes what is
drawn. Run it as ``python tools/draw_flow.py``.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from draw_explorer import digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from hbp import (
    HBPLinear,
    HBPReLU,
    HBPSequential,
    HBPSigmoid,
    batch_summed_hessian,
    per_sample_hessian,
)

TARGET = Path(__file__).resolve().parents[1] / "docs/assets/flow/flow.html"

TREATMENTS = {"none": "Hessian", "ggn": "GGN", "abs": "abs", "clip": "clip"}
SCHEMES = {
    "jacobian": "averaged Jacobian",
    "product": "averaged product",
    "exact": "exact",
}
BATCHES = [1, 8, 128]
ACTIVATIONS = {"sigmoid": HBPSigmoid, "ReLU": HBPReLU}
ALPHAS = [0.1, 0.01, 0.001]
SHOWN_ALPHA = 0.01

FEATURES, CLASSES, LAYERS = 8, 4, 4
SEED = 1  # A start at which the Hessian has much negative curvature.
# The usual random weights and biases, times this: so large that sigmoids bend. ReLU
# needs less for its curvature to reach the first layer.
SCALES = {"sigmoid": 5.0, "ReLU": 1.7}

WIDTH, HEIGHT = 720, 524
LEFT, COLUMN, SIDE = 68, 161, 144  # the first column, and a tile in it
TILE_TOP, STRIP_TOP, DECADE = 36, 246, 44.0
DECADES = 5  # of the strips, down from 1
FLOOR = 10.0**-DECADES
EDGE = STRIP_TOP + DECADE * DECADES + 26  # where eigenvalues below the floor are
MARK_GAP = 16


class State(NamedTuple):
    """What the radio buttons choose, but for α."""

    activation: str
    scheme: str
    batch: int
    treatment: str


SHOWN = State("sigmoid", "jacobian", 8, "none")


class Flow:
    """All blocks of all states.

    Attributes:
        inputs: Eight principal components of each image, [720, 8].
        labels: [720].
        blocks: By state, of the bias of each layer, from the first.
        walks: By state, for averaged Jacobians: below layers 4, 3 and 2 the matrices
            WᵀHW and DWᵀHWD. The second-order terms lead from there to the next block.
    """

    def __init__(self) -> None:
        self.inputs, self.labels = digits(CLASSES, FEATURES)
        self.blocks: dict[State, list[Tensor]] = {}
        self.walks: dict[State, list[tuple[Tensor, Tensor]]] = {}
        for activation, batch in product(ACTIVATIONS, BATCHES):
            self._send_back(activation, batch)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """The first images and their labels."""
        return self.inputs[:size], self.labels[:size]

    def _send_back(self, activation: str, batch: int) -> None:
        model = network(activation)
        inputs, labels = self.batch(batch)
        outputs = model(inputs)
        loss = cross_entropy(outputs, labels)
        summed = batch_summed_hessian(loss, outputs)
        each = per_sample_hessian(loss, outputs)
        loss.backward()
        slopes = mean_slopes(model, inputs, activation)
        for scheme, treatment in product(SCHEMES, TREATMENTS):
            averaged = scheme == "jacobian"
            model.set_hbp_approximation(averaged, averaged)
            model.backward_hessian(
                each if scheme == "exact" else summed,
                modify_2nd_order_terms=treatment,
            )
            state = State(activation, scheme, batch, treatment)
            layers: list[Any] = list(model)[::2]
            blocks = [layer.bias.hessian.to_dense() for layer in layers]
            self.blocks[state] = blocks
            if averaged:
                self.walks[state] = []
                for k in (3, 2, 1):
                    W = layers[k].weight.detach()
                    below = W.T @ blocks[k] @ W
                    d = slopes[k - 1]
                    self.walks[state].append((below, d[:, None] * below * d))


def network(activation: str) -> HBPSequential:
    """Four linear layers, their weights and biases larger than usual."""
    torch.manual_seed(SEED)
    model = HBPSequential()
    for k in range(LAYERS):
        last = k == LAYERS - 1
        model.append(HBPLinear(FEATURES, CLASSES if last else FEATURES))
        if not last:
            model.append(ACTIVATIONS[activation]())
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SCALES[activation])
    return model


def mean_slopes(model: HBPSequential, inputs: Tensor, activation: str) -> list[Tensor]:
    """The batch mean of each activation's derivative, D as a vector, [8]."""
    slopes, x = [], inputs
    with torch.no_grad():
        for k, layer in enumerate(model):
            x = layer(x)
            if k % 2:
                slope = x * (1 - x) if activation == "sigmoid" else (x > 0).double()
                slopes.append(slope.mean(0))
    return slopes


# --------------------------------------------------------------------------------------
# Numbers, as they are stored and told.
# --------------------------------------------------------------------------------------


def rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")


def tell(value: float) -> str:
    """As JavaScript writes it, with a minus that is as wide as a plus."""
    return format(Decimal(f"{value:.3g}"), "f").replace("-", "−")


def percents(matrix: Tensor) -> tuple[float, list[int]]:
    """The largest |entry|, and the lower triangle in percent of it."""
    largest = matrix.abs().max().item()
    entries = matrix[tuple(torch.tril_indices(*matrix.shape))]
    return rounded(largest), [round(100 * v / largest) for v in entries.tolist()]


def eigenvalues(matrix: Tensor) -> list[float]:
    """From the smallest on; below the floor 0."""
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).tolist()
    return [rounded(v) if abs(v) >= FLOOR else 0 for v in values]


def numbers(flow: Flow) -> dict[str, Any]:
    """What the script needs, and the tests compare."""

    def stored(state: State) -> list[Any]:
        return [[*percents(b), eigenvalues(b)] for b in flow.blocks[state]]

    def walk(state: State) -> list[Any]:
        return [[percents(matrix) for matrix in pair] for pair in flow.walks[state]]

    return {
        "states": {
            activation: {
                scheme: {
                    str(batch): {
                        treatment: stored(State(activation, scheme, batch, treatment))
                        for treatment in TREATMENTS
                    }
                    for batch in BATCHES
                }
                for scheme in SCHEMES
            }
            for activation in ACTIVATIONS
        },
        "walks": {
            activation: {
                str(batch): {
                    treatment: walk(State(activation, "jacobian", batch, treatment))
                    for treatment in TREATMENTS
                }
                for batch in BATCHES
            }
            for activation in ACTIVATIONS
        },
        "place": {
            "left": LEFT,
            "column": COLUMN,
            "side": SIDE,
            "tile": TILE_TOP,
            "strip": STRIP_TOP,
            "decade": DECADE,
            "edge": EDGE,
            "gap": MARK_GAP,
        },
    }


# --------------------------------------------------------------------------------------
# The drawing.
# --------------------------------------------------------------------------------------


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Write words."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:g}" y="{y:g}">{words}</text>'


def entry(percents_: list[int], i: int, j: int) -> int:
    """Of the symmetric matrix."""
    low, high = sorted((i, j))
    return percents_[high * (high + 1) // 2 + low]


def tile(size: int, percents_: list[int], side: float) -> str:
    """Draw a matrix, with its corner as origin."""
    cell = side / size
    cells, signs = [], []
    for i, j in product(range(size), repeat=2):
        value = entry(percents_, i, j)
        kind = ' class="negative"' if value < 0 else ""
        cells.append(
            f'<rect{kind} x="{j * cell:g}" y="{i * cell:g}" width="{cell:g}" '
            f'height="{cell:g}" fill-opacity="{abs(value) / 100:g}"/>'
        )
        if value < 0:
            x, y = (j + 0.28) * cell, (i + 0.5) * cell
            signs.append(f"M{x:.1f} {y:.1f}h{0.44 * cell:.1f}")
    return (
        f'<g class="cells">{"".join(cells)}</g>'
        f'<path class="minus" d="{"".join(signs)}"/>'
        f'<rect class="frame" width="{side:g}" height="{side:g}"/>'
    )


def height(value: float) -> float:
    """Where |λ| or α is in the strips."""
    return STRIP_TOP - DECADE * math.log10(abs(value)) if value else EDGE


def mark(k: int, i: int, count: int, value: float) -> str:
    """Draw an eigenvalue: filled, or hollow with a minus."""
    x = LEFT + k * COLUMN + SIDE / 2 + (i - (count - 1) / 2) * MARK_GAP
    kind = "mark negative" if value < 0 else "mark"
    return (
        f'<g class="{kind}" transform="translate({x:.1f} {height(value):.1f})">'
        '<circle r="6"/><path d="M-3.5 0h7"/></g>'
    )


def drawing(layers: list[Any]) -> str:
    """Draw the tiles and the strips of one state."""
    bottom, right = EDGE + 14, LEFT + LAYERS * COLUMN - COLUMN + SIDE
    powers = ["1", "0.1", "10⁻²", "10⁻³", "10⁻⁴", "10⁻⁵"]
    alpha = height(SHOWN_ALPHA)
    parts = [
        f'<rect class="overtaken" x="{LEFT}" y="{alpha:.1f}" width="{right - LEFT}" '
        f'height="{bottom - alpha:.1f}"/>'
    ]
    for i, power in enumerate(powers):
        y = STRIP_TOP + DECADE * i
        parts.append(f'<path class="rule" d="M{LEFT} {y:g}H{right}"/>')
        parts.append(text(LEFT - 10, y + 6, power, "axis"))
    parts.append(text(LEFT - 10, EDGE + 6, "less", "axis"))
    parts.append(text(LEFT - 10, TILE_TOP + SIDE + 28, "max", "axis"))
    for k, (largest, entries, values) in enumerate(layers):
        x = LEFT + k * COLUMN
        middle = x + SIDE / 2
        name = f"layer {k + 1}" + (", output" if k == LAYERS - 1 else "")
        parts += [
            text(middle, TILE_TOP - 12, name, "name"),
            f'<g class="tile" transform="translate({x} {TILE_TOP})">'
            f"{tile(len(values), entries, SIDE)}</g>",
            text(middle, TILE_TOP + SIDE + 28, tell(largest), "largest"),
        ]
        parts += [mark(k, i, len(values), value) for i, value in enumerate(values)]
        if k:
            y = TILE_TOP + SIDE / 2
            parts.append(f'<path class="back" d="M{x - 3} {y:g}h-9m4-4l-4 4l4 4"/>')
    parts += [
        f'<line class="alpha" x1="{LEFT}" x2="{right}" y1="{alpha:.1f}" '
        f'y2="{alpha:.1f}"/>',
        f'<g class="alpha-name" transform="translate({right} {alpha:.1f})">'
        '<text x="4" y="6">α</text></g>',
    ]
    label = (
        "Four square tiles, one for each layer, from the output on the right to the "
        "first layer on the left. A cell is an entry of the curvature with respect to "
        "the outputs of the layer, negative ones with a minus. Below each tile its "
        "eigenvalues on a logarithmic scale, and a line at α through all of them. The "
        "eigenvalues shrink from right to left. The text that follows tells the "
        "smallest and the largest."
    )
    return (
        f'<svg class="layers" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">\n' + "\n".join(parts) + "\n</svg>"
    )


def rows(layers: list[Any], alpha: float) -> str:
    """Tell the eigenvalues of each layer."""
    parts = []
    for k in reversed(range(LAYERS)):
        values = layers[k][2]
        below = sum(abs(value) < alpha for value in values)
        low, high = (
            tell(value) if value else "about 0" for value in (values[0], values[-1])
        )
        parts.append(
            f'<span class="row">Layer {k + 1}: from {low} to {high}; '
            f"{below} of {len(values)} below α</span>"
        )
    return "\n".join(parts)


def radios(name: str, legend: str, choices: dict[str, str], shown: str) -> str:
    """Write a group of radio buttons."""
    buttons = "".join(
        f'<label><input type="radio" name="flow-{name}" value="{value}"'
        f"{' checked' if value == shown else ''}>{words}</label>\n"
        for value, words in choices.items()
    )
    return f"<fieldset><legend>{legend}</legend>\n{buttons}</fieldset>"


def draw(flow: Flow) -> str:
    """Compose the fragment."""
    stored = numbers(flow)
    layers = stored["states"][SHOWN.activation][SHOWN.scheme][str(SHOWN.batch)]
    layers = layers[SHOWN.treatment]
    same = {str(size): str(size) for size in BATCHES}
    alphas = {f"{alpha:g}": f"{alpha:g}" for alpha in ALPHAS}
    controls = "\n".join(
        [
            radios("treatment", "Treatment", TREATMENTS, SHOWN.treatment),
            radios("scheme", "Batch scheme", SCHEMES, SHOWN.scheme),
            radios("batch", "Batch size", same, str(SHOWN.batch)),
            radios(
                "activation",
                "Activation",
                {name: name for name in ACTIVATIONS},
                SHOWN.activation,
            ),
            radios("alpha", "α", alphas, f"{SHOWN_ALPHA:g}"),
        ]
    )
    when = (
        f"{TREATMENTS[SHOWN.treatment]}, {SCHEMES[SHOWN.scheme]}, batch size "
        f"{SHOWN.batch}, {SHOWN.activation}, α = {SHOWN_ALPHA:g}. Eigenvalues:"
    )
    output = layers[-1]
    step_label = (
        "One matrix, as large as the drawing allows: the curvature after the operation "
        "that the caption names. A cell is an entry, negative ones with a minus."
    )
    data = json.dumps(stored, separators=(",", ":"), ensure_ascii=False)
    return f"""<figure class="flow" data-search-exclude>
{drawing(layers)}
<form class="controls" hidden>
{controls}
</form>
<output class="told" aria-live="polite">
<span class="row" id="flow-when">{when}</span>
<span id="flow-rows">{rows(layers, SHOWN_ALPHA)}</span>
</output>
<div class="walk">
<svg class="step" viewBox="-1 -1 242 242" role="img" aria-label="{step_label}">
{tile(CLASSES, output[1], 240)}
</svg>
<div>
<button type="button" class="md-button" id="flow-step" hidden>Step back</button>
<output aria-live="polite">
<strong id="flow-operation">H, at the output</strong><br>
<span id="flow-where">1 of 10: where the Hessian pass begins, the curvature of the loss
with respect to the outputs of layer 4.</span><br>
<span>Largest entry <span id="flow-largest">{tell(output[0])}</span></span>
</output>
</div>
</div>
<figcaption>Tiles: the curvature with respect to the outputs of each layer, deeper where
an entry is larger, on a scale of its own. Its largest entry, without sign, is below it.
A negative entry has a minus. Dots: the eigenvalues on one scale, negative ones hollow
and with a minus. In the shade below the line, α is larger.</figcaption>
<script type="application/json" id="flow-numbers">{data}</script>
</figure>
"""


if __name__ == "__main__":
    TARGET.write_text(draw(Flow()), encoding="utf-8")
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1024:.0f} KiB")
