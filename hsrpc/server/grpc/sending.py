"""How responses are sent: each in time and within bounds, or its stream is reset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from hsrpc.server.config import ServerConfig
from hsrpc.server.errors import StalledClientError, StreamResetError
from hsrpc.server.grpc.call_tasks import reset
from hsrpc.server.grpc.status import gone
from hsrpc.server.readers import Readers
from hsrpc.server.send_budget import SendBudget
from hsrpc.server.stall_timeout import StallTimeout

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, bytes]

Send = Callable[[bytes], Awaitable[None]]
"""Sends one message; returns once its client, or the way there, has taken it."""


class Sender:
    """Sends the responses of all calls of a server."""

    def __init__(self, config: ServerConfig, readers: Readers) -> None:
        self._timeout = config.write_timeout
        self._budget = SendBudget(config.max_unsent_bytes, config.max_unsent_bytes_per_connection)
        self._readers = readers

    @property
    def held(self) -> int:
        """Bytes of messages that no client has taken yet."""
        return self._budget.held

    @asynccontextmanager
    async def stream(self, context: Context) -> AsyncIterator[Send]:
        """What sends the messages of a call that streams.

        Raises:
            StalledClientError: from the block, as a message was not taken in time or the room was needed for others.
                StreamResetError: the stream is reset as soon as the current task ends.
        """
        connection, limit = context.peer(), StallTimeout(self._timeout)

        async def write(message: bytes) -> None:
            sending = await self._budget.take(connection, len(message), limit.give_way)
            try:
                await context.write(message)
            finally:
                self._budget.release(sending)

        async def send(message: bytes) -> None:
            try:
                await limit.wait(write(message))
            except grpc.aio.InternalError:
                raise gone() from None

        with self._readers.stream(connection):
            try:
                async with limit:
                    yield send
            except StalledClientError as error:
                if self._stalled(connection, _current_task()):
                    raise StreamResetError(str(error)) from None
                raise

    async def last(self, context: Context, message: bytes) -> bytes:
        """`message`, for grpc to send as the current task's only response; the stream is reset if it is not taken.

        Raises:
            StalledClientError: there was no room for it in time.
        """
        connection, handling = context.peer(), _current_task()

        def unread() -> None:
            handling.cancel()
            self._stalled(connection, handling)

        def end(_: asyncio.Task[Any]) -> None:
            timer.cancel()
            self._budget.release(sending)

        async with StallTimeout(self._timeout) as limit:
            sending = await limit.wait(self._budget.take(connection, len(message), unread))
        timer = asyncio.get_running_loop().call_later(self._timeout, unread)
        handling.add_done_callback(end)  # not the context's: grpc would keep the call until garbage is collected
        return message

    def _stalled(self, connection: str, handling: asyncio.Task[Any]) -> bool:
        is_reset = reset(handling)
        self._readers.stalled(connection, is_reset=is_reset)
        return is_reset


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # a handler runs in its call's task
    return task
