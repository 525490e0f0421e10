"""VllmEngine on a port of its own, in plain text: for the gateway that the server runs, which has neither token nor
certificate to bring.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from hsrpc.errors import ConfigError
from hsrpc.server.auth import RefusalLog
from hsrpc.server.config import ServerConfig, join_address
from hsrpc.server.errors import UnauthenticatedError
from hsrpc.server.failure import failure_of
from hsrpc.server.grpc.caller import client_name
from hsrpc.server.grpc.channel_options import channel_options
from hsrpc.server.grpc.health_port import bind
from hsrpc.server.grpc.intake import Intake
from hsrpc.server.grpc.peer import peer_address
from hsrpc.server.grpc.status import abort
from hsrpc.server.observation import CountCall

GATEWAY = "openai:gateway"
"""Name of the client that the gateway is; no token can be of such a name."""
_HOST = "127.0.0.1"
_CONNECTIONS = Path("/proc/net/tcp")
_TRUST_SECONDS = 1.0
"""A connection whose process was looked up is taken for that process's for so long."""

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]


class GatewayPort:
    """A listener on the loopback for the one service, behind `intake`.

    Where clients must say who they are, it lets in the processes `pids` alone.

    Raises:
        ConfigError: on construction, where that cannot be found out.
    """

    def __init__(
        self,
        config: ServerConfig,
        services: grpc.GenericRpcHandler,
        intake: Intake,
        pids: Callable[[], Collection[int]],
        count: CountCall | None = None,
    ) -> None:
        self.port = 0
        names: list[grpc.aio.ServerInterceptor] = []
        if config.security.authenticates:
            if not _CONNECTIONS.exists():
                problem = f"{_CONNECTIONS} is not there, which tells whose a connection is"
                remedy = "serve without tokens and client certificates, or run a gateway of your own with --vllm-engine"
                raise ConfigError("openai_port", config.openai_port, problem, remedy)
            names = [ProcessNames(lambda peer: _is_of(peer, self.port, pids()), count)]
        self._grpc = grpc.aio.server(interceptors=[*names, intake], options=channel_options(config))
        self._grpc.add_generic_rpc_handlers([services])

    @property
    def address(self) -> str:
        return join_address(_HOST, self.port)

    async def start(self) -> None:
        """Bind and answer."""
        self.port = bind(self._grpc, "openai_port", self.address, None)
        await self._grpc.start()

    async def stop(self, seconds: float) -> None:
        """Close the port; calls that are left after `seconds` are cancelled."""
        await self._grpc.stop(seconds)


class ProcessNames(grpc.aio.ServerInterceptor):
    """Lets in calls by connections that `is_ours`, and sets `client_name` for them. The first of its listener."""

    def __init__(self, is_ours: Callable[[str], bool], count: CountCall | None = None) -> None:
        self._is_ours = is_ours
        self._count = count
        self._refusals = RefusalLog("on the gateway's port, as they came from another process")
        self._known: dict[str, float] = {}
        """Until when connections are taken for ours."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        assert handler is not None  # intake has one for everything
        inner: Any = handler.stream_stream or handler.stream_unary

        async def call(requests: Any, context: Context) -> Any:
            if not await self._is_known(context.peer()):
                await self._refuse(handler_call_details.method, context)
            client_name.set(GATEWAY)
            return await inner(requests, context)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call)
        return grpc.stream_unary_rpc_method_handler(call)

    async def _is_known(self, peer: str) -> bool:
        if self._known.get(peer, 0.0) > time.monotonic():
            return True
        self._known = {each: until for each, until in self._known.items() if until > time.monotonic()}
        if not await asyncio.to_thread(self._is_ours, peer):
            return False
        self._known[peer] = time.monotonic() + _TRUST_SECONDS
        return True

    async def _refuse(self, method: str, context: Context) -> None:
        """End the call before any of the request is read."""
        self._refusals.note()
        failure = failure_of(UnauthenticatedError("this port is for the server's own gateway"), method)
        if self._count is not None:
            self._count(method.rpartition("/")[2], failure.kind)
        await abort(context, failure)


def _is_of(peer: str, port: int, pids: Collection[int]) -> bool:
    """Whether one of these processes has made the connection of `peer` to our `port`."""
    address = peer_address(peer)
    inode = None if address is None else _inode(address[1], port)
    return inode is not None and any(f"socket:[{inode}]" in _open_files(pid) for pid in pids)


def _inode(local: int, remote: int) -> str | None:
    """The socket of this machine that is connected on the loopback from one port to another."""
    ends = [f"0100007F:{port:04X}" for port in (local, remote)]
    for line in _CONNECTIONS.read_text().splitlines():
        words = line.split()
        if words[1:3] == ends:
            return words[9]
    return None


def _open_files(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):  # it has ended
        for each in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.add(os.readlink(each.path))
    return found
