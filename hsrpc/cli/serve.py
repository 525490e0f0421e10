"""hsrpc serve: the engine behind gRPC."""

from __future__ import annotations

import argparse
import logging
import sys

from hsrpc.cli.options import Commands, add_command, add_engine_options, engine_config

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
    listen.add_argument("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS", help="for running requests")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    import uvloop  # needs the extra `engine`, which --help does not

    from hsrpc.engine.engine import Engine
    from hsrpc.server import ServerConfig, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    engine = Engine(engine_config(options), progress=sys.stderr.isatty())
    config = ServerConfig(host=options.host, port=options.port, drain_timeout=options.shutdown_timeout)
    uvloop.run(serve(engine, config))
