"""20,000 calls that end early, against a server whose engine computes nothing: `make cancels`.

Cancelled at once, cancelled amid the stream, past their deadline, or gone with their connection. Afterwards the server,
in a process of its own, must hold what it held before: tasks, requests, descriptors, Python objects, memory. Prints one
JSON object; exits with 1 if something grew.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio
import uvloop

from hsrpc.bench.process import connected
from hsrpc.client_messages import generate_request
from hsrpc.server import Server, ServerConfig
from hsrpc.server.ops.telemetry import Telemetry
from hsrpc.testing.stub_engine import StubEngine

TOKENS_PER_SECOND = 200.0
"""Rate of each stream; none ends by itself."""
AT_ONCE = 64
"""Calls under way."""
DEADLINE = 0.02
"""Seconds."""
SETTLE_SECONDS = 30.0
SLACK = {"live": 0, "requests": 0, "tasks": 0, "fds": 4, "blocks": 500, "rss_bytes": 16 * 1024**2}
"""Growth that is no leak: of 20,000 calls, a block of memory of forty of them, and some hundred bytes of each."""
_METHOD = "/hsrpc.v1.GenerationService/Generate"
_ALONE = (("grpc.use_local_subchannel_pool", 1),)
_REQUEST = generate_request("Once upon a time", {"max_tokens_per_message": 1}).SerializeToString()
_WAYS = ("cancelled at once", "cancelled amid", "deadline", "connection gone")


@dataclass(frozen=True, slots=True)
class Held:
    """What the server's process has at one moment."""

    live: int
    """Admitted calls."""
    requests: int
    """Requests that the engine holds."""
    tasks: int
    fds: int
    blocks: int
    """Blocks of memory that Python objects take, after a collection."""
    rss_bytes: int

    def over(self, before: Held) -> dict[str, int]:
        """What grew by more than its slack, and by how much."""
        now, then = asdict(self), asdict(before)
        return {name: now[name] - then[name] for name, slack in SLACK.items() if now[name] - then[name] > slack}


def serve_stub(connection: Connection) -> None:
    """Serve; send the address, then a `Held` for each thing that comes, until it is None."""
    uvloop.run(_serve_stub(connection))


async def _serve_stub(connection: Connection) -> None:
    async with Telemetry(ServerConfig(port=0)) as telemetry, StubEngine(TOKENS_PER_SECOND) as engine:
        server = Server(ServerConfig(port=0), (), telemetry.observers, telemetry.count_call)
        await server.start()
        await server.attach(engine)
        connection.send(server.address)
        while await asyncio.to_thread(connection.recv) is not None:
            connection.send(_held(server, engine))
        await server.stop()


def _held(server: Server, engine: StubEngine) -> Held:
    gc.collect()
    return Held(
        live=server.state.live,
        requests=len(engine.live),
        tasks=len(asyncio.all_tasks()),
        fds=len(os.listdir("/proc/self/fd")),
        blocks=sys.getallocatedblocks(),
        rss_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


async def leave_many(address: str, calls: int) -> Counter[str]:
    """So many calls that end early, some at once; how they ended."""
    ended: Counter[str] = Counter()
    numbers = iter(range(calls))

    async def work() -> None:
        async with grpc.aio.insecure_channel(address, _ALONE) as channel:
            for number in numbers:
                ended[await _leave(_way(number), address, channel)] += 1

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    gc.collect()  # a channel's connection closes with its last reference
    return ended


def _way(number: int) -> str:
    """Most leave a connection that goes on; one in 32 takes it with it."""
    return _WAYS[number % 3] if number % 32 else _WAYS[3]


async def _leave(way: str, address: str, channel: grpc.aio.Channel) -> str:
    if way == "connection gone":
        async with grpc.aio.insecure_channel(address, _ALONE) as own:
            await _method(own)(_REQUEST).read()
        return way
    call = _method(channel)(_REQUEST, timeout=DEADLINE if way == "deadline" else None)
    if way == "cancelled amid":
        await call.read()
    if way != "deadline":
        call.cancel()
    return f"{way}: {(await call.code()).name}"


def _method(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamMultiCallable[bytes, bytes]:
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_METHOD)
    return method


async def settled(server: Connection, before: Held | None = None) -> Held:
    """What the server holds once nothing is over `before`, or after `SETTLE_SECONDS`."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        server.send("held")
        held: Held = await asyncio.to_thread(server.recv)
        if not (held.over(before) if before else held.live + held.requests) or time.monotonic() > until:
            return held
        await asyncio.sleep(0.25)


async def check(calls: int, warm_up: int) -> dict[str, object]:
    """Leave `calls` calls; what was held before and after, and what grew too much."""
    with connected(serve_stub) as server:
        address = await asyncio.to_thread(server.recv)
        await leave_many(address, warm_up)
        before = await settled(server)
        started = time.perf_counter()
        ended = await leave_many(address, calls)
        seconds = time.perf_counter() - started
        after = await settled(server, before)
    return {
        "calls_per_second": calls / seconds,
        "ended": ended,
        "before": asdict(before),
        "after": asdict(after),
        "grown": after.over(before),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--warm-up", type=int, default=2_000)
    options = parser.parse_args()
    found = uvloop.run(check(options.calls, options.warm_up))
    print(json.dumps(found, indent=1))
    return 1 if found["grown"] else 0


if __name__ == "__main__":
    sys.exit(main())
