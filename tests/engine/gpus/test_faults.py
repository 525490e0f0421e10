"""No process is left of an engine that cannot start, nor of one whose own process is killed.

What ranks come to while they serve: `tests/bench/test_kills.py`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
import uvloop

from hsrpc import Engine
from hsrpc.device.group import LostError
from hsrpc.engine.gpus import ranks
from hsrpc.engine.gpus.messages import Drafted, Line, Stop
from hsrpc.engine.gpus.ranks import RankProcess, results_of
from hsrpc.errors import ConfigError, EngineFaultError
from hsrpc.testing.processes import children
from tests.engine.gpus.support import config_for, planned, until_gone
from tests.engine.reference import Reference
from tests.engine.support import until


async def test_what_a_rank_finds_wrong_is_told(reference: Callable[[str], Reference]) -> None:
    """As if it were this process; and the other ranks are gone."""
    made, others = reference("opt"), set(children(os.getpid()))
    with pytest.raises(ConfigError, match="too small"):
        async with Engine(config_for(made, 2, gpu_memory="10KiB"), choose_plan=planned):
            pass
    await until(lambda: others.issuperset(children(os.getpid())))


@pytest.mark.parametrize("follows", [0.0, 0.02], ids=["at once", "a little later"])
async def test_the_cause_is_told(follows: float) -> None:
    """What other ranks miss is heard of first now and then; and what waits for more is cancelled."""
    waits = asyncio.Event()

    async def lost() -> None:
        raise LostError("it did not come")

    async def ended() -> None:
        await asyncio.sleep(follows)
        raise EngineFaultError("it has ended")

    async def goes_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            waits.set()

    with pytest.raises(EngineFaultError, match="it has ended"):
        await results_of([lost(), ended(), goes_on()])
    assert waits.is_set()
    with pytest.raises(LostError):
        await results_of([lost(), goes_on()])


def test_what_is_sent_to_nobody_is_dropped() -> None:
    """A rank may be gone before that is seen: who stops its step does not fail for it."""

    async def send() -> None:
        ours, theirs = socket.socketpair()
        line = await Line.over(ours)
        theirs.close()
        with pytest.raises(EOFError):
            await line.receive()
        line.writer.close()
        await line.writer.wait_closed()
        line.send(Stop(1))

    uvloop.run(send())  # asyncio's own loop does not mind


async def test_a_rank_that_does_not_end_drafting_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it any longer; its event loop may be well."""
    monkeypatch.setattr(ranks, "MIN_STEP_LIMIT", 0.05)
    ours, theirs = socket.socketpair()
    beats, pulse = os.pipe()
    process = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    rank = RankProcess(1, process, await Line.over(ours), beats)
    assert await asyncio.to_thread(rank.drafted) is None
    with pytest.raises(EngineFaultError, match="GPU 1 has not drafted after"):
        await rank.expect(Drafted)
    await rank.close()
    theirs.close()
    os.close(pulse)


_FRONT = """
import asyncio, sys
from hsrpc import Engine
from tests.engine.gpus.support import GREEDY, config_for, pids, planned
from tests.engine.reference import Reference

async def main():
    made = Reference(sys.argv[1], [], [])
    async with Engine(config_for(made, 2), choose_plan=planned) as engine:
        print(*pids(engine), flush=True)
        async for _ in engine.generate([5, 6, 7], GREEDY):
            pass
        await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_the_front_process_is_killed(reference: Callable[[str], Reference]) -> None:
    """Whoever ends it gives it no time for anything: the ranks see that it is gone."""
    command = [sys.executable, "-c", _FRONT, str(reference("opt").directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = [int(pid) for pid in process.stdout.readline().split()]
        assert len(found) == 2
        process.kill()
    until_gone(found)
