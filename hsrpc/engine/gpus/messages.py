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
from hsrpc.engine.gpus.contract import GpuFacts, GpuUse, StepResult
from hsrpc.errors import HsrpcError, OutOfDeviceMemoryError
from hsrpc.plan.plan import Plan
from hsrpc.schedule.step import Packed

_LENGTH = struct.Struct("!Q")


class Begin(NamedTuple):
    """The first message to a rank: who it is."""

    config: EngineConfig
    rank: int
    size: int
    meeting: Meeting


class Measured(NamedTuple):
    """What a rank found of its GPU, measured while all others did so too."""

    facts: GpuFacts


class Load(NamedTuple):
    """What a rank is to load."""

    plan: Plan
    choice: int
    """Number of the choice of the model's formats that the plan is for."""


class Loading(NamedTuple):
    """How far a rank is with what it is to load."""

    done: int
    """Layers."""
    total: int


class Ready(NamedTuple):
    """A rank takes steps."""

    warms_up: bool
    use: GpuUse


class Execute(NamedTuple):
    """A step's part of one rank."""

    packed: Packed
    constrained: Sequence[int]
    """Rows of its `sampling` that have a matcher, which stays with the front process."""


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


class Executed(NamedTuple):
    """What a step gave, and what the rank has done by then."""

    step_id: int
    result: StepResult | OutOfDeviceMemoryError | None
    use: GpuUse


class Failed(NamedTuple):
    """Why a rank ends."""

    error: HsrpcError


@dataclass(frozen=True, slots=True)
class Line:
    """One end of the socket."""

    reader: StreamReader
    writer: StreamWriter

    @classmethod
    async def over(cls, end: socket.socket) -> Line:
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, message: tuple[Any, ...]) -> None:
        """Send without waiting: what is under way is bounded by what is asked for. Nothing, where it is closed."""
        if self.writer.is_closing():
            return  # `receive` tells
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self.writer.write(_LENGTH.pack(len(data)) + data)

    def fail(self, error: Exception) -> None:
        """Let `receive` raise `error`, whatever comes."""
        self.reader.set_exception(error)

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
