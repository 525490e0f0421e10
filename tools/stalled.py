"""Measures what streams that nobody reads cost a server: resident memory before, while they stall, and after.

    PYTHONPATH=. python tools/stalled.py --streams 100

An engine that computes nothing says 1024 tokens with 20 logprobs each on every stream. Client and server are one
process; what the client holds is nothing beside the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
from pathlib import Path
from typing import Any

import uvloop

from hsrpc.request import MAX_LOGPROBS, Delta, TokenLogprob
from hsrpc.server import Server, ServerConfig
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.testing.raw_http2 import RawConnection, connected
from hsrpc.v1 import generation_pb2

_METHOD = "/hsrpc.v1.GenerationService/Generate"
_TOKEN = TokenLogprob(30_000, -1.5, 1, tuple((30_000 + rank, -1.5 - rank) for rank in range(MAX_LOGPROBS)))
_OUTPUT = Delta(" word" * 1024, (30_000,) * 1024, (_TOKEN,) * 1024)
_WRITE_TIMEOUT = 20.0
"""Seconds; long enough for all streams to begin."""


class _Talker(FakeEngine):
    """Says the same on every stream, and goes on."""

    async def submit(self, *prompt: Any, **options: Any) -> Any:
        generation = await super().submit(*prompt, **options)
        generation.put(_OUTPUT)
        return generation


def resident() -> float:
    """Memory of this process, MiB, without what its allocator keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def stall(server: Server, reader: RawConnection, streams: int) -> None:
    """Begin streams, leave them unread, and print what the process holds."""
    request = generation_pb2.GenerateRequest(text="Hi")
    request.output.logprobs = MAX_LOGPROBS
    print(f"before: {resident():.0f} MiB")
    begun = [reader.ask(_METHOD, request) for _ in range(streams)]
    await reader.until_answered(begun)
    print(f"{streams} streams unread: {resident():.0f} MiB, {server.grpc.sender.held / 2**20:.0f} MiB to be sent")
    await asyncio.sleep(_WRITE_TIMEOUT + 2)
    ended = "the connection is cut" if reader.is_cut else f"{len(reader.reset)} are reset"
    print(f"after the timeout: {resident():.0f} MiB, {server.grpc.sender.held / 2**20:.0f} MiB to be sent; {ended}")


async def run(streams: int, rounds: int) -> None:
    """The whole measurement, on a server of its own."""
    server = Server(ServerConfig(port=0, write_timeout=_WRITE_TIMEOUT, max_unsent_bytes_per_connection=2**40))
    await server.start()
    await server.attach(_Talker(held=True))
    for _ in range(rounds):
        async with connected(server.port, window=0) as reader:
            await stall(server, reader, streams)
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    uvloop.run(run(options.streams, options.rounds))


if __name__ == "__main__":
    main()
