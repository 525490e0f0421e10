"""The order in which a server goes up and down, whatever carries its calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from enum import Enum
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

    DOWN = (False, False)
    """No requests are taken; or both of the next are true."""
    UNREADY = (True, False)
    """Requests are taken, but not by every front end: others should have them."""
    UNWELL = (False, True)
    """Requests are taken, but a step takes too long, or all of them fail: the process should be looked at."""
    SERVING = (True, True)

    @property
    def is_alive(self) -> bool:
        """The process should be left as it is."""
        return self.value[0]

    @property
    def is_ready(self) -> bool:
        """Requests should be sent here."""
        return self.value[1]


class FrontEnd(Protocol):
    """Carries calls to a service. Each transport's is in a package of its own."""

    @property
    def is_ready(self) -> bool:
        """Takes calls, once an engine is there; where that changes, `Lifecycle.report` is to be called."""
        ...

    async def start(self) -> None:
        """Bind and answer.

        Raises:
            ConfigError: the address cannot be bound.
        """
        ...

    async def attach(self, engine: Engine) -> None:
        """Requests are taken for `engine` from now on.

        Raises:
            ConfigError: it cannot be served here.
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
        self._is_alive = True

    async def start(self) -> None:
        """Bind and answer; requests are refused until an engine is attached.

        Raises:
            ConfigError: an address cannot be bound.
        """
        await self.report()
        for front_end in self._front_ends:
            await front_end.start()

    async def attach(self, engine: Engine) -> None:
        """Take requests for `engine`, which has started.

        Raises:
            ConfigError: a front end cannot serve it.
        """
        self.state.attach(engine)
        for front_end in self._front_ends:
            await front_end.attach(engine)
        await self.report()
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
        await self.report()

    async def _set_alive(self, alive: bool) -> None:
        self._is_alive = alive
        await self.report()

    async def report(self) -> None:
        """Have probes told how things are now."""
        for front_end in self._front_ends:
            await front_end.report(self._health)

    @property
    def _health(self) -> Health:
        if self.state.phase is not Phase.SERVING:
            return Health.DOWN
        return Health((self._is_alive, all(front_end.is_ready for front_end in self._front_ends)))

    async def _wait_idle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):  # of 0, too, is enough where nothing is to be waited for
                await self.state.wait_idle()
        except TimeoutError:
            _log.warning("requests still run after %s s and are ended", seconds)
