"""Ranks that come to harm at a moment of their own: what follows from it can then be seen from outside.

While `harmed` is entered, this module is what the ranks of an engine run: each is a rank as any other, until the one
that is meant comes to the moment that is meant.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from hsrpc.engine.gpus import rank, ranks
from hsrpc.engine.gpus.messages import Begin
from hsrpc.engine.lanes import Launch, StepRun
from hsrpc.schedule.sweep import Op

_SETTING = "HSRPC_HARM"
_EVER = 10**6
"""Seconds."""


class Way(StrEnum):
    """What a rank comes to."""

    KILLED = "killed"
    STOPPED = "stopped"
    """The process does not run any more, and is there."""
    STANDS_STILL = "stands still"
    """The event loop does nothing any more; other threads go on."""
    WEDGED = "wedged"
    """The thread that came to the moment goes no further; the process is well."""
    FAILS = "fails"
    """An error that nobody expects."""


class Start(StrEnum):
    """Moments before there are steps; after them moments are kinds of operations, by their values."""

    JOIN = "join"
    MEASURE = "measure"
    LOAD = "load"
    READY = "ready"


class Harm(NamedTuple):
    """What happens to one rank, and when."""

    rank: int
    moment: str
    way: Way
    number: int = 1
    """It happens when the moment comes for this time."""
    later: float = 0.0
    """Seconds after that, whatever the process does by then; for ways that need no thread of its own."""

    def __str__(self) -> str:
        later = f", {self.later:.2f} s later" if self.later else ""
        return f"GPU {self.rank} {self.way.value} at {self.moment} {self.number}{later}"


class Note:
    """When the harm was done."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def at(self) -> float | None:
        """By the monotonic clock, which all processes share; None: it was not done yet."""
        return float(self._file.read_text()) if self._file.exists() else None


@contextmanager
def harmed(harm: Harm) -> Iterator[Note]:
    """Ranks that start meanwhile come to harm."""
    with tempfile.TemporaryDirectory() as directory:
        note = Path(directory) / "note"
        setting = json.dumps([str(note), *harm])
        with patch.dict(os.environ, {_SETTING: setting}), patch.object(ranks, "RANK_MODULE", __name__):
            yield Note(note)


class _Harmed:
    """The harm that this process comes to, if it is the rank that is meant."""

    def __init__(self, harm: Harm, note: Path) -> None:
        self._harm = harm
        self._note = note
        self._left = harm.number
        self._is_meant = True
        signal.signal(signal.SIGUSR1, lambda *_: time.sleep(_EVER))  # on the thread of the event loop

    def watch(self) -> None:
        """Look at all moments of this process from now on."""
        launch_all = StepRun.launch

        def launch(run: StepRun, numbers: Sequence[int], launch_one: Launch) -> None:
            def watched(op: Op) -> None:
                self._before(op.kind.value)
                launch_one(op)

            launch_all(run, numbers, watched)

        patch.object(StepRun, "launch", launch).start()
        for name, moment in (("measure", Start.MEASURE), ("open_gpu", Start.LOAD), ("Ready", Start.READY)):
            setattr(rank, name, self._watched(getattr(rank, name), moment))
        join = rank._join

        def watched_join(begin: Begin) -> Any:
            self._is_meant = begin.rank == self._harm.rank
            self._before(Start.JOIN)
            return join(begin)

        rank._join = watched_join

    def _watched(self, function: Callable[..., Any], moment: Start) -> Callable[..., Any]:
        def watched(*arguments: object, **settings: object) -> Any:
            self._before(moment)
            return function(*arguments, **settings)

        return watched

    def _before(self, moment: str) -> None:
        if self._is_meant and moment == self._harm.moment:
            self._left -= 1
            if self._left == 0 and self._harm.later:
                threading.Timer(self._harm.later, self._come_to_harm).start()
            elif self._left == 0:
                self._come_to_harm()

    def _come_to_harm(self) -> None:
        self._note.write_text(repr(time.monotonic()))
        match self._harm.way:
            case Way.KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            case Way.STOPPED:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Way.STANDS_STILL:
                os.kill(os.getpid(), signal.SIGUSR1)
            case Way.WEDGED:
                threading.Event().wait()
            case Way.FAILS:
                raise RuntimeError("it was to come to harm")


def main() -> None:
    """Be a rank, until the moment comes."""
    note, number, moment, way, *others = json.loads(os.environ[_SETTING])
    _Harmed(Harm(number, moment, Way(way), *others), Path(note)).watch()
    rank.main()


if __name__ == "__main__":
    main()
