"""Draw docs/assets/explorer/explorer.html: what damping does to one real step.

The loss is that of a linear layer with six weights on scikit-learn's digits 0, 1 and
2. For each damping and each number of CG iterations, ``CGNewton`` takes its step from
the same start. The figure shows where the steps end, on the plane through the start
that holds the gradient step and the least damped step.

The page is a fragment, to be included in docs/explorer.md. It shows itself without
JavaScript; explorer.js moves the arrow. Run it as ``python tools/draw_explorer.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from hbp import CGNewton, HBPLinear, per_sample_hessian

TARGET = Path(__file__).resolve().parents[1] / "docs/assets/explorer/explorer.html"

# From 1 down to 1e-4, ten to a decade, as they are displayed.
ALPHAS = [float(f"{10 ** (-i / 10):.2g}") for i in range(41)]
# Six weights, but adding one row to all three classes changes nothing: g and the
# range of H have four dimensions, and CG is done after four iterations.
ITERATIONS = [1, 2, 3, 4]
SHOWN_ALPHA, SHOWN_ITERATIONS = 0.1, 4
SEED = 17  # A start from which the undamped step ends higher than it began.
PRESETS = {
    "gradient step": (1.0, 1),
    "well damped": (0.1, 4),
    "hardly damped": (1e-4, 4),
    "one iteration": (1e-4, 1),
}

WIDTH, HEIGHT = 480, 400  # of the map, in units that are pixels on a wide screen
LEFT, BOTTOM, SCALE = 46, 318, 34.0  # the start, and pixels to one unit of weight
LEVELS = [0.23, 0.28, 0.4, 0.6, 1.0, 1.77, 2.4]
MODEL_LEVELS = [0.0, -1.0, -2.0]  # besides that of the start
CHART_HEIGHT, EDGE = 190, 12
LOWEST, HIGHEST = -3.2, 2.6  # of the chart's losses


class Step(NamedTuple):
    """A step d of ``CGNewton``, at one damping and one number of CG iterations.

    Attributes:
        d: [6].
        predicted: By how much the model without damping falls, -gᵀd - ½dᵀHd.
        actual: By how much the loss falls.
        residual: ‖[(1-α)H + αI] d + g‖ / ‖g‖.
    """

    d: Tensor
    predicted: float
    actual: float
    residual: float


class Slice:
    """The loss around the start, all steps, and the plane.

    Args:
        seed: Of the start.

    Attributes:
        inputs: Two principal components of each image, [537, 2].
        labels: [537].
        start: The weights, [3, 2].
        loss: The loss there.
        gradient: [6].
        hessian: [6, 6]. The loss is convex in the weights of a single layer, and the
            four treatments of second-order terms agree.
        steps: By α and the number of iterations.
    """

    def __init__(self, seed: int = SEED) -> None:
        self.inputs, self.labels = digits(3, 2)
        self._seed = seed
        model = network(seed)
        self.start = model.weight.detach().clone()
        self.loss = self._send_back(model)
        weight: Any = model.weight
        self.gradient = weight.grad.flatten()
        self.hessian = weight.hessian.to_dense()
        self.steps = {
            (alpha, iterations): self._step(alpha, iterations)
            for alpha in ALPHAS
            for iterations in ITERATIONS
        }

    def _send_back(self, model: HBPLinear) -> float:
        outputs = model(self.inputs)
        loss = cross_entropy(outputs, self.labels)
        output_hessians = per_sample_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(output_hessians)
        return loss.item()

    def _step(self, alpha: float, iterations: int) -> Step:
        model = network(self._seed)
        self._send_back(model)
        optimizer = CGNewton(
            model.parameters(), 1.0, alpha, 0.0, cg_tol=1e-10, cg_maxiter=iterations
        )
        optimizer.step()
        d = (model.weight.detach() - self.start).flatten()
        predicted = -(self.gradient @ d + d @ self.hessian @ d / 2).item()
        residual = optimizer.last_step[model.weight].residual_norm
        actual = self.loss - self.losses(d[None]).item()
        return Step(d, predicted, actual, residual / self.gradient.norm().item())

    def losses(self, d: Tensor) -> Tensor:
        """The loss at the start plus each row of d, [k, 6] to [k]."""
        weights = self.start + d.reshape(-1, 3, 2)
        outputs = torch.einsum("ni,koi->kno", self.inputs, weights)
        chosen = outputs[:, torch.arange(len(self.labels)), self.labels]
        return (outputs.logsumexp(2) - chosen).mean(1)

    @cached_property
    def axes(self) -> Tensor:
        """Orthonormal: along the gradient step, and to the least damped one, [2, 6]."""
        across = -self.gradient / self.gradient.norm()
        rest = self.steps[ALPHAS[-1], ITERATIONS[-1]].d
        rest = rest - (rest @ across) * across
        return torch.stack([across, rest / rest.norm()])

    @cached_property
    def minimum(self) -> Tensor:
        """Where the loss on the plane is lowest, [2]."""
        point = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [point],
            max_iter=100,
            tolerance_grad=1e-12,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.losses((point @ self.axes)[None])[0]
            loss.backward()
            return loss

        optimizer.step(closure)
        return point.detach()

    def contour(self, level: float, count: int = 72) -> Tensor:
        """Points of the plane where the loss is ``level``, [count, 2].

        The loss is convex, so every ray from the minimum meets a level once. The rays
        are spread evenly where the loss looks round.
        """
        plane = self.axes @ self._hessian_at_minimum() @ self.axes.T
        angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        circle = torch.stack([angles.cos(), angles.sin()], dim=1)
        rays = circle @ torch.linalg.cholesky(plane).inverse()
        rays = rays / rays.norm(dim=1, keepdim=True)
        # Where two classes change places only slowly, a level is far outside the map.
        low, high = torch.zeros(count).double(), torch.full((count,), 1e3).double()
        for _ in range(45):
            middle = (low + high) / 2
            points = self.minimum + middle[:, None] * rays
            outside = self.losses(points @ self.axes) > level
            low, high = low.where(outside, middle), middle.where(outside, high)
        return self.minimum + high[:, None] * rays

    def _hessian_at_minimum(self) -> Tensor:
        model = network(self._seed)
        with torch.no_grad():
            model.weight += (self.minimum @ self.axes).view(3, 2)
        self._send_back(model)
        weight: Any = model.weight
        return weight.hessian.to_dense()

    def model(self) -> tuple[Tensor, Tensor, float]:
        """The quadratic model on the plane: its minimum [2], H [2, 2], lowest value."""
        gradient = self.axes @ self.gradient
        hessian = self.axes @ self.hessian @ self.axes.T
        centre = -torch.linalg.solve(hessian, gradient)
        return centre, hessian, self.loss + (gradient @ centre).item() / 2


def digits(classes: int, components: int) -> tuple[Tensor, Tensor]:
    """The first digits, 0 to some other one, by their first principal components."""
    data = load_digits(n_class=classes)
    pixels = torch.from_numpy(data.data)
    pixels = pixels - pixels.mean(0)
    axes = torch.linalg.svd(pixels, full_matrices=False).Vh[:components]
    # A component has no sign of its own: its largest entry is made positive.
    largest = axes.abs().argmax(1, keepdim=True)
    inputs = pixels @ (axes * axes.gather(1, largest).sign()).T
    return inputs / inputs[:, 0].std(), torch.from_numpy(data.target).long()


def network(seed: int) -> HBPLinear:
    """One layer, its weights four times as large as usual: it is sure, and wrong."""
    torch.manual_seed(seed)
    model = HBPLinear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight *= 4
    return model


def place(point: Tensor) -> tuple[float, float]:
    """From the plane to the map."""
    x, y = point.tolist()
    return LEFT + SCALE * x, BOTTOM - SCALE * y


def chart_place(alpha: float, loss: float) -> tuple[float, float]:
    """From damping and loss to the chart."""
    x = EDGE + (WIDTH - 2 * EDGE) * (1 - math.log(alpha) / math.log(ALPHAS[-1]))
    return x, CHART_HEIGHT * (HIGHEST - loss) / (HIGHEST - LOWEST)


def line(points: Iterable[tuple[float, float]]) -> str:
    """Write points for a polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def text(point: tuple[float, float], words: str, kind: str = "") -> str:
    """Write words."""
    return f'<text class="{kind}" x="{point[0]:.1f}" y="{point[1]:.1f}">{words}</text>'


