"""What is told of the cases: a line for each while they run, a table and a verdict at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.decoding import Cell
from benchmarks.guard.reference import Comparison

_COLUMNS = ("step", "limit", "efficiency", "to reference", "step to ref.", "predicted", "tokens/s", "host", "lag p99")
_NONE = "-"


def line_of(cell: Cell) -> str:
    """A case in one line."""
    if "failure" in cell:
        return f"{cell['name']}: {cell['failure']}"
    figures = f"step {_ms(cell['step_seconds'])}, efficiency {cell['efficiency']:.3f}"
    return f"{cell['name']}: {figures}; {cell['wall_seconds']:.0f} s, {cell['ready_seconds']:.0f} s of them loading"


def print_table(title: str, comparisons: Sequence[Comparison]) -> None:
    """One row a case."""
    table = Table("case", title=title, title_justify="left")
    for column in (*_COLUMNS, "took"):
        table.add_column(column, justify="right")
    for each in comparisons:
        cell = each.cell
        took = f"{cell['wall_seconds']:.0f} s"
        table.add_row(cell["name"], *([_NONE] * len(_COLUMNS) if "failure" in cell else _figures(each)), took)
    Console(width=140).print(table)


def verdict(comparisons: Sequence[Comparison], within: float) -> list[str]:
    """A line for each case that lost, failed or was not compared, and one for those that were where none lost."""
    lines = []
    num_compared = sum(each.efficiency is not None for each in comparisons)
    for each in comparisons:
        name = each.cell["name"]
        if "failure" in each.cell:
            lines.append(f"ERROR {name}: {each.cell['failure']}")
        elif each.efficiency is None:
            lines.append(f"NOT COMPARED {name}: {each.remark}")
        elif each.has_lost(within):
            lost = f"lost {1 - each.efficiency:.1%} of its efficiency, more than {within:.1%}"
            lines.append(f"LOST {name}: {lost}; it shows {each.cell['shows']}")
    if num_compared and not any(each.has_lost(within) for each in comparisons):
        lines.append(f"OK: {num_compared} compared, none lost more than {within:.1%} of its efficiency")
    return lines


def _figures(each: Comparison) -> list[str]:
    cell = each.cell
    return [
        _ms(cell["step_seconds"]),
        _ms(cell["limit_seconds"]),
        f"{cell['efficiency']:.3f}",
        _ratio(each.efficiency),
        _ratio(each.step),
        _ms(cell["predicted_step_seconds"]),
        f"{cell['tokens_per_second']:,.0f}",
        _ms(cell["host_step_seconds"]),
        _ms(cell["loop_lag_p99"]),
    ]


def _ms(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds * 1e3:.2f} ms"


def _ratio(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"
