"""The pulse of a rank: a thread of it beats ten times a second, over a pipe, and the front process listens.

A beat says whether the event loop of the rank has answered since the beat before, so a rank whose loop waits for ever
is told from one that is well. A busy rank may miss beats, where a call holds the interpreter's lock or the host has no
core for it. So whoever is silent is looked up with the system: time in which one of its threads runs, wants to run, or
waits for memory or a disk counts as work, for which there is a longer limit.
"""

from __future__ import annotations

import asyncio
import os
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import NamedTuple

BEAT_SECONDS = 0.1
_GOES_ON, _STANDS_STILL = b"\1", b"\0"
"""The event loop has answered since the last beat; it has not."""
_WORKING = frozenset("RD")
"""States of threads, as proc(5) has them: running or runnable, and waiting for a disk or for memory."""


class Limits(NamedTuple):
    """Seconds without a sign of life after which a process is taken to hang."""

    waiting: float
    """Those in which it has nothing to run."""
    all: float


STARTING = Limits(10.0, 300.0)
"""Modules and libraries are loaded, from wherever they lie, and devices opened."""
SERVING = Limits(0.5, 10.0)
"""Found, told, and every stream ended within a second."""


class Heart:
    """The rank's end. Beats on a thread of its own; ends this process once nobody listens, whatever else it does."""

    def __init__(self, pipe: int, loop: AbstractEventLoop) -> None:
        """Beats are written to the file descriptor `pipe`; they tell of `loop`."""
        self._pipe = pipe
        self._loop = loop
        self._has_answered = True
        Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process ends
            while True:
                self._write(_GOES_ON if self._has_answered else _STANDS_STILL)
                if self._has_answered:
                    self._has_answered = False
                    self._loop.call_soon_threadsafe(self._answer)
                time.sleep(BEAT_SECONDS)

    def _write(self, beat: bytes) -> None:
        try:
            os.write(self._pipe, beat)
        except BrokenPipeError:
            os._exit(0)

    def _answer(self) -> None:
        self._has_answered = True


@dataclass(slots=True)
class Silence:
    """How long nothing was heard of a process, or of its event loop.

    It is counted in beats that were missed, so time in which the listener itself does not run is nobody's silence.
    """

    seconds: float = 0.0
    waiting: float = 0.0
    """Those of them in which it had nothing to run."""

    def lasts(self, *, is_working: bool) -> None:
        """Another beat was missed."""
        self.seconds += BEAT_SECONDS
        if not is_working:
            self.waiting += BEAT_SECONDS

    def ends(self) -> None:
        """A sign of life."""
        self.seconds = self.waiting = 0.0

    def exceeds(self, limits: Limits) -> bool:
        return self.waiting >= limits.waiting or self.seconds >= limits.all


class Pulse:
    """The front process's end: hears beats, and tells once of a process that hangs."""

    def __init__(self, pipe: int, pid: int, tell: Callable[[str], object]) -> None:
        """Beats of the process `pid` come from the file descriptor `pipe`, which is closed with this."""
        self.limits = STARTING
        self._pipe = pipe
        self._pid = pid
        self._tell = tell
        self._is_heard = self._goes_on = False
        """What beats since the last look have said."""
        self._of_process, self._of_loop = Silence(), Silence()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pipe, self._hear)
        self._timer = self._loop.call_later(BEAT_SECONDS, self._look)

    def close(self) -> None:
        """Listen no more."""
        self._timer.cancel()
        if self._pipe >= 0:
            self._loop.remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = -1

    def _hear(self) -> None:
        beats = os.read(self._pipe, 4096)
        if not beats:
            self.close()  # the process has ended, which its socket tells
        self._is_heard |= bool(beats)
        self._goes_on |= _GOES_ON in beats

    def _look(self) -> None:
        self._count()
        problem = self._problem()
        if problem is not None:
            self._tell(problem)
            return
        self._is_heard = self._goes_on = False
        self._timer = self._loop.call_later(BEAT_SECONDS, self._look)

    def _count(self) -> None:
        if self._goes_on:
            self._of_loop.ends()
        elif self._is_heard:
            self._of_loop.lasts(is_working=_state(self._pid, self._pid) in _WORKING)
        if self._is_heard:
            self._of_process.ends()
        else:
            self._of_process.lasts(is_working=not _WORKING.isdisjoint(_states(self._pid)))

    def _problem(self) -> str | None:
        """What is found wrong; None: nothing."""
        if self._of_process.exceeds(self.limits):
            stopped = ", and is stopped" if "T" in _states(self._pid) else ""
            return f"has given no sign of life for {self._of_process.seconds:.1f} s{stopped}"
        if self._of_loop.exceeds(self.limits):
            return f"hangs: its event loop has stood still for {self._of_loop.seconds:.1f} s"
        return None


def _states(pid: int) -> set[str]:
    """States of the threads of a process, a letter each; none where it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return {_state(pid, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}
    return set()


def _state(pid: int, thread: int) -> str:
    """State of a thread, a letter; X where it has ended."""
    try:
        return Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
