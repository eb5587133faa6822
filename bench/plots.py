"""The plots of docs/performance.md, from what the benches saved: `python bench/plots.py FOLDER docs/images`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]
COLORS = ("#1f77b4", "#17becf", "#ff7f0e", "#d62728", "#2ca02c", "#98df8a", "#9467bd")
plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "bursar", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def lines(axes: Any, rows: Rows, group: str, x: str, y: str, **style: Any) -> None:
    """One line for each value of `group`, in the order in which they come."""
    for color, name in zip(COLORS, dict.fromkeys(row[group] for row in rows), strict=False):
        some = [row for row in rows if row[group] == name]
        axes.plot([row[x] for row in some], [row[y] for row in some], "o-", ms=4, color=color, label=name, **style)


def logarithmic(axes: Any, counts: Iterable[int], x: str, y: str) -> None:
    """Both axes by powers, the lower one marked where something was measured."""
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    ticks = sorted(set(counts))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def throughput(rows: Rows) -> Any:
    """Pairs a second, and what the slowest of a hundred waits, by processes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    hot = [row for row in rows if row["accounts"] == "hot"]
    processes = [row["processes"] for row in hot]
    lines(left, hot, "store", "processes", "per_s")
    logarithmic(left, processes, "processes, all on the same accounts", "pairs of reserve and settle a second")
    lines(right, hot, "store", "processes", "p99_us")
    logarithmic(right, processes, "processes, all on the same accounts", "99th percentile of a pair, µs")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def floors(rows: Rows) -> Any:
    """How near each store comes to its raw driver."""
    figure, sides = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for axes, accounts in zip(sides, ("hot", "own"), strict=True):
        some = [row for row in rows if row["accounts"] == accounts and "leased" not in row["store"]]
        lines(axes, some, "store", "processes", "ratio")
        axes.axhline(1, color="black", lw=0.8, ls="--")
        logarithmic(axes, [row["processes"] for row in some], f"processes, {accounts} accounts", "")
        axes.set(yscale="linear", ylim=(0, None))
    sides[0].set_ylabel("pairs a second, to the raw driver")
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def growth(rows: Rows) -> Any:
    """A pair's time by what is kept, to that with a thousand of it."""
    figure, sides = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, what in zip(sides, ("records", "accounts"), strict=True):
        some = [row for row in rows if row["what"] == what]
        lines(axes, some, "work", "count", "ratio")
        axes.axhline(1, color="black", lw=0.8, ls="--")
        logarithmic(axes, [row["count"] for row in some], what, "")
        axes.set(yscale="linear", ylim=(0, 2))
        axes.legend(fontsize=7)
    sides[0].set_ylabel("time of a pair, to that with 1,000")
    return figure


def peers(rows: Rows) -> Any:
    """Calls that a provider billed under a cap for ten."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for offset, (scenario, color) in enumerate(zip(("alone", "threads", "tasks"), COLORS[::2], strict=False)):
        label = {"alone": "1 caller, 30 tries", "threads": "50 threads", "tasks": "50 asyncio tasks"}[scenario]
        places = [at + 0.27 * (offset - 1) for at in range(len(rows))]
        axes.barh(places, [row[scenario] or 0 for row in rows], height=0.25, color=color, label=label)
    axes.axvline(10, color="black", lw=0.8, ls="--")
    axes.set_yticks(range(len(rows)), [row["peer"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("calls that were billed; the cap is ten")
    axes.legend(loc="lower right")
    return figure


def main(measured: Path, images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    for source, draw in (("throughput", throughput), ("throughput", floors), ("growth", growth), ("peers", peers)):
        file = measured / f"{source}.json"
        if file.exists():
            figure = draw(json.loads(file.read_text("utf-8"))["results"])
            figure.savefig(images / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
