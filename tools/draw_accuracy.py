"""Draw and tabulate the JSON files in ``docs/assets/accuracy``.

They are ``results.json``, time to accuracy, and ``paper.json``, a row of the paper.

Run it as ``python tools/draw_accuracy.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from draw_benchmarks import short, table
from matplotlib import rc_context
from matplotlib.figure import Figure

from hbp.tutorial.plotting import SETTINGS, STYLES, Drawing, Panel, curves

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "assets" / "accuracy"
Json = dict[str, Any]
METHODS = {"hbp": "HBP", "adam": "Adam", "sgd": "SGD"}
NETWORKS = {"shallow": (0.45, 0.50), "deep": (0.35, 0.40, 0.45)}


def setting(run: Json) -> tuple[Any, ...]:
    """Everything but the seed."""
    return run["network"], run["method"], run["lr"], run["decay"], run["alpha"]


def repeated(report: Json) -> list[list[Json]]:
    """The settings that ran with all seeds."""
    by_setting: dict[tuple[Any, ...], list[Json]] = {}
    for run in report["runs"]:
        by_setting.setdefault(setting(run), []).append(run)
    most = max(map(len, by_setting.values()))
    return [runs for runs in by_setting.values() if len(runs) == most]


def best(run: Json) -> float:
    """The highest test accuracy in any epoch."""
    return max(entry["test"] for entry in run["log"])


def finals(report: Json) -> dict[tuple[str, str], list[Json]]:
    """By network and method, the runs of the setting that is best at its worst."""
    groups: dict[tuple[str, str], list[Json]] = {}
    for runs in sorted(repeated(report), key=lambda runs: min(map(best, runs))):
        groups[runs[0]["network"], runs[0]["method"]] = runs
    return groups


def reached(run: Json, accuracy: float, unit: str) -> float | None:
    """When the test accuracy first was at least ``accuracy``."""
    for epoch, entry in enumerate(run["log"], start=1):
        if entry["test"] >= accuracy:
            return epoch if unit == "epochs" else entry["seconds"]
    return None


def times(report: Json) -> str:
    """Median epochs and seconds to some accuracies; how many seeds got there."""
    pages = []
    for network, levels in NETWORKS.items():
        head = [f"{network}, learning rate"]
        head += [f"{u} to {100 * a:.0f} %" for a in levels for u in ("epochs", "s")]
        rows = []
        for runs in repeated(report):
            if runs[0]["network"] == network:
                row = [f"{METHODS[runs[0]['method']]}, {runs[0]['lr']}"]
                for level in levels:
                    for unit in ("epochs", "seconds"):
                        row.append(in_brackets(reached(r, level, unit) for r in runs))
                rows.append([*row, f"{median(map(best, runs)):.3f}"])
        pages.append(table([*head, "best test accuracy"], rows))
    return "\n".join(pages)


def in_brackets(hits: Iterable[float | None]) -> str:
    """The median of those that got there, and how many they are."""
    found = [hit for hit in hits if hit is not None]
    count = f"({len(found)})"
    return f"{median(found):.0f} {count}" if found else f"never {count}"


def grid(report: Json) -> str:
    """Every run on the first seed."""
    rows = []
    for run in report["runs"]:
        if run["seed"] == 0:
            log = run["log"]
            alpha = "" if run["alpha"] is None else str(run["alpha"])
            rows.append(
                [
                    f"{run['network']}, {METHODS[run['method']]}",
                    str(run["lr"]),
                    alpha,
                    str(run["decay"]),
                    str(run["batch"]),
                    str(run["epochs"]),
                    f"{log[-1]['train']:.3f}",
                    f"{best(run):.3f}",
                    short(log[-1]["seconds"] / len(log)),
                ]
            )
    head = ["run", "learning rate", "α", "× each epoch", "batch", "epochs"]
    head += ["last training accuracy", "best test accuracy", "s per epoch"]
    return table(head, rows)


def draw(report: Json) -> Drawing:
    """Test accuracy against epochs and seconds, mean and range of the seeds."""
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    runs = finals(report)
    units: dict[str, Callable[[Json, int], float]] = {
        "epochs": lambda run, epoch: epoch + 1,
        "processor seconds, one thread": lambda run, epoch: run["log"][epoch][
            "seconds"
        ],
    }
    for row, network in enumerate(NETWORKS):
        for column, (unit, position) in enumerate(units.items()):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for (method, name), (colour, dashes, marker, _) in zip(
                METHODS.items(), STYLES, strict=False
            ):
                group = runs[network, method]
                epochs = range(len(group[0]["log"]))
                x = [fmean(position(run, e) for run in group) for e in epochs]
                y = [[run["log"][e]["test"] for run in group] for e in epochs]
                low, mean, high = (list(map(f, y)) for f in (min, fmean, max))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(
                    x, mean, color=colour, ls=dashes, marker=marker, ms=4, label=name
                )
            axes.set_xlabel(unit)
            axes.set_ylabel("test accuracy")
            axes.set_title(network, fontsize=10)
            axes.grid(True)
            axes.legend(
                loc="lower right" if network == "shallow" else "upper left",
                frameon=False,
                fontsize=9,
            )
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


Pages = dict[str, Callable[[Json], str]]
Figures = dict[str, Callable[[Json], Drawing]]
PARTS: dict[str, tuple[Pages, Figures]] = {
    "results": ({"times": times, "grid": grid}, {"curves": draw}),
    "paper": (
        {"paper-settings": paper_settings, "paper": paper},
        {"paper": draw_paper},
    ),
}


def main(folder: Path = FOLDER) -> None:
    """Write the tables and the figure of each file there is."""
    for name, (pages, figures) in PARTS.items():
        if (folder / f"{name}.json").exists():
            report = json.loads((folder / f"{name}.json").read_text("utf-8"))
            for page, text in pages.items():
                (folder / f"{page}.md").write_text(text(report), "utf-8")
            with rc_context(SETTINGS):
                for figure, drawing in figures.items():
                    svg = drawing(report).svg()
                    (folder / f"{figure}.svg").write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
