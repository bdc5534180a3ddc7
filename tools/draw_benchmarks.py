"""Draw figures and write tables from the JSON files that ``make bench`` writes.

For ``cpu.json`` there come ``cpu-steps.svg``, ``cpu-steps.md`` and so on beside it,
for a second precision on a GPU ``cuda-tf32-steps.svg``. A page of the site includes a
table by a line ``--8<-- "cpu-steps.md"``, so that nobody types a measured number.

    python tools/draw_benchmarks.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from hbp.tutorial.plotting import INK, SETTINGS, STYLES, Drawing

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "assets" / "benchmarks"
Json = dict[str, Any]
LABELS = {
    "width": "width of the layers",
    "depth": "hidden layers",
    "batch": "batch size",
    "classes": "classes",
}


def measured(points: Json) -> Json:
    """The points that were not skipped."""
    return {name: point for name, point in points.items() if "skipped" not in point}


# --- Tables -------------------------------------------------------------------


def tables(report: Json) -> dict[str, str]:
    """Markdown by file name, all names without the device in front."""
    pages = {"machine": machine(report)}
    for prefix, part in sections(report):
        pages[f"{prefix}steps"] = steps(part["steps"])
        pages[f"{prefix}growth"] = growth(part["growth"])
        pages[f"{prefix}convolution"] = steps(part["convolution"]["steps"])
        pages[f"{prefix}convolution-memory"] = memory(part["convolution"]["memory"])
        pages[f"{prefix}memory"] = memory(part["memory"])
        pages[f"{prefix}ceilings"] = ceilings(part["ceilings"], report["settings"])
        for point, methods in measured(part["stages"]).items():
            for method, result in methods.items():
                solver = method.removeprefix("hbp, ")
                name = f"{prefix}stages-{point}-{solver}"
                pages[name] = stages(result["stages"], part["ceilings"])
    return pages


def sections(report: Json) -> list[tuple[str, Json]]:
    """What was measured, with what its file names begin with."""
    names = {"float32": "", "tf32": "tf32-"}
    return [(names[name], report[name]) for name in names if name in report]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(report: Json) -> str:
    """Where, when, and with what."""
    made, settings = report["provenance"], report["settings"]
    versions = [f"{k} {v}" for k, v in made["versions"].items() if v]
    processors = f"{made['processors']} processors, threads: {made['threads']}"
    commit = made["commit"] + (" with changes" if made["uncommitted_changes"] else "")
    rows = [
        ("machine", f"{made['machine']}; {processors}"),
        ("date", made["date"]),
        ("commit", commit),
        ("versions", f"Python {made['python']}, {', '.join(versions)}"),
        ("network", "-".join(map(str, settings["sizes"])) + ", sigmoids between"),
        ("batch", f"{settings['batch']}: {settings['data']}"),
    ]
    rows += [("skipped", f"{k}: {v}") for k, v in report["skipped"].items()]
    return table(["", ""], rows).replace("---:", "---")


def steps(points: Json) -> str:
    """Milliseconds and multiples of SGD's step, with quartiles, at each point."""
    points = measured(points)
    head = ["step"]
    for point in points:
        head += [f"{point}, ms", "× SGD", "quartiles", "rounds"]
    names = list(next(iter(points.values()))["methods"])
    rows = []
    for name in names:
        row = [name]
        for point in points.values():
            result = point["methods"][name]
            low, high = result["quartiles"]
            row += [
                short(1e3 * result["seconds"]),
                short(result["times_sgd"]),
                f"{short(low)} to {short(high)}",
                str(result["rounds"]),
            ]
        rows.append(row)
    return table(head, rows)


def growth(result: Json) -> str:
    """Exponents: fitted to the seconds, and of the counted arithmetic."""
    panels = result["panels"]
    head = ["exponent in"]
    methods = list(next(iter(panels.values()))["methods"])
    for method in methods:
        head += [method, "predicted"]
    rows = []
    for name, panel in panels.items():
        first, last = panel["values"][0], panel["values"][-1]
        row = [f"{LABELS[name]}, {first} to {last}"]
        for method in methods:
            fit = panel["methods"][method]
            row += [short(fit["fitted"]), short(fit["predicted"])]
        rows.append(row)
    return table(head, rows)


def memory(result: Json) -> str:
    """Peaks, in megabytes, and what they are beyond SGD's."""
    parameters = result["parameter_bytes"]
    baseline = next(iter(result["peak_bytes"].values()))
    rows = [
        (
            name,
            short(peak / 1e6),
            short((peak - baseline) / 1e6),
            short((peak - baseline) / parameters),
        )
        for name, peak in result["peak_bytes"].items()
    ]
    head = [
        f"peak beyond the parameters' {short(parameters / 1e6)} MB",
        "MB",
        "beyond SGD's, MB",
        "in units of the parameters",
    ]
    return table(head, rows)


def ceilings(result: Json, settings: Json) -> str:
    """What the machine reaches."""
    sizes = settings["sizes"]
    rows = [
        ("all matrix products of a step", gigas(result["flops_per_second"], "FLOP/s")),
    ]
    by_layer = zip(sizes, sizes[1:], result["flops_per_second_by_layer"], strict=False)
    rows += [(f"those of layer {i}-{o}", gigas(v, "FLOP/s")) for i, o, v in by_layer]
    rows.append(("streaming a large array", gigas(result["bytes_per_second"], "B/s")))
    return table(["", "best of some attempts"], rows)