def label_at(
    points: Tensor, height: float, level: float, kind: str = "level"
) -> list[str]:
    """Label a closed curve where it crosses a height of the map, on its left side.

    Nothing where it does not, or too close to the edge.
    """
    crossings = []
    places = [place(point) for point in points]
    for (x, y), (x_, y_) in zip(places, places[1:] + places[:1], strict=True):
        if (y < height) != (y_ < height):
            crossings.append(x + (x_ - x) * (height - y) / (y_ - y))
    if not crossings or min(crossings) < 14:
        return []
    words = f"{level:.3g}".replace("-", "−")
    return [text((min(crossings), height + 4), words, kind)]


def contours(slice_: Slice) -> list[str]:
    """Draw the loss: filled, so that lower is darker, and labelled."""
    bands, labels = [], []
    for level in reversed(LEVELS):
        points = slice_.contour(level)
        path = line(map(place, points))
        bands.append(f'<polygon class="band" points="{path}"/>')
        height = HEIGHT - 10 if level > LEVELS[0] else HEIGHT - 28
        labels += label_at(points, height, level)
    return bands + labels


def ellipses(slice_: Slice) -> list[str]:
    """Draw the quadratic model: dashed."""
    centre, hessian, lowest = slice_.model()
    values, vectors = torch.linalg.eigh(hessian)
    x, y = place(centre)
    turn = -math.degrees(math.atan2(vectors[1, 0].item(), vectors[0, 0].item()))
    turn -= 180 * round(turn / 180)  # an axis has no sign
    angles = torch.arange(90, dtype=torch.float64) * (2 * math.pi / 90)
    circle = torch.stack([angles.cos(), angles.sin()])
    curves, labels = [], []
    for level in [slice_.loss, *MODEL_LEVELS]:
        radii = (2 * (level - lowest) / values).sqrt()
        rx, ry = (SCALE * radii).tolist()
        curves.append(
            f'<ellipse class="model" rx="{rx:.1f}" ry="{ry:.1f}" '
            f'transform="translate({x:.1f} {y:.1f}) rotate({turn:.1f})"/>'
        )
        points = centre + (vectors @ (radii[:, None] * circle)).T
        labels += label_at(points, 14, level, "level model")
    cross = f'<path class="model solid" d="M{x - 6:.1f} {y:.1f}h12m-6-6v12"/>'
    name = text((x - 26, y - 16), "the model’s minimum", "model")
    return [*curves, cross, *labels, name]


