"""Cells of a check of the planner as lines and as plots."""

from __future__ import annotations

from pathlib import Path

from benchmarks.decoding import Cell
from hsrpc.bench.report import ACTIVATION_SHARE, plot_sweep

PLANNER = "planner"
"""The name of the planner's own choice."""
RECOMPUTE = "recompute"
"""A sweep over the part of the tokens that is recomputed, in place of the activation share."""


def report(cells: list[Cell]) -> None:
    """A line a cell, and how the planner's choice compares with the best."""
    for cell in cells:
        print(line_of(cell))
    rates = {cell["name"]: cell["tokens_per_second"] for cell in cells if "failure" not in cell}
    if PLANNER in rates:
        print(f"planner / best: {rates[PLANNER] / max(rates.values()):.3f}")


def line_of(cell: Cell) -> str:
    """Step time and rate, or why there is none."""
    if "failure" in cell:
        return f"{cell['name']:42} {cell['failure']}"
    ratio, rate = cell["predicted_over_measured"], cell["tokens_per_second"]
    step = f"{cell['step_seconds'] * 1e3:9.1f} ms"
    recomputed = f", {cell['recomputed_share']:.1%} recomputed" if cell.get("recomputed_share") else ""
    return f"{cell['name']:42} {step}, predicted / measured {ratio:.3f}, {rate:9.1f} tokens/s{recomputed}"


def draw_sweep(cells: list[Cell], file: Path, *, over: str) -> None:
    """Tokens/s over the share, measured and predicted, with the planner's choice."""
    points = sorted((share_of(cell, over), *rates_of(cell)) for cell in cells if cell["name"] != PLANNER)
    chosen = [(share_of(cell, over), cell["tokens_per_second"]) for cell in cells if cell["name"] == PLANNER]
    plot_sweep(
        f"{title_of(cells)}, batch {cells[0]['plan']['batch']}",
        [(share, measured) for share, measured, _ in points],
        [(share, predicted) for share, _, predicted in points],
        file,
        chosen=chosen[0] if chosen else None,
        share="part of the tokens recomputed" if over == RECOMPUTE else ACTIVATION_SHARE,
    )


def draw_grid(cells: list[Cell], file: Path) -> None:
    """A bar of the tokens/s of each cell, the planner's first, with what was predicted."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.8 + 0.4 * len(cells)), layout="constrained")
    measured, predicted = zip(*map(rates_of, cells), strict=True)
    rows = range(len(cells))
    colors = ["C1" if cell["name"] == PLANNER else "C0" for cell in cells]
    bars = axes.barh(rows, measured, color=colors, label="measured")
    axes.bar_label(bars, fmt="%.4g", label_type="center")
    axes.scatter(predicted, rows, color="black", marker="D", zorder=3, label="predicted")
    axes.set_yticks(rows, [cell["name"] for cell in cells])
    axes.invert_yaxis()
    axes.set(xlabel="decode tokens/s", title=title_of(cells))
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def share_of(cell: Cell, over: str) -> float:
    """The plan's activation share, or the part of the tokens that was recomputed."""
    share: float = cell["recomputed_share"] if over == RECOMPUTE else cell["plan"]["activation_share"]
    return share


def rates_of(cell: Cell) -> tuple[float, float]:
    """Tokens/s measured and predicted."""
    return cell["tokens_per_second"], cell["tokens_per_second"] / cell["predicted_over_measured"]


def title_of(cells: list[Cell]) -> str:
    return f"{cells[0]['model']} on {cells[0]['device']}"
