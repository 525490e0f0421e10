"""Figures of a load."""

from __future__ import annotations

import json

from hsrpc.bench.load import CANCELLED, OK, Outcome
from hsrpc.bench.load_report import Goal, plot_load, print_load, save_load, summarise_load


def outcome(at: float = 0.0, *, status: str = OK, first: float = 0.1, gap: float = 0.01) -> Outcome:
    gaps = [gap] * 9
    return Outcome(
        scheduled=at, status=status, first_token=at + first, end=at + first + sum(gaps), tokens=10, gaps=gaps
    )


def test_percentiles_count_from_the_scheduled_time():
    """First token, between tokens and end to end, of those who had them."""
    outcomes = [outcome(at=i / 100, first=(i + 1) / 100) for i in range(100)]
    summary = summarise_load("m", 100.0, outcomes, Goal())
    assert 0.49 < summary.first_token.p50 < 0.52
    assert 0.98 < summary.first_token.p99 <= 1.0
    assert abs(summary.inter_token.p90 - 0.01) < 1e-9
    assert abs(summary.end_to_end.p50 - summary.first_token.p50 - 0.09) < 1e-9


def test_goodput_counts_who_kept_to_the_goal():
    """Only requests that ended OK, with a first token and gaps within the goal."""
    outcomes = [outcome(at=9.0), outcome(first=2.0), outcome(gap=0.5), outcome(status=CANCELLED), outcome(status="X")]
    for goal, good in ((Goal(), 3), (Goal(first_token=1.0), 2), (Goal(first_token=1.0, inter_token=0.1), 1)):
        summary = summarise_load("m", 1.0, outcomes, goal)
        assert round(summary.goodput * summary.seconds) == good
    assert summary.failures == 1
    assert summary.statuses == {OK: 3, CANCELLED: 1, "X": 1}


def test_a_load_that_failed_wholly_has_a_report(tmp_path, capsys):
    """Nothing is divided by zero, and the statuses are told."""
    outcomes = [Outcome(scheduled=0.0, status="UNAVAILABLE")]
    summary = summarise_load("m", 1.0, outcomes, Goal())
    print_load(summary)
    assert "UNAVAILABLE 1" in capsys.readouterr().out
    save_load(summary, outcomes, tmp_path / "load.json")
    plot_load(summary, outcomes, tmp_path / "load.png")
    assert json.loads((tmp_path / "load.json").read_text())["summary"]["goodput"] == 0
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