def draw_map(slice_: Slice) -> str:
    """Draw the plane, with one of the steps chosen."""

    def tip(alpha: float, iterations: int) -> tuple[float, float]:
        return place(slice_.axes @ slice_.steps[alpha, iterations].d)

    parts = contours(slice_)
    parts += ['<g class="quadratic">', *ellipses(slice_), "</g>"]
    for k in ITERATIONS:
        chosen = " chosen" if k == SHOWN_ITERATIONS else ""
        path = line(tip(alpha, k) for alpha in ALPHAS)
        parts.append(
            f'<polyline class="path{chosen}" data-iterations="{k}" points="{path}"/>'
        )
        if k != ITERATIONS[-1]:
            x, y = tip(ALPHAS[-1], k)
            parts.append(text((x + 20, y + 4), f"CG {k}", "level"))
    start = place(torch.zeros(2))
    x, y = tip(SHOWN_ALPHA, SHOWN_ITERATIONS)
    iterates = [start, *(tip(SHOWN_ALPHA, k) for k in ITERATIONS[:SHOWN_ITERATIONS])]
    for alpha, dx, dy in [(1.0, 14, -12), (0.1, 36, 18), (0.01, 40, 8), (1e-4, -58, 4)]:
        x_, y_ = tip(alpha, ITERATIONS[-1])
        parts.append(f'<circle class="tick" cx="{x_:.1f}" cy="{y_:.1f}" r="2.5"/>')
        parts.append(text((x_ + dx, y_ + dy), f"α = {alpha:g}"))
    left, top = (coordinate - 5 for coordinate in place(slice_.minimum))
    parts += [
        f'<path class="lowest" d="M{left:.1f} {top:.1f}l10 10m0-10l-10 10"/>',
        f'<polyline class="iterates" points="{line(iterates)}" '
        'marker-mid="url(#explorer-dot)"/>',
        f'<line class="arrow" x1="{start[0]}" y1="{start[1]}" x2="{x:.1f}" '
        f'y2="{y:.1f}" marker-end="url(#explorer-head)"/>',
        f'<rect class="start" x="{start[0] - 4}" y="{start[1] - 4}" width="8" '
        'height="8"/>',
        text((start[0] - 6, start[1] + 22), "start"),
        text((left + 5, top + 26), "lowest loss"),
    ]
    label = (
        "A map of the loss. Its contours close around a lowest point on the right. "
        "From the start, on the left, an arrow shows the step. With damping 1 it is "
        "short and crosses the contours at right angles. With less damping its tip "
        "follows a curve past the lowest point and uphill, to the minimum of the "
        "quadratic model, which dashed curves show."
    )
    return (
        f'<svg class="map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">\n<defs><marker id="explorer-head" viewBox="0 0 10 10" '
        'refX="9" refY="5" markerWidth="5" markerHeight="5" orient="auto">'
        '<path class="head" d="M0 0L10 5L0 10z"/></marker><marker id="explorer-dot" '
        'viewBox="0 0 8 8" refX="4" refY="4" markerWidth="6" markerHeight="6" '
        'markerUnits="userSpaceOnUse"><circle class="dot" cx="4" cy="4" r="3"/>'
        "</marker></defs>\n" + "\n".join(parts) + "\n</svg>"
    )


