"""hsrpc generate: one request on an embedded engine or a server, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from hsrpc.cli.constraint import add_constraint_options, constraint_of
from hsrpc.cli.options import Commands, add_command, add_sampling_options, sampling_settings
from hsrpc.cli.source import add_source_options, running_source
from hsrpc.cli.terminal import printable_json
from hsrpc.errors import InvalidRequestError
from hsrpc.request import Delta
from hsrpc.source import Source

_EXAMPLES = r"""  hsrpc generate "Once upon a time"
  hsrpc generate --temperature 0 --max-tokens 40 "The little robot"
  hsrpc generate --stop '\n' --stop 'The end' "Once upon a time"
  hsrpc generate --model ./opt-13b --gpu-memory 20GiB --json "Dear reader," | jq .cache
  hsrpc generate --token-ids 2,47,11
  hsrpc generate --target 10.0.0.7:50051 "Once upon a time"
  hsrpc generate --choice fox --choice owl "The robot met a"
  printf "Deep in the forest" | hsrpc generate -
"""
_JSON_HELP = "print one object at the end instead of streaming; of a server, `cache` counts all that it has served"


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "generate", "continue one prompt, embedded or on a server", _EXAMPLES)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="text, or - for standard input, as it is")
    prompt.add_argument("--token-ids", metavar="IDS", help="prompt as token ids, such as 5,6,7, in place of PROMPT")
    parser.add_argument("--json", action="store_true", help=_JSON_HELP)
    add_sampling_options(parser)
    add_constraint_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generate and print."""
    prompt = _prompt(options)
    settings = sampling_settings(options) | constraint_of(options)  # refused before the model is loaded
    with running_source(options) as (run, source):
        run(_generate(source, prompt, settings, as_json=options.json))


async def _generate(source: Source, prompt: str | list[int], settings: dict[str, Any], *, as_json: bool) -> None:
    deltas = []
    async for delta in source.generate(prompt, settings):
        deltas.append(delta)
        if not as_json:
            print(delta.text, end="", flush=True)
    print(printable_json(_result(deltas, await source.cache())) if as_json else "")


def _result(deltas: list[Delta], cache: dict[str, object]) -> dict[str, object]:
    finish = deltas[-1].finish
    assert finish is not None  # the last delta has it
    return {
        "token_ids": [token_id for delta in deltas for token_id in delta.token_ids],
        "text": "".join(delta.text for delta in deltas),
        "finish_reason": finish.reason.value,
        "matched_stop": finish.matched_stop,
        "usage": asdict(finish.usage),
        "timings": asdict(finish.timings),
        "cache": cache,
    }


def _prompt(options: argparse.Namespace) -> str | list[int]:
    if options.token_ids is not None:
        return _token_ids(options.token_ids)
    prompt = _standard_input() if options.prompt == "-" else str(options.prompt)
    if not prompt:
        raise InvalidRequestError("PROMPT", "empty; give text, or --token-ids")
    return prompt


def _standard_input() -> str:
    """All of it as it is, the newline at its end included."""
    if sys.stdin is None:
        raise InvalidRequestError("PROMPT", "standard input is closed; give text, or --token-ids")
    encoding = sys.stdin.encoding
    try:
        return sys.stdin.buffer.read().decode(encoding)
    except UnicodeDecodeError as error:
        problem = f"standard input has byte {error.object[error.start]:#x} at {error.start}, which is not {encoding}"
        remedy = f"convert it to {encoding}, or set PYTHONIOENCODING to what it is in"
        raise InvalidRequestError("PROMPT", f"{problem}; {remedy}") from None


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequestError("--token-ids", f"{text!r} is not a list of numbers such as 5,6,7") from None
