"""Calls that end early leave nothing in the server's process; `make cancels` does the same with 20,000 of them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "cancels.py"
_SPEC = importlib.util.spec_from_file_location("cancels", TOOL)
cancels = sys.modules["cancels"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cancels)

HELD = cancels.Held(live=0, requests=0, tasks=9, fds=40, blocks=40_000, rss_bytes=2**26)


async def test_nothing_grows_over_thousands_of_early_ends():
    """Cancelled at once or amid the stream, past the deadline, gone with the connection: tasks, requests, descriptors,
    objects and memory of the server are what they were, once the cache of peers' names is full."""
    command = (sys.executable, str(TOOL), "--calls=2000", "--warm-up=2000")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    found = json.loads(out)
    assert (process.returncode, found["grown"]) == (0, {})
    assert sum(found["ended"].values()) == 2_000
    ways = {"cancelled at once: CANCELLED", "cancelled amid: CANCELLED", "deadline: DEADLINE_EXCEEDED"}
    assert set(found["ended"]) == ways | {"connection gone"}


@pytest.mark.parametrize(
    ("name", "growth"), [("live", 1), ("requests", 1), ("tasks", 1), ("fds", 5), ("blocks", 600), ("rss_bytes", 2**25)]
)
def test_growth_is_named(name, growth):
    """One call, request or task more than before is a leak, as is more than the slack of what varies."""
    assert replace(HELD, **{name: getattr(HELD, name) + growth}).over(HELD) == {name: growth}
    assert not HELD.over(replace(HELD, **{name: getattr(HELD, name) + growth}))
