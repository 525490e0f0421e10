"""The order in which a server goes up and down, whatever carries its calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from hsrpc.server.engine_protocol import Engine
from hsrpc.server.liveness import watch_engine
from hsrpc.server.service import Service
from hsrpc.server.state import Phase

_LAST_WORDS = 1.0
"""Seconds that calls have to send their status once the server stops."""

_log = logging.getLogger(__name__)


class Health(Enum):
    """What probes are told."""

    DOWN = auto()
    """No requests are taken."""
    SERVING = auto()
    UNWELL = auto()
    """Requests are taken, but a step takes too long, or all of them fail: the process should be looked at."""


class FrontEnd(Protocol):
    """Carries calls to a service. Each transport's is in a package of its own."""

    async def start(self) -> None:
        """Bind and answer.

        Raises:
            ConfigError: the address cannot be bound.
        """
        ...

    async def report(self, health: Health) -> None:
        """Tell probes; called before `start` too."""
        ...

    async def stop(self, seconds: float) -> None:
        """Close the port; calls that are left after `seconds` are cancelled."""
        ...


class Lifecycle:
    """Listens from `start` on; takes requests from `attach` to `drain`. All on one event loop."""

    def __init__(self, service: Service, front_ends: Sequence[FrontEnd]) -> None:
        self.config = service.config
        self.state = service.state
        self._front_ends = front_ends
        self._liveness: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and answer; requests are refused until an engine is attached.

        Raises:
            ConfigError: an address cannot be bound.
        """
        await self._report(Health.DOWN)
        for front_end in self._front_ends:
            await front_end.start()

    async def attach(self, engine: Engine) -> None:
        """Take requests for `engine`, which has started."""
        self.state.attach(engine)
        await self._report(Health.SERVING)
        self._liveness = asyncio.create_task(watch_engine(engine, self.config.step_timeout, self._set_alive))

    async def drain(self) -> None:
        """Take no more requests, and wait for those there are, at most `drain_timeout` s."""
        await self._leave(Phase.DRAINING)
        await self._wait_idle(self.config.drain_timeout)
        self.state.expel()
        await self._wait_idle(_LAST_WORDS / 2)

    async def fail(self) -> None:
        """The engine is dead: take no more requests, and let those there are hear of it."""
        await self._leave(Phase.FAILED)
        await self._wait_idle(_LAST_WORDS / 2)

    async def stop(self) -> None:
        """Cancel what is left, and close the ports."""
        await self._leave(Phase.DRAINING)
        await asyncio.gather(*(front_end.stop(_LAST_WORDS / 2) for front_end in self._front_ends))

    async def _leave(self, phase: Phase) -> None:
        self.state.enter(phase)
        if self._liveness is not None:
            self._liveness.cancel()  # what does not serve needs no watching
        await self._report(Health.DOWN)

    async def _set_alive(self, alive: bool) -> None:
        if self.state.phase is Phase.SERVING:
            await self._report(Health.SERVING if alive else Health.UNWELL)

    async def _report(self, health: Health) -> None:
        for front_end in self._front_ends:
            await front_end.report(health)

    async def _wait_idle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):  # of 0, too, is enough where nothing is to be waited for
                await self.state.wait_idle()
        except TimeoutError:
            _log.warning("requests still run after %s s and are ended", seconds)
