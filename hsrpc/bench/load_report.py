"""What an open-loop run came to: percentiles, goodput, failures; as a table, JSON and a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hsrpc.bench.load import CANCELLED, OK, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Seconds; 0 where there is nothing."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a good request keeps to, seconds; None asks for nothing."""

    first_token: float | None = None
    inter_token: float | None = None
    """Time between tokens, on average over the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSummary:
    """Latencies count from the scheduled send time, so that a late sender or a queue is not left out."""

    model: str
    rate: float
    """Requests per second offered."""
    seconds: float
    """Time from the start to the last end."""
    requests: int
    statuses: Mapping[str, int]
    first_token: Quantiles
    inter_token: Quantiles
    end_to_end: Quantiles
    """Seconds from the scheduled send to the end, of requests that ended OK."""
    goal: Goal
    goodput: float
    """Requests per second that ended OK and kept to the goal."""
    tokens_per_second: float
    """Output tokens received, of all requests."""

    @property
    def failures(self) -> int:
        return self.requests - self.statuses.get(OK, 0) - self.statuses.get(CANCELLED, 0)


def summarise_load(model: str, rate: float, outcomes: Sequence[Outcome], goal: Goal) -> LoadSummary:
    """The figures of a run."""
    seconds = max((outcome.end for outcome in outcomes), default=0.0)
    ended = [outcome for outcome in outcomes if outcome.status == OK]
    good = sum(_is_good(outcome, goal) for outcome in ended)
    return LoadSummary(
        model=model,
        rate=rate,
        seconds=seconds,
        requests=len(outcomes),
        statuses=dict(Counter(outcome.status for outcome in outcomes)),
        first_token=quantiles(_first_token_times(outcomes)),
        inter_token=quantiles([gap for outcome in outcomes for gap in outcome.gaps]),
        end_to_end=quantiles([outcome.end - outcome.scheduled for outcome in ended]),
        goal=goal,
        goodput=good / seconds if seconds else 0.0,
        tokens_per_second=sum(outcome.tokens for outcome in outcomes) / seconds if seconds else 0.0,
    )


def quantiles(values: Sequence[float]) -> Quantiles:
    """p50, p90 and p99 of `values`."""
    found = np.percentile(values, (50, 90, 99)).tolist() if values else [0.0] * 3
    return Quantiles(p50=found[0], p90=found[1], p99=found[2])


def print_load(summary: LoadSummary) -> None:
    """A table of latencies, and the rest in lines."""
    title = f"{summary.model}: {summary.requests} requests at {summary.rate:g}/s, {summary.seconds:.1f} s"
    table = Table("", "p50", "p90", "p99", title=title, title_justify="left")
    for name, found in (
        ("time to first token", summary.first_token),
        ("between tokens", summary.inter_token),
        ("end to end", summary.end_to_end),
    ):
        table.add_row(name, *(f"{value * 1e3:.1f} ms" for value in (found.p50, found.p90, found.p99)))
    console = Console()
    console.print(table)
    console.print(f"goodput {summary.goodput:.2f} requests/s, {summary.tokens_per_second:.1f} tokens/s")
    console.print("ended " + ", ".join(f"{name} {count}" for name, count in sorted(summary.statuses.items())))


def save_load(summary: LoadSummary, outcomes: Sequence[Outcome], file: Path) -> None:
    """The summary, and every request."""
    content = {"summary": asdict(summary), "requests": [asdict(outcome) for outcome in outcomes]}
    file.write_text(json.dumps(content, indent=1) + "\n")


def plot_load(summary: LoadSummary, outcomes: Sequence[Outcome], file: Path) -> None:
    """Distributions of the three latencies, and each request's time to first token over the run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    first = _first_token_times(outcomes)
    gaps = [gap for outcome in outcomes for gap in outcome.gaps]
    ends = [outcome.end - outcome.scheduled for outcome in outcomes if outcome.status == OK]
    for name, values in (("first token", first), ("between tokens", gaps), ("end to end", ends)):
        left.plot(np.sort(values) * 1e3, np.linspace(0, 1, len(values)), label=name)
    left.set(xscale="log", xlabel="ms from the scheduled time", ylabel="share of requests or tokens")
    left.legend()
    times = [outcome.scheduled for outcome in outcomes if outcome.first_token is not None]
    right.plot(times, [value * 1e3 for value in first], ".", markersize=3)
    right.set(xlabel="scheduled, s", ylabel="time to first token, ms", title=f"{summary.rate:g} requests/s")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _first_token_times(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.first_token - outcome.scheduled for outcome in outcomes if outcome.first_token is not None]


def _is_good(outcome: Outcome, goal: Goal) -> bool:
    first = (outcome.first_token or 0.0) - outcome.scheduled
    between = sum(outcome.gaps) / len(outcome.gaps) if outcome.gaps else 0.0
    return not (
        (goal.first_token is not None and first > goal.first_token)
        or (goal.inter_token is not None and between > goal.inter_token)
    )
