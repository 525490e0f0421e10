"""Entry point: parses, runs the command, turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Sequence

from hsrpc import __version__
from hsrpc.cli import batch, bench, chat, convert, generate, health, info, plan, serve, top
from hsrpc.cli.options import Parser
from hsrpc.cli.terminal import print_any_text, print_error
from hsrpc.errors import HsrpcError

_COMMANDS = (serve, generate, chat, batch, plan, convert, info, bench, top, health)

_EXAMPLES = """\
examples:
  hsrpc generate "Once upon a time"                        the bundled model, embedded
  hsrpc chat                                               a conversation with it
  hsrpc batch requests.jsonl answers.jsonl                 a file of requests, in OpenAI's batch form
  hsrpc serve --port 50051                                 the same over gRPC
  hsrpc serve --model ~/models/opt-13b --gpu-memory 20GiB  a model larger than the device
  hsrpc plan --model random:opt-30b --gpu-memory 24GiB     what would lie where, and how fast it would be
  hsrpc plan --model random:opt-30b --hardware rtx4090     the same for another machine
"""


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="hsrpc",
        description="Serves language models that do not fit the GPU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hsrpc {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 1 a failure that its message explains, 2 a wrong use, 128 + n an end by signal n."""
    atexit.register(gc.freeze)  # else the interpreter's last collections look at all of torch, for half a second
    print_any_text()
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        options.run(options)
    except HsrpcError as error:
        print_error(f"hsrpc: error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hsrpc"):
            raise
        print_error(f"hsrpc: error: {error.name} is not installed; pip install 'hsrpc[engine,plot]'")
        return 1
    except BrokenPipeError:
        # Nobody reads standard output any more: what is left of it must not fail again as the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print_error(f"hsrpc: error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
