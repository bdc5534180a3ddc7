"""Draw and tabulate the JSON files in ``docs/assets/accuracy``.

They are ``results.json``, the race, ``paper.json``, a row of the paper, and
``language.json``, a small language model.

Run it as ``python tools/draw_accuracy.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from draw_benchmarks import short, table
from matplotlib import rc_context
from matplotlib.figure import Figure

from hbp.tutorial.plotting import SETTINGS, STYLES, Drawing, Panel, curves

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "assets" / "accuracy"
Json = dict[str, Any]
METHODS = {
    "hbp": "HBP",
    "hbp-inputs": "HBP, E[xxᵀ]",
    "centred": "centred SGD",
    "muon": "Muon, AdamW",
    "adamw": "AdamW",
    "sgd": "SGD",
    "adam": "Adam",
}
# The two races that the page shows; the others are in the appendix.
FIRST = ("shallow", "deep")


def part(report: Json, first: bool) -> Json:
    """The runs of the two races that the page shows, or of the others."""
    runs = [run for run in report["runs"] if (run["network"] in FIRST) == first]
    return {**report, "runs": runs}


def by_network(report: Json, trial: bool) -> dict[str, dict[str, list[Json]]]:
    """The runs by network and method, as they are in the file."""
    found: dict[str, dict[str, list[Json]]] = {}
    for run in report["runs"]:
        if run["trial"] == trial:
            methods = found.setdefault(run["network"], {})
            methods.setdefault(run["method"], []).append(run)
    return found


def setting(run: Json) -> str:
    """What trials choose, in words."""
    alpha = "" if run["alpha"] is None else f", α {run['alpha']}"
    rate = f"at most {run['lr']}" if run["free"] else str(run["lr"])
    return f"{rate}{alpha}, {'falls' if run['falls'] else 'stays'}"


def spread(values: list[float]) -> str:
    """The mean, and in brackets the lowest and the highest; in percent."""
    mean, low, high = (100 * f(values) for f in (fmean, min, max))
    return f"{mean:.1f} ({low:.1f}–{high:.1f})"


def race(report: Json) -> str:
    """Accuracies on the test images, and what an epoch costs."""
    rows = [
        [
            f"{network}, {METHODS[method]}",
            setting(runs[0]),
            *(
                spread([run["log"][e - 1]["test"] for run in runs])
                for e in thirds(runs)
            ),
            spread([run["log"][-1]["averaged"] for run in runs]),
            short(report["costs"][network][method]),
        ]
        for network, methods in by_network(report, trial=False).items()
        for method, runs in methods.items()
    ]
    head = ["", "learning rate", "after a third", "after two thirds", "at the end"]
    return table([*head, "averaged", "time of a step, × SGD"], rows)


def thirds(runs: list[Json]) -> list[int]:
    """The epochs after which a race is looked at."""
    return [runs[0]["epochs"] * k // 3 for k in (1, 2, 3)]


def grid(report: Json) -> str:
    """Every trial: its accuracy on the images that were held out, at its end."""
    rows = [
        [f"{network}, {METHODS[method]}"]
        + [f"{setting(r)}: {100 * r['log'][-1]['test']:.1f}" for r in runs]
        for network, methods in by_network(report, trial=True).items()
        for method, runs in methods.items()
    ]
    return table(["", *(f"trial {n}" for n in range(1, len(rows[0])))], rows)


def draw(report: Json) -> Drawing:
    """Test accuracy against epochs and time, mean and range of the seeds."""
    networks = by_network(report, trial=False)
    figure = Figure(figsize=(7.2, 3.2 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, squeeze=False)
    for row, (network, methods) in zip(axes, networks.items(), strict=True):
        for panel, by_time in zip(row, (False, True), strict=True):
            styles = zip(methods.items(), STYLES, strict=True)
            for (method, runs), (colour, dashes, marker, _) in styles:
                epochs = range(runs[0]["epochs"])
                cost = report["costs"][network][method] if by_time else 1.0
                x = [cost * (epoch + 1) for epoch in epochs]
                y = [[run["log"][e]["test"] for run in runs] for e in epochs]
                low, mean, high = (list(map(f, y)) for f in (min, fmean, max))
                panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
                panel.plot(
                    x,
                    mean,
                    color=colour,
                    ls=dashes,
                    marker=marker,
                    ms=4,
                    label=METHODS[method],
                )
            panel.set_title(network, fontsize=10)
            panel.set_ylabel("test accuracy")
            panel.grid(True)
        row[0].set_xlabel("epochs")
        row[0].set_xticks(thirds(runs))
        row[1].set_xlabel("time, in epochs of SGD")
        row[1].legend(loc="lower right", frameon=False, fontsize=9)
    return Drawing(figure)


def paper_settings(report: Json) -> str:
    """How the runs were made, and where."""
    made, settings, runs = report["provenance"], report["settings"], report["runs"]
    commit = made["commit"] + (" with changes" if made["uncommitted_changes"] else "")
    rates = [f"{METHODS[run['method']]} {run['lr']}" for run in runs]
    alphas = [f"{METHODS[r['method']]} {r['alpha']}" for r in runs if r["alpha"]]
    rows = [
        ("network", "-".join(map(str, settings["sizes"])) + ", sigmoids between"),
        ("batch", str(runs[0]["batch"])),
        ("learning rate, constant", ", ".join(rates)),
        ("damping α", ", ".join(alphas)),
        ("processor seconds, at most", f"{settings['budget']:.0f}"),
        ("machine", f"{made['machine']}; threads: {made['threads']}"),
        ("date and commit", f"{made['date']}, {commit}"),
    ]
    return table(["", ""], rows).replace("---:", "---")


def paper(report: Json) -> str:
    """Each run at its start, in the middle and at its end."""
    head = ["run, epoch", "processor s", "training loss", "training accuracy"]
    head += ["test loss", "test accuracy"]
    rows = []
    for run in report["runs"]:
        for epoch in shown(run["log"]):
            entry = run["log"][epoch - 1]
            keys = ("train_loss", "train", "test_loss", "test")
            row = [f"{METHODS[run['method']]}, {epoch}", f"{entry['seconds']:.0f}"]
            rows.append([*row, *(f"{entry[key]:.3f}" for key in keys)])
    return table(head, rows)


def shown(log: list[Json]) -> list[int]:
    """The first epoch, every tenth, that of the best test accuracy, and the last."""
    best_epoch = 1 + max(range(len(log)), key=lambda epoch: log[epoch]["test"])
    return sorted({1, *range(10, len(log), 10), best_epoch, len(log)})


def draw_paper(report: Json) -> Drawing:
    """Training loss and test accuracy, against epochs."""
    names = {"train_loss": "training loss", "test": "test accuracy"}
    panels = []
    for key, name in names.items():
        lines = {}
        for run in report["runs"]:
            epochs = range(1, len(run["log"]) + 1)
            values = [entry[key] for entry in run["log"]]
            lines[METHODS[run["method"]]] = (epochs, values)
        panels.append(Panel("epochs", name, lines))
    return curves(panels)


def language(report: Json) -> str:
    """Held-out losses of the small language model, and what a step takes."""
    names = {
        "exact": "HBP, exact blocks, α",
        "averaged": "HBP, averaged blocks, α",
        "muon": "Muon",
        "adamw": "AdamW",
    }
    looks = ["5", "10", "20", "40"]
    kinds: dict[tuple[int, str], list[Json]] = {}
    for run in report["runs"]:
        if not run["trial"]:
            kinds.setdefault((run["batch"], run["method"]), []).append(run)
    rows = []
    for (batch, method), runs in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        losses = [
            [r["losses"][at] for r in runs] for at in looks if at in runs[0]["losses"]
        ]
        cells = [f"{fmean(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in losses]
        seconds = fmean([run["seconds"] for run in runs])
        rows.append(
            [str(batch), f"{names[method]} {runs[0]['setting']}", *cells]
            + [""] * (len(looks) - len(cells))
            + [f"{seconds:.2g}"]
        )
    steps = [f"{look} steps" for look in looks]
    return table(["batch", "", *steps, "seconds a step"], rows)


Pages = dict[str, Callable[[Json], str]]
Figures = dict[str, Callable[[Json], Drawing]]
PARTS: list[tuple[str, Callable[[Json], Json], Pages, Figures]] = [
    ("results", lambda report: part(report, True), {"race": race}, {"curves": draw}),
    (
        "results",
        lambda report: part(report, False),
        {"race-more": race},
        {"curves-more": draw},
    ),
    ("results", lambda report: report, {"grid": grid}, {}),
    ("language", lambda report: report, {"language": language}, {}),
    (
        "paper",
        lambda report: report,
        {"paper-settings": paper_settings, "paper": paper},
        {"paper": draw_paper},
    ),
]


def main(folder: Path = FOLDER) -> None:
    """Write the tables and the figures of all runs there are."""
    for name, chosen, pages, figures in PARTS:
        path = folder / f"{name}.json"
        report = chosen(json.loads(path.read_text("utf-8"))) if path.exists() else {}
        if not report.get("runs"):
            continue
        for page, text in pages.items():
            (folder / f"{page}.md").write_text(text(report), "utf-8")
        with rc_context(SETTINGS):
            for figure, drawing in figures.items():
                svg = drawing(report).svg()
                (folder / f"{figure}.svg").write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
