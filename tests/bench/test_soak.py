"""What the soak run calls a failure."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from hsrpc.bench import siege
from hsrpc.bench.load import CANCELLED, HANG, OK, Outcome
from hsrpc.bench.siege import Attack, Bounds, Siege
from hsrpc.server import Server, ServerConfig
from hsrpc.server.grpc import connections, resets
from hsrpc.server.grpc.connections import ConnectionCuts
from hsrpc.server.grpc.resets import MAX_RESETS
from hsrpc.testing.fake_engine import FakeEngine

_SPEC = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "tools" / "soak.py")
soak = sys.modules["soak"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(soak)


def besieged(**changes):
    """A siege that the server withstood, but for `changes`."""
    seconds = {Attack.FLOOD: [0.5, 0.5], Attack.HALF: [30.0], Attack.STALL: [5.0]} | changes.pop("seconds", {})
    good = {
        "siege": Siege(0, soak.BOUNDS, seconds),
        "outcomes": [
            Outcome(scheduled=0.0, status=OK),
            Outcome(scheduled=0.0, status="UNAVAILABLE", retry_after=1.0),
            Outcome(scheduled=0.0, status="RESOURCE_EXHAUSTED", retry_after=1.0),
        ],
        "cuts": Counter(resets=2, stalls=1),
        "before": 2**28,
        "after": 2**28,
    }
    return soak.Besieged(**(good | changes))


def record(**changes):
    """A run in which all was well, but for `changes`."""
    statuses = [OK] * 80 + [CANCELLED] * 15 + ["DEADLINE_EXCEEDED"] * 4 + ["UNAVAILABLE"]
    good = {
        "outcomes": [Outcome(scheduled=0.0, status=status) for status in statuses],
        "samples": [soak.Sample(float(i), 1, 20, 2**28) for i in range(40)],
        "canaries": Counter({OK: 9, "UNAVAILABLE": 1}),
        "malformed": Counter(INVALID_ARGUMENT=1),
        "exit_code": 0,
        "besieged": besieged(),
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
        {"besieged": {"seconds": {Attack.HALF: [30.0, None]}}},
        {"besieged": {"seconds": {Attack.HALF: []}}},
        {"besieged": {"cuts": Counter(resets=2, stalls=2)}},
        {"besieged": {"outcomes": [Outcome(scheduled=0.0, status=status) for status in (OK, CANCELLED)]}},
        {"besieged": {"outcomes": [Outcome(scheduled=0.0, status=status) for status in (OK, "UNAVAILABLE")]}},
        {"besieged": {"outcomes": []}},
        {"besieged": {"after": 2**28 + 2**30}},
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
        "unended",
        "no attack",
        "neighbour cut",
        "cancelled beside",
        "no delay told",
        "nobody beside",
        "kept",
    ),
)
def test_a_bad_run_fails(change):
    """Each kind of trouble fails one check and no other."""
    made = {name: besieged(**value) if name == "besieged" else value for name, value in change.items()}
    assert list(soak.checks(record(**made)).values()).count(False) == 1


def test_a_restart_is_no_growth():
    """Only the last life of the server counts: a new process starts small."""
    before = [soak.Sample(float(i), 1, 500, 2**32) for i in range(40)]
    assert all(soak.checks(record(samples=before + record().samples)).values())


RESETS, HALVES, UNREAD = (f"{attack} were ended" for attack in Attack)
CUTS = "hostile connections were cut, each once"


async def faults(monkeypatch, slack: float, **settings: float) -> set[str]:
    """Beginnings of the checks that fail once a server has had each attack."""
    monkeypatch.setattr(siege, "FLOOD", 2 * MAX_RESETS)
    cuts: Counter[str] = Counter()
    config = ServerConfig(port=0, **{"write_timeout": 0.2, "request_timeout": 0.2} | settings)
    server = Server(config, count_cut=lambda reason: cuts.update([reason.value]))
    await server.start()
    await server.attach(FakeEngine())
    attacks = Siege(server.port, Bounds(write_timeout=0.2, request_timeout=0.2, slack=slack))
    await attacks.run(0.0)
    await server.stop()
    found = soak.checks(record(besieged=besieged(siege=attacks, cuts=cuts)))
    return {name.partition(" within")[0].partition(", and")[0] for name, held in found.items() if not held}


async def test_a_server_withstands_a_siege(monkeypatch):
    """Each attack is ended, and each connection to be cut is cut once."""
    assert await faults(monkeypatch, slack=10.0) == set()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [({"request_timeout": 1000.0}, HALVES), ({"write_timeout": 1000.0}, UNREAD)],
    ids=("requests", "reads"),
)
async def test_a_limit_of_time_that_is_off_is_seen(monkeypatch, settings, fault):
    """What is waited for without end."""
    assert fault in await faults(monkeypatch, slack=1.0, **settings)


async def test_a_limit_of_resets_that_is_off_is_seen(monkeypatch):
    """A flood that goes on."""
    monkeypatch.setattr(resets, "MAX_RESETS", 10**9)
    assert await faults(monkeypatch, slack=1.0) >= {RESETS, CUTS}


async def test_a_server_that_cuts_nothing_is_seen(monkeypatch):
    """Neither floods nor stalls end."""
    monkeypatch.setattr(ConnectionCuts, "cut", lambda *_: None)
    assert await faults(monkeypatch, slack=1.0) >= {RESETS, UNREAD, CUTS}


async def test_a_cut_that_does_nothing_is_seen(monkeypatch):
    """It is counted, and the connection goes on."""
    monkeypatch.setattr(connections, "cut", lambda peer: True)
    assert await faults(monkeypatch, slack=1.0) >= {RESETS, UNREAD}
