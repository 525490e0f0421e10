"""What the front process and the ranks tell each other: pickled, over a socket that only the two have.

Both ends are the same program on the same host, started by one another, so what is unpickled is never a stranger's.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsrpc.config import EngineConfig
from hsrpc.device.group import Meeting
from hsrpc.draft.drafter import Wanted
from hsrpc.engine.draft_model import PlannedDraftModel
from hsrpc.engine.gpus.contract import Moved, StepResult
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Plan
from hsrpc.schedule.step import Packed

BEAT_SECONDS = 0.25
"""A rank says that often that it is there."""
MAX_SILENCE = 10.0
"""Seconds after which a rank that says nothing is taken to hang. It says so on its event loop, which other threads of
the process, or of a busy host, may keep waiting for a while."""
_LENGTH = struct.Struct("!Q")


class Begin(NamedTuple):
    """The first message to a rank: who it is."""

    config: EngineConfig
    rank: int
    size: int
    meeting: Meeting
    progress: bool
    """It shows bars while it loads."""


class Measured(NamedTuple):
    """What a rank found of its GPU, measured while all others did so too."""

    machine: Machine


class Load(NamedTuple):
    """What a rank is to load."""

    plan: Plan
    choice: int
    """Number of the choice of the model's formats that the plan is for."""
    draft_model: PlannedDraftModel | None
    """None: nothing is drafted by a model."""


class Ready(NamedTuple):
    """A rank takes steps."""

    warms_up: bool
    runs_ahead: bool


class Execute(NamedTuple):
    """A step's part of one rank."""

    packed: Packed
    """Without its mini-batches where it is ahead: these came with the step before."""
    constrained: Sequence[int]
    """Rows of its `sampling` that have a matcher, which stays with the front process."""
    ahead: Packed | None
    """Its part of the next step, without rows to sample: to be launched before this one's tokens are known."""


class Allowed(NamedTuple):
    """What the constrained rows of a step under way may sample."""

    step_id: int
    masks: Mapping[int, npt.NDArray[np.int32]]
    """By row, as `Matcher.allowed` has them."""


class Stop(NamedTuple):
    """Nobody waits for a step any more."""

    step_id: int


class ResetCounts(NamedTuple):
    """Count from 0 again."""


class Draft(NamedTuple):
    """Requests to draft for; answered by `Drafted`."""

    wanted: Sequence[Wanted]
    """Their `token_ids` are those alone that the rank has not been told."""


class Forget(NamedTuple):
    """Requests for which a rank drafts no more."""

    request_ids: Sequence[str]


class Executed(NamedTuple):
    """What a step gave, and what was moved by then."""

    step_id: int
    result: StepResult | OutOfDeviceMemoryError | None
    moved: Moved
    peak_memory: int


class Drafted(NamedTuple):
    """What a rank has drafted."""

    drafts: Sequence[Sequence[int]] | None
    """One for each of those wanted; None: it could not, and has logged why."""


class Alive(NamedTuple):
    """A rank's event loop runs."""


class Failed(NamedTuple):
    """Why a rank ends."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Line:
    """One end of the socket."""

    reader: StreamReader
    writer: StreamWriter

    @classmethod
    async def over(cls, end: socket.socket) -> Line:
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, message: tuple[Any, ...]) -> None:
        """Send without waiting: what is under way is bounded by what is asked for."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self.writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other end is gone.
        """
        try:
            [size] = _LENGTH.unpack(await self.reader.readexactly(_LENGTH.size))
            return pickle.loads(await self.reader.readexactly(size))  # noqa: S301 (see above)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError("the other end is gone") from None