def gigas(value: float, unit: str) -> str:
    """A rate in units of 10⁹."""
    return f"{short(value / 1e9)} G{unit}"


def stages(result: Json, rates: Json) -> str:
    """Each stage beside its floor: arithmetic or traffic, whichever takes longer."""
    rows = []
    total = total_floor = 0.0
    for name, stage in result.items():
        arithmetic = stage["flops"] / rates["flops_per_second"]
        traffic = stage["bytes"] / rates["bytes_per_second"]
        floor = max(arithmetic, traffic)
        total += stage["seconds"]
        total_floor += floor
        rows.append(
            (
                name,
                short(1e3 * stage["seconds"]),
                short(stage["flops"] / 1e9),
                short(stage["bytes"] / 1e6),
                short(1e3 * floor),
                "arithmetic" if arithmetic > traffic else "traffic",
                short(stage["seconds"] / floor),
            )
        )
    rows.append(
        (
            "together",
            short(1e3 * total),
            "",
            "",
            short(1e3 * total_floor),
            "",
            short(total / total_floor),
        )
    )
    head = ["stage", "ms", "GFLOP", "MB", "floor, ms", "set by", "× its floor"]
    return table(head, rows)


def short(value: float) -> str:
    """Three digits, or two after the point: 0.05, 1.23, 12.3, 123, 1234."""
    size = abs(value)
    if size < 9.995:
        text = f"{value:.2f}" if size >= 0.005 or value == 0 else f"{value:.0e}"
    else:
        text = f"{value:.1f}" if size < 99.95 else f"{value:.0f}"
    return text.replace("-", "−")


# --- Figures ------------------------------------------------------------------


def figures(report: Json) -> dict[str, Drawing]:
    """Figures by file name, all names without the device in front."""
    drawings = {}
    with rc_context(SETTINGS):
        for prefix, part in sections(report):
            drawings[f"{prefix}steps"] = draw_steps(measured(part["steps"]))
            drawings[f"{prefix}growth"] = draw_growth(part["growth"]["panels"])
    return drawings


def draw_steps(points: Json) -> Drawing:
    """Bars on a log scale: filled for hbp, hatched for what others compute."""
    count = max(len(point["methods"]) for point in points.values())
    size = (5.6 * len(points), 0.9 + 0.32 * count)
    figure = Figure(figsize=size, layout="constrained")
    ratios = [r["times_sgd"] for p in points.values() for r in p["methods"].values()]
    for column, (name, point) in enumerate(points.items()):
        axes = figure.add_subplot(1, len(points), column + 1)
        _bars(axes, point["methods"])
        # One scale for all, with room for the number behind the longest bar.
        axes.set_xscale("log")
        axes.set_xlim(min(0.8, 0.9 * min(ratios)), 2.2 * max(ratios))
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200) if t < 2 * max(ratios)]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color=INK, lw=1)
        axes.set_xlabel("time of a step, in steps of SGD")
        axes.set_title(name, fontsize=10)
    return Drawing(figure)


def _bars(axes: Axes, methods: Json) -> None:
    for place, (name, result) in enumerate(methods.items()):
        own = name.startswith("hbp")
        colour = STYLES[0][0] if own else INK
        ratio = result["times_sgd"]
        axes.barh(
            place,
            ratio - 1,
            left=1,  # On a log scale a bar starts where it says "as fast as SGD".
            height=0.62,
            facecolor=colour if own else "none",
            edgecolor=colour,
            hatch=None if own else "////",
        )
        end = max(ratio, 1)
        axes.annotate(
            f"{short(ratio)} ×",
            (end, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(methods)), list(methods))
    axes.invert_yaxis()


def draw_growth(panels: Json) -> Drawing:
    """Four log-log panels; the legend has the fitted and the predicted exponents."""
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    for place, (name, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(2, 2, place + 1)
        lines = zip(panel["methods"].items(), STYLES, strict=False)
        for (method, line), (colour, dashes, marker, _) in lines:
            axes.plot(
                panel["values"],
                [1e3 * seconds for seconds in line["seconds"]],
                color=colour,
                ls=dashes,
                lw=1.7,
                marker=marker,
                ms=5,
                label=f"{method}: {line['fitted']:.2f} ({line['predicted']:.2f})",
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(panel["values"]))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        # Room for the legend above the lines.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.45)
        axes.set_xlabel(LABELS[name])
        axes.set_ylabel("ms for a step")
        axes.grid(True)
        axes.legend(
            loc="upper left",
            frameon=False,
            fontsize=9,
            title="exponent: fitted (predicted)",
            title_fontsize=9,
            alignment="left",
        )
    return Drawing(figure)


def main(folder: Path = FOLDER) -> None:
    """Draw all there is."""
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text("utf-8"))
        for name, page in tables(report).items():
            (folder / f"{path.stem}-{name}.md").write_text(page, "utf-8")
        for name, drawing in figures(report).items():
            svg = folder / f"{path.stem}-{name}.svg"
            svg.write_text(drawing.svg(), "utf-8")
        print(f"{path.name}: drawn")


if __name__ == "__main__":
    main()
