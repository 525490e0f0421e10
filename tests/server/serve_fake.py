"""Serves a fake engine, for tests of signals and faults: `python -m tests.server.serve_fake [loading|broken|dies]`."""

from __future__ import annotations

import asyncio
import sys

from hsrpc.errors import CheckpointError
from hsrpc.server import ServerConfig, serve
from tests.server.fake_engine import FakeEngine


async def main(mode: str) -> None:
    engine = FakeEngine(held=True, load_gate=asyncio.Event() if mode == "loading" else None)
    if mode == "broken":
        engine.load_error = CheckpointError("no model here")
    if mode == "dies":
        asyncio.get_running_loop().call_later(1, engine.die)
    await serve(engine, ServerConfig(port=0, drain_timeout=30))


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else ""))
