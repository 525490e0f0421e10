"""Every stream of a rank that comes to harm ends, and nothing is left; `make kills` does it 50 times, in all ways."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from hsrpc.schedule.sweep import OpKind
from hsrpc.testing.harm import Harm, Way

TOOL = Path(__file__).parents[2] / "tools" / "kills.py"
_SPEC = importlib.util.spec_from_file_location("kills", TOOL)
kills = sys.modules["kills"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kills)

HELD = kills.Held(children=0, shared_memory=2, fds=20, threads=5, tasks=1)


async def test_nothing_is_left_of_ranks_that_come_to_harm(monkeypatch):
    """Killed, stopped, and stuck where the other waits for it; and a server with such ranks drains."""
    monkeypatch.setattr(kills, "WITHIN", 3.0)  # much else may run on this host
    at_gather = [Harm(1, OpKind.GATHER.value, way, 5) for way in (Way.STOPPED, Way.WEDGED)]
    chosen = [*(partial(kills.harm_engine, harm, 2) for harm in at_gather), partial(kills.drain_server, 2)]
    found = await kills.check(chosen, print)
    assert (found["kills"], found["wrong"]) == (4, {})


@pytest.mark.parametrize("name", asdict(HELD))
def test_what_is_left_is_named(name):
    more = replace(HELD, **{name: getattr(HELD, name) + 1})
    assert more.over(HELD) == {name: 1}
    assert not HELD.over(more)
