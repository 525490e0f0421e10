"""Results as a table, as JSON, and as plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hsrpc.bench.replay import ReplayResult
from hsrpc.bench.run import Result
from hsrpc.config import format_bytes, format_rate

ACTIVATION_SHARE = "activation share of cached tokens"
_NOT_MEASURED = "not measured"


def print_results(results: Sequence[Result]) -> None:
    """One column a result."""
    table = Table(
        "", *(f"{r.policy} {r.activation_share:.2f}" for r in results), title=_title(results[0]), title_justify="left"
    )
    for name, values in _rows(results) + _profile_rows(results):
        table.add_row(name, *values)
    Console(width=max(80, 34 + 24 * len(results))).print(table)


def save_json(results: Sequence[Result], file: Path) -> None:
    """All results, with everything that was measured."""
    file.write_text(json.dumps([result.as_json() for result in results], indent=1) + "\n")


def print_replay(result: ReplayResult) -> None:
    """One line a setting, the first without drafts."""
    title = f"{result.model} on {result.device}, {result.batch} requests of {result.context} tokens"
    table = Table(title=title, title_justify="left", caption=f"drafts: {result.drafts}", caption_justify="left")
    for column in ("drafted", "right", "steps", "tau", "step", "predicted", "limit"):
        table.add_column(column, justify="right")
    for column in ("tokens/s", "predicted", "limit"):
        table.add_column(column, justify="right")
    for each in result.settings:
        steps = each.step_seconds, each.predicted_step_seconds, each.limit_seconds
        rates = each.tokens_per_second, each.predicted_tokens_per_second, each.limit_tokens_per_second
        table.add_row(
            str(each.drafts),
            f"{each.acceptance:.0%}" if each.drafts else "",
            str(each.num_steps),
            f"{each.tokens_per_request:.2f}",
            *map(_ms, steps),
            *(f"{rate:.1f}" for rate in rates),
        )
    Console(width=120).print(table)


def save_replay(result: ReplayResult, file: Path) -> None:
    """All settings, with everything that was measured."""
    file.write_text(json.dumps(asdict(result), indent=1) + "\n")


def plot_sweep(
    title: str,
    measured: Sequence[tuple[float, float]],
    predicted: Sequence[tuple[float, float]],
    file: Path,
    *,
    chosen: tuple[float, float] | None = None,
    share: str = ACTIVATION_SHARE,
) -> None:
    """Decode tokens/s over a share, named on the axis, as pairs of both; `chosen` is the planner's own."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*measured, strict=True), marker="o", label="measured")
    axes.plot(*zip(*predicted, strict=True), linestyle="--", label="predicted")
    if chosen is not None:
        axes.plot(*chosen, linestyle="", marker="*", markersize=16, label="the planner's choice")
    axes.set(xlabel=share, ylabel="decode tokens/s", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _title(result: Result) -> str:
    return f"{result.model} on {result.device}"


def _rows(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    return [
        ("batch, steps measured", [f"{r.batch}, {r.num_steps}" for r in results]),
        ("step, median", [_ms(r.step_seconds) for r in results]),
        ("step, min to max", [f"{_ms(min(r.step_times))} to {_ms(max(r.step_times))}" for r in results]),
        ("limit", [_ms(r.limit_seconds) for r in results]),
        ("  bus", [_ms(r.limit.bus) for r in results]),
        ("  forward", [_ms(r.limit.forward) for r in results]),
        ("  regeneration", [_ms(r.limit.regenerate) for r in results]),
        ("  attention", [_ms(r.limit.attention) for r in results]),
        ("  experts, what waits", [_ms(r.limit.in_turn) for r in results]),
        ("efficiency", [f"{r.efficiency:.3f}" for r in results]),
        ("  beside plain copies", [f"{r.sustained_efficiency:.3f}" for r in results]),
        ("recomputed", [f"{r.recomputed_tokens / r.num_steps:,.0f} tokens a step" for r in results]),
        ("predicted step", [_ms(r.predicted_step_seconds) for r in results]),
        *_at_hits(results),
        ("decode", [f"{r.decode_tokens_per_second:.1f} tokens/s" for r in results]),
        ("prefill", [f"{r.prefill_tokens_per_second:.0f} tokens/s" for r in results]),
        ("whole run", [f"{r.total_tokens_per_second:.1f} tokens/s" for r in results]),
        ("GEMM rate used", [f"{r.prefill_gemm_share:.1%}" for r in results]),
        ("bus", [f"{_rate(r.bus_bytes_per_second)} of {_rate(r.hardware.load_bandwidth)}" for r in results]),
        ("bus, plain copies", [_rate(r.sustained_bandwidth) for r in results]),
        ("bus while it copies", [_rate(r.profile.copy_rate if r.profile else None) for r in results]),
        ("GPU busy", [_share(r.device_busy_share) for r in results]),
        ("weights resident", [f"{r.resident_share:.0%}" for r in results]),
        ("weights that stream", ["coded" if r.codes_weights else "as they are" for r in results]),
        ("cached tokens", [r.cache_format for r in results]),
        ("experts on demand, hits", [_hits(r) for r in results]),
        ("preemptions", [str(r.preemptions) for r in results]),
        (
            "peak device memory",
            [f"{format_bytes(r.peak_device_bytes)} of {format_bytes(r.device_budget)}" for r in results],
        ),
        ("pinned host memory", [f"{format_bytes(r.pinned_bytes)} of {format_bytes(r.host_budget)}" for r in results]),
        ("loop lag, p99", [_ms(r.loop_lag_p99) for r in results]),
        ("ready after", [f"{r.ready_seconds:.1f} s" for r in results]),
    ]


def _profile_rows(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Empty without --profile."""
    profiles = [r.profile for r in results]
    parts = dict.fromkeys(part for profile in profiles if profile for part in profile.parts)
    if not parts:
        return []
    rows = [[p.step, p.copies, *(p.parts.get(part) for part in parts), p.launching] if p else [] for p in profiles]
    names = ["step, profiled", "  copies from the host", *(f"  {part}" for part in parts), "  host, launching"]
    return [(name, [_ms(row[i] if row else None) for row in rows]) for i, name in enumerate(names)]


def _ms(seconds: float | None) -> str:
    return _NOT_MEASURED if seconds is None else f"{seconds * 1e3:.1f} ms"


def _at_hits(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Empty where no experts come on demand."""
    steps = [result.predicted_at_hits_seconds for result in results]
    return [("  at the hits measured", ["" if step is None else _ms(step) for step in steps])] if any(steps) else []


def _hits(result: Result) -> str:
    if result.expert_hit_rate is None or result.expected_hit_rate is None:
        return "none come so"
    each = format_bytes(result.expert_loaded_bytes / result.num_steps)
    return f"{result.expert_hit_rate:.0%} (the plan assumes {result.expected_hit_rate:.0%}), {each} a step"


def _rate(value: float | None) -> str:
    return _NOT_MEASURED if value is None else format_rate(value, "B/s")


def _share(value: float | None) -> str:
    return _NOT_MEASURED if value is None else f"{value:.0%}"
