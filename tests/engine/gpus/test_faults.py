"""A rank that dies or hangs ends every stream at once, and no process is left; nor is one where the front is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from hsrpc import Engine
from hsrpc.engine.gpus import ranks as front
from hsrpc.errors import ConfigError, EngineFaultError
from tests.engine.gpus.support import GREEDY, children, config_for, pids, planned, shared_memory, until_gone
from tests.engine.reference import Reference
from tests.engine.support import until

_ENDED = 1.0
"""Seconds in which every stream has ended."""


async def fails(engine: Engine, made: Reference, harm: Callable[[], object]) -> float:
    """Do `harm` while steps are computed; the seconds until every stream has ended with the engine's fault."""
    generations = [await engine.submit(prompt, GREEDY) for prompt in made.prompts[:5]]
    await anext(generations[0])
    harm()
    began = time.monotonic()
    for generation in generations:
        with pytest.raises(EngineFaultError):
            async for _ in generation:
                pass
    with pytest.raises(EngineFaultError):
        await engine.wait_failed()
    return time.monotonic() - began


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_is_killed(rank: int, reference: Callable[[str], Reference]) -> None:
    """In the middle of a step, whichever it is."""
    made, shared = reference("opt"), shared_memory()
    async with Engine(config_for(made, 2), choose_plan=planned) as engine, asyncio.timeout(60):
        found = pids(engine)
        assert await fails(engine, made, lambda: os.kill(found[rank], signal.SIGKILL)) < _ENDED
        await asyncio.to_thread(until_gone, found)  # also while nobody leaves the engine
    assert shared_memory() <= shared


async def test_a_rank_hangs(reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing any more, and the other waits for what it would have loaded."""
    monkeypatch.setattr(front, "MAX_SILENCE", 2.0)
    made = reference("opt")
    async with Engine(config_for(made, 2), choose_plan=planned) as engine, asyncio.timeout(60):
        found = pids(engine)
        assert await fails(engine, made, lambda: os.kill(found[1], signal.SIGSTOP)) < 2.0 + _ENDED
        await asyncio.to_thread(until_gone, found)


async def test_what_a_rank_finds_wrong_is_told(reference: Callable[[str], Reference]) -> None:
    """As if it were this process; and the other ranks are gone."""
    made = reference("opt")
    with pytest.raises(ConfigError, match="too small"):
        async with Engine(config_for(made, 2, gpu_memory="10KiB"), choose_plan=planned):
            pass
    await until(lambda: not list(children(os.getpid())))


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
