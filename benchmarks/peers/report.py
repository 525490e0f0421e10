"""The comparison as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.cases import ALL_MODELS, Case, Setup, System
from benchmarks.peers.record import Outcome, Record
from hsrpc.config import format_bytes

_SYSTEMS = tuple(System)
_TITLES = {
    Case.HOST: "everything on the host, equal batch",
    Case.BUDGET: "equal budgets, each tuned",
    Case.RESIDENT: "everything on the device, equal batch",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """The best of a system's setups in a case, for a model."""

    setup: Setup
    outcome: Outcome

    @property
    def excess(self) -> str | None:
        """Which memory was taken beyond the budgets."""
        return self.outcome.excess(self.setup.budgets)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times a peer's throughput hsrpc has: geometric means over the models that both have."""

    case: Case
    peer: System
    models: tuple[str, ...]
    total: float
    decode: float


def best_entries(records: Sequence[Record]) -> list[Entry]:
    """Best setup of each case, model and system, by total throughput.

    One within its budgets goes before one beyond, and one measured in full before one that was projected.
    """
    entries = [Entry(record.setup, outcome) for record in records if (outcome := _typical(record.setup, records))]
    groups = groupby(sorted(entries, key=_place), key=_place)
    return [max(group, key=_merit) for _, group in groups]


def ratios(entries: Sequence[Entry]) -> list[Ratio]:
    """Ratios for each case and peer that have a model in common with hsrpc."""
    found = {(entry.setup.case, entry.setup.system, entry.setup.model): entry.outcome for entry in entries}
    result = []
    for case in Case:
        for peer in _SYSTEMS[1:]:
            pairs = {
                model: (found[case, System.HSRPC, model], found[case, peer, model])
                for model in ALL_MODELS
                if (case, System.HSRPC, model) in found and (case, peer, model) in found
            }
            if pairs:
                total = geometric_mean(
                    ours.total_throughput / theirs.total_throughput for ours, theirs in pairs.values()
                )
                decode = geometric_mean(
                    ours.decode_throughput / theirs.decode_throughput for ours, theirs in pairs.values()
                )
                result.append(Ratio(case, peer, tuple(pairs), total, decode))
    return result


def print_report(records: Sequence[Record]) -> None:
    """A table for each case, the ratios, and what failed."""
    entries = best_entries(records)
    console = Console(width=170)
    for case in Case:
        chosen = [entry for entry in entries if entry.setup.case is case]
        if chosen:
            console.print(_table(case, chosen))
    for ratio in ratios(entries):
        console.print(
            f"{ratio.case}: {ratio.total:.2f} times the total throughput of {ratio.peer}, "
            f"{ratio.decode:.2f} times in decode ({', '.join(ratio.models)})"
        )
    for system, software in sorted({(e.setup.system, e.outcome.software) for e in entries if e.outcome.software}):
        console.print(f"{system}: {software}")
    for entry in entries:
        if entry.excess:
            console.print(f"beyond its budget: {entry.setup.name}: {entry.excess}")
    for record in records:
        if record.outcome is None:
            console.print(f"no outcome: {record.setup.name}: {record.error}")


def save_report(records: Sequence[Record], file: Path) -> None:
    """The best entries, the ratios, and every record they come from."""
    entries = best_entries(records)
    content = {
        "best": [asdict(entry) for entry in entries],
        "ratios": [asdict(ratio) for ratio in ratios(entries)],
        "records": [asdict(record) for record in records],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")


def plot_report(records: Sequence[Record], file: Path) -> None:
    """Total throughput by model and system beside the fastest's, one panel a case, PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    entries = best_entries(records)
    cases = [case for case in Case if any(entry.setup.case is case for entry in entries)]
    figure, panels = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4), layout="constrained", squeeze=False)
    for case, axes in zip(cases, panels[0], strict=True):
        _draw_case(case, [entry for entry in entries if entry.setup.case is case], axes)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw_case(case: Case, entries: Sequence[Entry], axes: Any) -> None:
    """A group of bars a model, one for each system, as high as their part of the fastest's total throughput."""
    models = [model for model in ALL_MODELS if any(entry.setup.model == model for entry in entries)]
    systems = [system for system in _SYSTEMS if any(entry.setup.system is system for entry in entries)]
    width = 0.8 / len(systems)
    fastest = {
        model: max(entry.outcome.total_throughput for entry in entries if entry.setup.model == model)
        for model in models
    }
    for index, system in enumerate(systems):
        own = [entry for entry in entries if entry.setup.system is system]
        at = [models.index(entry.setup.model) + (index - (len(systems) - 1) / 2) * width * 1.05 for entry in own]
        heights = [entry.outcome.total_throughput / fastest[entry.setup.model] for entry in own]
        bars = axes.bar(at, heights, width=width, color=f"C{_SYSTEMS.index(system)}", label=system.value)
        axes.bar_label(bars, [f"{entry.outcome.total_throughput:,.4g}" for entry in own], fontsize=8)
    axes.set(title=f"{_TITLES[case]}: new tokens/s", ylabel="part of the fastest's, prefill and decode", ylim=(0, 1.1))
    axes.set_xticks(range(len(models)), models)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(systems), frameon=False)


def _typical(setup: Setup, records: Sequence[Record]) -> Outcome | None:
    """The median of a setup's outcomes by total throughput: the lower one of two."""
    outcomes = [record.outcome for record in records if record.setup == setup and record.outcome]
    outcomes.sort(key=lambda outcome: outcome.total_throughput)
    return outcomes[(len(outcomes) - 1) // 2] if outcomes else None


def _place(entry: Entry) -> tuple[int, int, int]:
    setup = entry.setup
    return list(Case).index(setup.case), ALL_MODELS.index(setup.model), _SYSTEMS.index(setup.system)


def _merit(entry: Entry) -> tuple[bool, bool, float]:
    return entry.excess is None, not entry.outcome.projected, entry.outcome.total_throughput


def _table(case: Case, entries: Sequence[Entry]) -> Table:
    names = ("model", "system", "setup", "prefill", "decode step", "limit", "efficiency", "decode", "total")
    table = Table(*names, "device peak", "host", "hsrpc is", title=_TITLES[case], title_justify="left")
    ours = {entry.setup.model: entry.outcome for entry in entries if entry.setup.system is System.HSRPC}
    for entry in entries:
        setup, out = entry.setup, entry.outcome
        own = ours.get(setup.model)
        table.add_row(
            setup.model,
            setup.system,
            setup.key.replace("planned", str(out.batch)),
            f"{out.prefill_seconds:.2f} s",
            f"{out.step_seconds * 1e3:.1f} ms",
            f"{out.limit_step_seconds * 1e3:.1f} ms",
            f"{out.efficiency:.2f}",
            f"{out.decode_throughput:.1f} tokens/s",
            f"{out.total_throughput:.1f} tokens/s" + " (projected)" * out.projected,
            format_bytes(out.peak_device_bytes),
            format_bytes(out.host_bytes),
            f"{own.total_throughput / out.total_throughput:.2f}x" if own and own is not out else "",
        )
    return table
