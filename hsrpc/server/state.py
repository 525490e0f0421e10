"""Whether the server takes requests, and how many it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from hsrpc.errors import EngineUnavailableError
from hsrpc.server.contract import Engine


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
        self._live = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def attach(self, engine: Engine) -> None:
        self._engine = engine
        self.phase = Phase.SERVING

    def enter(self, phase: Phase) -> None:
        """Go on to `phase`; what has failed stays so."""
        if self.phase is not Phase.FAILED:
            self.phase = phase

    @property
    def engine(self) -> Engine:
        """The engine, for calls that start no work.

        Raises:
            NotServingError: it is loading or has failed.
        """
        if self._engine is None or self.phase is Phase.FAILED:
            raise NotServingError(self.phase)
        return self._engine

    @contextmanager
    def admit(self) -> Iterator[Engine]:
        """The engine, for a call that starts work; draining waits for its end.

        Raises:
            NotServingError: new work is not taken.
        """
        if self.phase is not Phase.SERVING:
            raise NotServingError(self.phase)
        engine = self.engine
        self._live += 1
        self._idle.clear()
        try:
            yield engine
        finally:
            self._live -= 1
            if not self._live:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Until no admitted call is left."""
        await self._idle.wait()
