"""How long a client may leave its stream unread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import TracebackType
from typing import Self, TypeVar

from hsrpc.server.errors import StalledClientError

Result = TypeVar("Result")


class StallTimeout:
    """Ends the block when a write in it has waited for room for `seconds`; one timer serves all writes of the block.

    Raises:
        StalledClientError: from the block.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        """When the write that is under way began."""
        self._timer: asyncio.TimerHandle | None = None
        """Set while there are writes: not sooner than the one under way is late, and maybe later."""
        self._cut = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._cut.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._cut.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise StalledClientError(f"no room to write for {self._seconds} s, or less, as others needed it") from None

    async def wait(self, write: Awaitable[Result]) -> Result:
        """What a write comes to; one at a time."""
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._since + self._seconds, self._look)
        try:
            return await write
        finally:
            self._since = None

    def give_way(self) -> None:
        """End the block now: others need the room that its write holds."""
        self._cut.reschedule(self._loop.time())

    def _look(self) -> None:
        self._timer, now = None, self._loop.time()
        if self._since is None:
            return
        if self._since + self._seconds <= now:
            self._cut.reschedule(now)
        else:
            self._timer = self._loop.call_at(self._since + self._seconds, self._look)
