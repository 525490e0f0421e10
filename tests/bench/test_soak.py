"""What the soak run calls a failure."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from hsrpc.bench.load import CANCELLED, HANG, OK, Outcome

_SPEC = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "tools" / "soak.py")
soak = sys.modules["soak"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(soak)


def record(**changes):
    """A run in which all was well, but for `changes`."""
    statuses = [OK] * 80 + [CANCELLED] * 15 + ["DEADLINE_EXCEEDED"] * 4 + ["UNAVAILABLE"]
    good = {
        "outcomes": [Outcome(scheduled=0.0, status=status) for status in statuses],
        "samples": [soak.Sample(float(i), 1, 20, 2**28) for i in range(40)],
        "canaries": Counter({OK: 9, "UNAVAILABLE": 1}),
        "malformed": Counter(INVALID_ARGUMENT=1),
        "exit_code": 0,
    }
    return soak.Record(**(good | changes))


def grown(fds: int, rss: int) -> list[object]:
    return [soak.Sample(float(i), 1, 20 + fds * i, 2**28 + rss * i) for i in range(40)]


def test_a_good_run_passes():
    """Every check holds, with refusals by a killed server and late calls in it."""
    assert all(soak.checks(record()).values())


@pytest.mark.parametrize(
    "change",
    [
        {"outcomes": [Outcome(scheduled=0.0, status=status) for status in [OK] * 99 + [HANG]]},
        {"outcomes": [Outcome(scheduled=0.0, status=status) for status in [OK] * 99 + ["INTERNAL"]]},
        {"outcomes": [Outcome(scheduled=0.0, status="UNAVAILABLE")]},
        {"wrong": ["other text"]},
        {"canaries": Counter()},
        {"canaries": Counter({OK: 9, "DEADLINE_EXCEEDED": 1})},
        {"malformed": Counter(UNKNOWN=1)},
        {"churned": Counter(INTERNAL=1)},
        {"samples": grown(1, 0)},
        {"samples": grown(0, 4 * 2**20)},
        {"busy_at_end": 1},
        {"exit_code": -9},
    ],
    ids=(
        "hang",
        "internal",
        "refused",
        "wrong",
        "silent",
        "stuck",
        "malformed",
        "connections",
        "descriptors",
        "memory",
        "busy",
        "exit",
    ),
)
def test_a_bad_run_fails(change):
    """Each kind of trouble fails one check and no other."""
    assert list(soak.checks(record(**change)).values()).count(False) == 1


def test_a_restart_is_no_growth():
    """Only the last life of the server counts: a new process starts small."""
    before = [soak.Sample(float(i), 1, 500, 2**32) for i in range(40)]
    assert all(soak.checks(record(samples=before + record().samples)).values())