def draw_chart(slice_: Slice) -> str:
    """Draw the loss after the step over the damping, real and predicted."""
    zero, start = chart_place(1, 0)[1], chart_place(1, slice_.loss)[1]
    parts = [
        f'<path class="rule" d="M0 {zero:.1f}H{WIDTH}M0 {start:.1f}H{WIDTH}"/>',
        text((WIDTH - EDGE - 150, start - 6), f"loss at the start, {slice_.loss:.2f}"),
        text((WIDTH - EDGE - 9, zero - 6), "0"),
    ]
    for k in ITERATIONS:
        chosen = " chosen" if k == SHOWN_ITERATIONS else ""
        steps = [(alpha, slice_.steps[alpha, k]) for alpha in ALPHAS]
        real = line(chart_place(a, slice_.loss - s.actual) for a, s in steps)
        model = line(chart_place(a, slice_.loss - s.predicted) for a, s in steps)
        parts.append(
            f'<g class="curves{chosen}" data-iterations="{k}">'
            f'<polyline class="real" points="{real}"/>'
            f'<polyline class="model" points="{model}"/></g>'
        )
    shown = slice_.steps[SHOWN_ALPHA, SHOWN_ITERATIONS]
    for kind, fall in [("model", shown.predicted), ("real", shown.actual)]:
        x, y = chart_place(SHOWN_ALPHA, slice_.loss - fall)
        parts.append(f'<circle class="{kind} marker" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    label = (
        "The loss after the step against the damping. From 1 down, the loss falls, is "
        "lowest near 0.1, and rises again, to above that of the start. The quadratic "
        "model keeps falling, to far below zero."
    )
    parts += [
        text((60, 66), "loss after the step", "loss"),
        text((105, CHART_HEIGHT - 30), "as the model predicts it", "model"),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {CHART_HEIGHT}" role="img" '
        f'aria-label="{label}">\n' + "\n".join(parts) + "\n</svg>"
    )


