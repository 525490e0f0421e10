"""Measures what messages that never end cost a server: bytes that it takes, resident memory, others' calls meanwhile.

    PYTHONPATH=. python tools/half_messages.py --connections 4 --calls 4096

An engine that computes nothing serves; another process is the client, by the rules of flow control.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from contextlib import AsyncExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from hsrpc.client import AsyncClient, CallError
from hsrpc.server import Server, ServerConfig
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.testing.raw_http2 import connected
from tests.server.grpc.half_messages import HalfMessages

_SIZE, _SENT = 4 * 1024**2 - 64, int(3.4 * 1024**2)
"""Bytes of each message, and of the part that is sent."""
_QUIET = 4.0
"""Seconds without a byte taken after which no more will be."""


def resident(pid: int) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def serve(port: Connection) -> None:
    """Until the process is ended."""
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(FakeEngine())
    port.send(server.port)
    await asyncio.Event().wait()


async def ask(port: int) -> float:
    """Seconds until a prompt of 4 MiB is answered, on a connection of its own; it is longer than the context."""
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        started = time.perf_counter()
        with suppress(CallError):
            await client.complete("x" * _SIZE)
        return time.perf_counter() - started


async def measure(pid: int, port: int, connections: int, calls: int, method: str) -> None:
    """Print memory and delay before and while so many messages are sent in part."""
    alone = await ask(port)
    print(f"before: {resident(pid):.0f} MiB; another's call takes {alone:.2f} s")
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(port)) for _ in range(connections)]
        halves = [HalfMessages(client, _SIZE, _SENT) for client in clients]
        for each in halves:
            each.begin(method, calls)
        taken = sum(await asyncio.gather(*(each.push(_QUIET) for each in halves)))
        print(f"with them: {resident(pid):.0f} MiB, of which {taken / 2**20:.0f} MiB were sent")
        print(f"another's call takes {await ask(port):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--calls", type=int, default=100, help="of each connection")
    parser.add_argument("--method", default="/hsrpc.v1.GenerationService/Generate")
    options = parser.parse_args()
    near, far = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(far,), daemon=True)
    server.start()
    assert server.pid is not None
    try:
        uvloop.run(measure(server.pid, near.recv(), options.connections, options.calls, options.method))
    finally:
        server.terminate()


def _serve(port: Connection) -> None:
    uvloop.run(serve(port))


if __name__ == "__main__":
    main()
