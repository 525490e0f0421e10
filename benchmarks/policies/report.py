"""Cells of policies as a table and as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.decoding import Cell
from hsrpc.config import format_bytes

_COLUMNS = ("step", "limit", "efficiency", "decode", "rebuilt", "recomputed", "cache loaded a step")


def print_table(title: str, cells: Sequence[Cell]) -> None:
    """A row a policy; below it, how each divides the cache, or why it was not measured."""
    table = Table("policy", title=title, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for cell in measured(cells):
        table.add_row(cell["label"], *_row(cell))
    console = Console(width=120)
    console.print(table)
    for cell in cells:
        console.print(f"{cell['label']}: {cell.get('failure') or cell['reason']}", markup=False, highlight=False)


def line_of(cell: Cell) -> str:
    """What came of a policy, for those who wait for the others."""
    if "failure" in cell:
        return f"{cell['label']}: {cell['failure']}"
    return f"{cell['label']}: {cell['step_seconds'] * 1e3:.1f} ms a step, {cell['tokens_per_second']:.1f} tokens/s"


def plot(title: str, cells: Sequence[Cell], file: Path) -> None:
    """A bar of decode tokens/s for each policy, emulations in a colour of their own, with its limit."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.8 + 0.4 * len(cells)), layout="constrained")
    rows = range(len(cells))
    rates = [cell["tokens_per_second"] for cell in cells]
    limits = [cell["result"]["batch"] / cell["limit_seconds"] for cell in cells]
    colors = ["C1" if cell["paper"] else "C0" for cell in cells]
    axes.bar_label(axes.barh(rows, rates, color=colors, label="measured"), fmt="%.4g", label_type="center")
    axes.scatter(limits, rows, color="black", marker="D", zorder=3, label="limit")
    axes.set_yticks(rows, [f"{cell['label']}, share {cell['share']:.2f}" for cell in cells])
    axes.invert_yaxis()
    axes.set(xlabel="decode tokens/s", title=title)
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def measured(cells: Sequence[Cell]) -> list[Cell]:
    """Those without a failure."""
    return [cell for cell in cells if "failure" not in cell]


def _row(cell: Cell) -> list[str]:
    return [
        f"{cell['step_seconds'] * 1e3:.1f} ms",
        f"{cell['limit_seconds'] * 1e3:.1f} ms",
        f"{cell['efficiency']:.3f}",
        f"{cell['tokens_per_second']:.1f} tokens/s",
        f"{cell['share']:.2f}",
        f"{cell['recomputed_share']:.2f}",
        format_bytes(cell["cache_bytes"]),
    ]
