"""hsrpc serve: the engine behind gRPC."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hsrpc.cli.options import Commands, add_command, add_engine_options, engine_config
from hsrpc.cli.security import add_security_options, security_config
from hsrpc.model.hub import forbid_downloads

if TYPE_CHECKING:
    from hsrpc.engine.engine import Engine

_EXAMPLES = """\
  hsrpc serve                                        the bundled model on 127.0.0.1:50051
  hsrpc serve --port 0                               a free port; printed as `listening on HOST:PORT`
  hsrpc serve --model ./opt-13b --gpu-memory 20GiB   weights and caches stream from the host
  hsrpc serve --model ./opt-13b --cache-policy kv    no activation caching, to compare
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "serve", "serve a model over gRPC", _EXAMPLES)
    listen = parser.add_argument_group("listening")
    listen.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    listen.add_argument("--port", type=int, default=50051, help="0 takes a free one (default: 50051)")
    listen.add_argument(
        "--shutdown-timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for running requests"
    )
    add_security_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once, as grpc loads; hsrpc reports what goes wrong
    import uvloop  # needs the extra `engine`, which --help does not

    from hsrpc.server import ServerConfig, serve

    security = security_config(options)
    config = ServerConfig(
        host=options.host, port=options.port, drain_timeout=options.shutdown_timeout, security=security
    )
    engine_settings = engine_config(options)
    from hsrpc.engine.engine import Engine  # takes seconds: the settings are checked by now

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    uvloop.run(serve(_offline_once_loaded(Engine(engine_settings, progress=sys.stderr.isatty())), config))


@asynccontextmanager
async def _offline_once_loaded(engine: Engine) -> AsyncIterator[Engine]:
    """The engine; only loading it may fetch files."""
    async with engine:
        forbid_downloads()
        yield engine


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; give seconds, 0 or more")
    return seconds