def numbers(slice_: Slice) -> str:
    """Write what the script needs, and the tests compare, as JSON."""

    def row(step: Step) -> list[float]:
        x, y = (slice_.axes @ step.d).tolist()
        values = x, y, step.d.norm().item(), step.predicted, step.actual, step.residual
        return [round(value, 4) + 0.0 for value in values]  # no negative zero

    return json.dumps(
        {
            "alphas": ALPHAS,
            "loss": round(slice_.loss, 4),
            "map": {"left": LEFT, "bottom": BOTTOM, "scale": SCALE},
            "chart": {
                "edge": EDGE,
                "width": WIDTH - 2 * EDGE,
                "height": CHART_HEIGHT,
                "low": LOWEST,
                "high": HIGHEST,
            },
            "steps": [[row(slice_.steps[a, k]) for a in ALPHAS] for k in ITERATIONS],
        },
        separators=(",", ":"),
    )


def slider(name: str, words: str, value: int, count: int, says: str, ends: str) -> str:
    """Write a slider with its label."""
    return (
        f'<label for="explorer-{name}">{words} <strong id="explorer-{name}-value">'
        f"{says}</strong></label>\n"
        f'<input type="range" id="explorer-{name}" min="0" max="{count - 1}" step="1" '
        f'value="{value}">\n<div class="ends" aria-hidden="true">{ends}</div>'
    )


def rows(step: Step) -> str:
    """Write what a step did."""
    told = {
        "length": ("Length of the step", f"{step.d.norm().item():.2f}"),
        "residual": ("Residual left by CG", f"{100 * step.residual:.0f} %"),
        "predicted": ("The model promises a fall of", f"{step.predicted:.2f}"),
        "actual": ("The loss falls by", f"{step.actual:.2f}"),
        "kept": ("Kept of the promise", f"{100 * step.actual / step.predicted:.0f} %"),
    }
    return "\n".join(
        f'<span class="row">{words} <strong id="explorer-{name}">{value}</strong>'
        "</span>"
        for name, (words, value) in told.items()
    )


def draw(slice_: Slice) -> str:
    """Compose the fragment."""
    alpha = slider(
        "alpha",
        "Damping α",
        len(ALPHAS) - 1 - ALPHAS.index(SHOWN_ALPHA),
        len(ALPHAS),
        f"{SHOWN_ALPHA:g}",
        f"<span>{ALPHAS[-1]:g}, weak</span><span>1, strong</span>",
    )
    iterations = slider(
        "iterations",
        "CG iterations",
        ITERATIONS.index(SHOWN_ITERATIONS),
        len(ITERATIONS),
        f"{SHOWN_ITERATIONS}",
        "".join(f"<span>{k}</span>" for k in ITERATIONS),
    )
    presets = "\n".join(
        f'<button type="button" class="md-button" data-alpha="{ALPHAS.index(a)}" '
        f'data-count="{k}">{words}</button>'
        for words, (a, k) in PRESETS.items()
    )
    when = f"At α = {SHOWN_ALPHA:g}, with {SHOWN_ITERATIONS} CG iterations:"
    return f"""<figure class="explorer" data-search-exclude>
<link rel="stylesheet" href="../assets/explorer/explorer.css">
<div class="halves">
{draw_map(slice_)}
<div class="panel">
{draw_chart(slice_)}
<form class="controls" hidden>
<div class="presets" role="group" aria-label="Some steps to look at">
{presets}
</div>
{alpha}
{iterations}
<label class="check"><input type="checkbox" id="explorer-quadratic" checked>
Show the quadratic model (dashed)</label>
</form>
<output aria-live="polite" for="explorer-alpha explorer-iterations">
<span class="row" id="explorer-when">{when}</span>
{rows(slice_.steps[SHOWN_ALPHA, SHOWN_ITERATIONS])}
</output>
</div>
</div>
<figcaption>Shades and solid contours: the loss, deeper where it is lower. Dashed: the
quadratic model at the start. The arrow is the step. Its tip moves along the thick curve
as α changes; the thin ones are those of other numbers of CG iterations. Dots: the CG
iterates.</figcaption>
<script type="application/json" id="explorer-numbers">{numbers(slice_)}</script>
<script src="../assets/explorer/explorer.js" defer></script>
</figure>
"""


if __name__ == "__main__":
    TARGET.write_text(draw(Slice()), encoding="utf-8")
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1024:.0f} KiB")
