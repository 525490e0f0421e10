"""Serves a fake engine, for tests of signals and faults: one of `main`'s modes, or none."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from hsrpc.errors import CheckpointError
from hsrpc.server import ServerConfig, app, reloaded_file, serve
from hsrpc.server.ops.forced_exit import exit_within
from hsrpc.server.ops.logs import LogFormat, set_up_logs
from hsrpc.server.ops.telemetry import Telemetry
from hsrpc.server.security import SecurityConfig
from hsrpc.testing.fake_engine import FakeEngine


class HangingEngine(FakeEngine):
    """Cannot be left, and keeps a thread that never ends."""

    async def __aexit__(self, *_: object) -> None:
        threading.Thread(target=threading.Event().wait).start()
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


class StuckEngine(FakeEngine):
    """Never loads, on a thread that cannot be told to stop."""

    async def __aenter__(self) -> Self:
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.to_thread(threading.Event().wait)


async def main(mode: str) -> None:
    engine = FakeEngine(held=True, load_gate=asyncio.Event() if mode == "loading" else None)
    if mode == "broken":
        engine.load_error = CheckpointError("no model here")
    if mode == "dies":
        asyncio.get_running_loop().call_later(1, engine.die)
    if mode == "stuck":
        await serve(StuckEngine(), ServerConfig(port=0), exit_within=exit_within)
    if mode == "hangs":
        engine = HangingEngine()
        app.EXIT_SECONDS = 1.0
        await serve(engine, ServerConfig(port=0, drain_timeout=0.1), exit_within=exit_within)
    security = SecurityConfig()
    if mode == "tokens":
        reloaded_file.CHECK_SECONDS = math.inf
        security = SecurityConfig(auth_tokens=Path(sys.argv[2]))
    drain_timeout, endpoint = (1.0, sys.argv[2]) if mode == "traced" else (30.0, None)
    openai_port = 0 if mode == "openai" else None
    config = ServerConfig(
        port=0, openai_port=openai_port, drain_timeout=drain_timeout, security=security, otel_endpoint=endpoint
    )
    telemetry = Telemetry(config)
    engine.held = mode != "logs"
    if mode in ("logs", "tokens"):
        set_up_logs(LogFormat.TEXT, "info", telemetry.count_dropped_log_line)
    await serve(engine, config, telemetry=telemetry)


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else ""))
