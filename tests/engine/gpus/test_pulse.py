"""A process that hangs is found within a second, one that is only busy is not; and it ends with who listens to it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.engine.gpus.pulse import BEAT_SECONDS, SERVING, STARTING, Limits, Pulse, Silence

_LIVING = """
import asyncio, ctypes, sys
from hsrpc.engine.gpus.pulse import Heart

async def live():
    Heart(int(sys.argv[1]), asyncio.get_running_loop())
    while line := await asyncio.to_thread(sys.stdin.readline):
        match line.strip():
            case "work":  # a call that holds the interpreter's lock
                await asyncio.to_thread(sum, range(3 * 10**7))
            case "wait":  # another one, that does nothing
                ctypes.PyDLL(None).usleep(10**9)
            case "stand still":
                ctypes.CDLL(None).usleep(10**9)
        print("done", flush=True)

asyncio.run(live())
"""
PATIENCE = 30.0
FOUND = 2.0
"""Seconds in which what hangs is found: most of the first, and another one for a host on which much else runs."""


class Living:
    """A process with a heart, and what its pulse tells."""

    def __init__(self, process: Process, beats: int) -> None:
        self.process = process
        self.told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.pulse = Pulse(beats, process.pid, self.told.set_result)

    def ask(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n".encode())

    async def do(self, what: str) -> None:
        assert self.process.stdout is not None
        self.ask(what)
        assert await self.process.stdout.readline() == b"done\n"


@asynccontextmanager
async def living() -> AsyncIterator[Living]:
    beats, pulse = os.pipe()
    command = [sys.executable, "-c", _LIVING, str(pulse)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, pass_fds=[pulse])
    os.close(pulse)
    found = Living(process, beats)
    try:
        async with asyncio.timeout(PATIENCE):
            await found.do("nothing")
            yield found
    finally:
        found.pulse.close()
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()


async def test_who_works_does_not_hang() -> None:
    """Although no thread of it can beat for longer than one that waits may be silent."""
    async with living() as found:
        found.pulse.limits = Limits(0.3, PATIENCE)
        began = time.monotonic()
        await found.do("work")
        assert time.monotonic() - began > 1.2 * found.pulse.limits.waiting
        assert not found.told.done()


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (
            lambda found: os.kill(found.process.pid, signal.SIGSTOP),
            r"has given no sign of life for \d\.\d s, and is stopped",
        ),
        (lambda found: found.ask("wait"), r"has given no sign of life for \d\.\d s"),
        (lambda found: found.ask("stand still"), r"hangs: its event loop has stood still for \d\.\d s"),
    ],
    ids=["stopped", "waits with the lock", "its loop stands still"],
)
async def test_who_hangs_is_found(harm: Callable[[Living], object], problem: str) -> None:
    async with living() as found:
        found.pulse.limits = SERVING
        began = time.monotonic()
        harm(found)
        told = await found.told
        assert SERVING.waiting - BEAT_SECONDS <= time.monotonic() - began < FOUND
    assert re.fullmatch(problem, told)


async def test_it_ends_with_who_listens() -> None:
    """Even where its event loop stands still."""
    async with living() as found:
        found.ask("stand still")
        found.pulse.close()
        assert await found.process.wait() == 0


async def test_who_starts_has_more_time() -> None:
    async with living() as found:
        os.kill(found.process.pid, signal.SIGSTOP)
        found.pulse.limits = Limits(0.3, STARTING.all)
        assert "is stopped" in await found.told


@given(st.lists(st.booleans(), max_size=200))
def test_silence_is_counted_in_missed_beats(works: list[bool]) -> None:
    """Time of waiting counts for both limits, time of work for one; nothing counts once something is heard."""
    silence = Silence()
    for is_working in works:
        silence.lasts(is_working=is_working)
    missed, waited = len(works) * BEAT_SECONDS, works.count(False) * BEAT_SECONDS
    little, never = BEAT_SECONDS / 2, 1e9
    assert silence.exceeds(Limits(waited - little, never))
    assert silence.exceeds(Limits(never, missed - little))
    assert not silence.exceeds(Limits(waited + little, missed + little))
    silence.ends()
    assert not silence.exceeds(Limits(little, little))
