"""hsrpc serve: the engine behind gRPC."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hsrpc.cli.options import Commands, SecondsOption, add_command, add_engine_options, engine_config
from hsrpc.cli.security import add_security_options, security_config
from hsrpc.cli.settings import add_settings, print_settings
from hsrpc.model.hub import forbid_downloads
from hsrpc.server.config import SERVER_TIMES

if TYPE_CHECKING:
    from hsrpc.engine.engine import Engine

_EXAMPLES = """\
  hsrpc serve                                        the bundled model on 127.0.0.1:50051
  hsrpc serve --port 0                               a free port; printed as `listening on HOST:PORT`
  hsrpc serve --model ./opt-13b --gpu-memory 20GiB   weights and caches stream from the host
  hsrpc serve --openai-port 8000                     OpenAI's and Anthropic's APIs too, on 127.0.0.1:8000
  hsrpc serve --max-batch 8 --print-config           what would be in effect, and where it came from
  hsrpc serve --model ./opt-13b --cache-policy kv    no activation caching, to compare
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "serve", "serve a model over gRPC", _EXAMPLES)
    listen = parser.add_argument_group("listening")
    listen.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    listen.add_argument("--port", type=int, default=50051, help="0 takes a free one (default: 50051)")
    listen.add_argument(
        "--shutdown-timeout",
        type=SecondsOption(SERVER_TIMES["drain_timeout"]),
        default=30.0,
        metavar="SECONDS",
        help="for running requests; 0 ends them at once (default: 30)",
    )
    listen.add_argument(
        "--write-timeout",
        type=SecondsOption(SERVER_TIMES["write_timeout"]),
        default=30.0,
        metavar="SECONDS",
        help="for a client to go on reading its stream (default: 30)",
    )
    listen.add_argument(
        "--step-timeout",
        type=SecondsOption(SERVER_TIMES["step_timeout"]),
        default=300.0,
        metavar="SECONDS",
        help="for one step, before health says that the process hangs (default: 300)",
    )
    listen.add_argument(
        "--max-priority",
        type=int,
        default=-8,
        metavar="N",
        help="most urgent that a request may be; smaller is more urgent, and 0 lets nobody pass others (default: -8)",
    )
    listen.add_argument(
        "--served-model-name",
        metavar="NAME[,NAME...]",
        help="names that the `model` of a request may have; answers say the first (default: the model's own)",
    )
    listen.add_argument(
        "--vllm-engine",
        action="store_true",
        help="serve vllm.grpc.engine.VllmEngine beside hsrpc.v1, for gateways; needs hsrpc[gateway]",
    )
    _add_openai_options(parser)
    _add_message_options(parser)
    add_security_options(parser)
    _add_operations_options(parser)
    add_engine_options(parser)
    add_settings(parser)
    parser.set_defaults(run=run)


def _add_openai_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("OpenAI's and Anthropic's APIs, by the gateway of hsrpc[gateway]")
    group.add_argument("--openai-port", type=int, metavar="PORT", help="serve them here; 0 takes a free one")
    group.add_argument(
        "--openai-host", default="127.0.0.1", metavar="HOST", help="address of that port (default: 127.0.0.1)"
    )
    group.add_argument(
        "--tool-call-parser", metavar="NAME", help="the model's notation for calls of tools (default: by its name)"
    )
    group.add_argument(
        "--reasoning-parser", metavar="NAME", help="the model's notation for reasoning (default: by its name)"
    )


def _add_message_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("messages of a stream, where a request sets nothing else")
    group.add_argument(
        "--max-tokens-per-message", type=int, default=1024, metavar="N", help="at most 1024 (default: 1024)"
    )
    group.add_argument(
        "--max-message-delay",
        type=SecondsOption(SERVER_TIMES["max_message_delay"]),
        default=0.0,
        metavar="SECONDS",
        help="for tokens to wait for others; the first never waits (default: 0, and up to 0.05 with very many streams)",
    )


def _add_operations_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("operations")
    group.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics here; 0 takes a free one"
    )
    group.add_argument(
        "--metrics-host", default="127.0.0.1", metavar="HOST", help="address of the metrics (default: 127.0.0.1)"
    )
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="default: text")
    group.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: info"
    )
    group.add_argument("--log-prompts", action="store_true", help="write prompts into the log; without, never")
    group.add_argument(
        "--otel-endpoint",
        metavar="URL",
        help="send spans here by OTLP over HTTP, such as http://localhost:4318/v1/traces",
    )


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once, as grpc loads; hsrpc reports what goes wrong
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # likewise; what is forked here becomes another program
    from hsrpc.cli.loop import run_loop  # needs the extra `engine`, which --help does not
    from hsrpc.server import ServerConfig, serve
    from hsrpc.server.ops.forced_exit import exit_within, set_up_signals
    from hsrpc.server.ops.logs import LogFormat, set_up_logs
    from hsrpc.server.ops.telemetry import Telemetry

    config = ServerConfig(
        host=options.host,
        port=options.port,
        vllm_engine=options.vllm_engine,
        openai_port=options.openai_port,
        openai_host=options.openai_host,
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        served_model_names=tuple(filter(None, (options.served_model_name or "").split(","))),
        security=security_config(options),
        drain_timeout=options.shutdown_timeout,
        write_timeout=options.write_timeout,
        max_tokens_per_message=options.max_tokens_per_message,
        max_message_delay=options.max_message_delay,
        step_timeout=options.step_timeout,
        max_priority=options.max_priority,
        metrics_port=options.metrics_port,
        metrics_host=options.metrics_host,
        log_prompts=options.log_prompts,
        otel_endpoint=options.otel_endpoint,
    )
    engine_settings = engine_config(options)
    if options.print_config:
        print_settings(options.settings)
        return
    set_up_signals()
    from hsrpc.engine.engine import Engine  # takes seconds: the settings are checked by now

    telemetry = Telemetry(config)
    set_up_logs(LogFormat(options.log_format), options.log_level, telemetry.count_dropped_log_line)
    engine = Engine(engine_settings, progress=sys.stderr.isatty(), observe=telemetry.observe_step)
    run_loop(serve(_offline_once_loaded(engine), config, telemetry=telemetry, exit_within=exit_within))


@asynccontextmanager
async def _offline_once_loaded(engine: Engine) -> AsyncIterator[Engine]:
    """The engine; only loading it may fetch files."""
    async with engine:
        forbid_downloads()
        yield engine
