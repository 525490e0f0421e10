"""Whether the server takes requests, and how many it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum

from hsrpc.errors import EngineUnavailableError
from hsrpc.server.engine_protocol import Engine


class Phase(Enum):
    """A server's life, in this order; FAILED may follow any."""

    LOADING = "the model is loading"
    SERVING = "serving"
    DRAINING = "the server is shutting down"
    FAILED = "the engine has failed and the server is going down"


class NotServingError(EngineUnavailableError):
    """The server takes no requests in this phase."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        super().__init__(phase.value)


class ServerState:
    """Decides synchronously whether a call may have the engine."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self._engine: Engine | None = None
        self._live: set[asyncio.Task[object]] = set()
        self._expelled: set[asyncio.Task[object]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._left = asyncio.Event()

    def attach(self, engine: Engine) -> None:
        self._engine = engine
        self.phase = Phase.SERVING

    def enter(self, phase: Phase) -> None:
        """Go on to `phase`; what has failed stays so."""
        if self.phase is not Phase.FAILED:
            self.phase = phase
        if phase in (Phase.DRAINING, Phase.FAILED):
            self._left.set()

    @property
    def engine(self) -> Engine:
        """The engine, for calls that start no work.

        Raises:
            NotServingError: it is loading or has failed.
        """
        if self._engine is None or self.phase is Phase.FAILED:
            raise NotServingError(self.phase)
        return self._engine

    @property
    def live(self) -> int:
        """Admitted calls that have not ended."""
        return len(self._live)

    @contextmanager
    def admit(self) -> Iterator[Engine]:
        """The engine, for a call that starts work; draining waits for its end.

        Raises:
            NotServingError: new work is not taken.
        """
        if self.phase is not Phase.SERVING:
            raise NotServingError(self.phase)
        engine, task = self.engine, asyncio.current_task()
        assert task is not None  # a method runs in its call's task
        self._live.add(task)
        self._idle.clear()
        try:
            yield engine
        except asyncio.CancelledError:
            if task in self._expelled and not task.uncancel():
                raise NotServingError(self.phase) from None
            raise
        finally:
            self._live.discard(task)
            self._expelled.discard(task)
            if not self._live:
                self._idle.set()

    def expel(self) -> None:
        """End the admitted calls that are left: they raise NotServingError."""
        for task in self._live - self._expelled:
            self._expelled.add(task)
            task.cancel()

    async def leaving(self, seconds: float) -> bool:
        """Whether the server has begun to go down, asked again for at most that time."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), seconds)
        return self._left.is_set()

    async def wait_idle(self) -> None:
        """Wait until no admitted call is left."""
        await self._idle.wait()
