"""The event loop of processes that run an engine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest
import uvloop

from hsrpc.cli.loop import SWITCH_SECONDS, run_loop


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[None]:
    """As it was, afterwards."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


async def found() -> tuple[float, type]:
    return sys.getswitchinterval(), type(asyncio.get_running_loop())


def test_other_threads_give_way_soon():
    """The loop is uvloop's; threads that run Python hold the interpreter for half a millisecond at most."""
    interval, loop = run_loop(found())
    assert interval == pytest.approx(SWITCH_SECONDS) == 0.0001
    assert issubclass(loop, uvloop.Loop)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["decode", "frontend"])
def test_measuring_runs_on_it(hsrpc, kind, monkeypatch):
    """What is measured is what is served."""
    seen: list[object] = []

    def run(main: object) -> None:
        seen.append(main)
        main.close()
        raise KeyboardInterrupt

    monkeypatch.setattr("hsrpc.cli.loop.run_loop", run)
    hsrpc("bench", kind, *(["--shape=opt-125m", "--device=cpu", "--max-batch=1"] if kind == "decode" else []))
    assert len(seen) == 1
