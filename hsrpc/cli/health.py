"""hsrpc health: whether a server takes requests, as an exit code; for containers, service managers and scripts."""

from __future__ import annotations

import argparse
import os

from hsrpc.cli.connection import add_connection_options, connection_settings
from hsrpc.cli.options import MEASURED_TIME, Commands, add_command
from hsrpc.errors import EngineUnavailableError

_EXAMPLES = """\
  hsrpc health && echo ready                      the server on this machine: is the model loaded?
  hsrpc health --service "" --target [::1]:50052  is it alive? asked by the port of --health-port
  hsrpc health --target serving.example.com:50051 --tls-ca ca.pem
"""
_TARGET = "localhost:50051"
_SERVICE = "hsrpc.v1.GenerationService"
_SECONDS = 3.0


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "health", "ask a server whether it takes requests; exits with 0 or 1", _EXAMPLES)
    parser.add_argument(
        "--service",
        default=_SERVICE,
        metavar="NAME",
        help=f'as grpc.health.v1 has it; "" is the server as a whole (default: {_SERVICE})',
    )
    parser.add_argument(
        "--timeout",
        type=MEASURED_TIME,
        default=_SECONDS,
        metavar="SECONDS",
        help=f"for the answer (default: {_SECONDS:g})",
    )
    add_connection_options(parser, target=_TARGET, target_help=_TARGET)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Ask once, and print the status.

    Raises:
        CallError: the server does not answer, or has no such service.
        EngineUnavailableError: it takes no requests now.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once, as grpc loads
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from hsrpc.client_channel import Connection
    from hsrpc.client_messages import call_errors
    from hsrpc.client_proxy import proxy_to

    connection = Connection(**connection_settings(options))
    with connection.channel(options.target) as channel, call_errors(proxy_to(options.target)):
        health, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service=options.service)
        answer = health.Check(request, timeout=options.timeout, metadata=connection.metadata)
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise EngineUnavailableError(f"{options.target}: {status}; it loads its model, drains, or does not go on")
    print(status)
