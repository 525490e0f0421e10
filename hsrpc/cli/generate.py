"""hsrpc generate: one request on an embedded engine, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from hsrpc.cli.options import Commands, add_command, add_engine_options, engine_config, unescaped
from hsrpc.cli.terminal import printable_json
from hsrpc.errors import InvalidRequestError
from hsrpc.request import Delta, SamplingParams

if TYPE_CHECKING:
    from hsrpc.engine.engine import Engine

_EXAMPLES = r"""  hsrpc generate "Once upon a time"
  hsrpc generate --temperature 0 --max-tokens 40 "The little robot"
  hsrpc generate --stop '\n' --stop 'The end' "Once upon a time"
  hsrpc generate --model ./opt-13b --gpu-memory 20GiB --json "Dear reader," | jq .cache
  hsrpc generate --token-ids 2,47,11
  printf "Deep in the forest" | hsrpc generate -
"""
_SETTINGS = ("temperature", "top_p", "top_k", "max_tokens", "stop", "ignore_eos")


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "generate", "continue one prompt, without a server", _EXAMPLES)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="text, or - for standard input, as it is")
    prompt.add_argument("--token-ids", metavar="IDS", help="prompt as token ids, such as 5,6,7, in place of PROMPT")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the model's own)")
    parser.add_argument("--top-p", type=float, metavar="X", help="default: the model's own")
    parser.add_argument("--top-k", type=int, metavar="N", help="0 is all tokens (default: the model's own)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: to the end of the context")
    parser.add_argument(
        "--stop",
        action="append",
        type=unescaped,
        default=[],
        metavar="TEXT",
        help=r"end before this; \n is a newline, and \t, \r, \\, \xNN and \uNNNN are as in Python; may be repeated",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")
    parser.add_argument("--json", action="store_true", help="print one object at the end instead of streaming")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generate and print."""
    prompt = _prompt(options)
    given = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    SamplingParams(**given)  # refused before the model is loaded
    import uvloop  # needs the extra `engine`, which --help does not

    uvloop.run(_generate(options, prompt, given))


async def _generate(options: argparse.Namespace, prompt: str | list[int], given: dict[str, Any]) -> None:
    from hsrpc.engine.engine import Engine

    async with Engine(engine_config(options), progress=sys.stderr.isatty()) as engine:
        deltas = []
        async for delta in engine.generate(prompt, replace(engine.default_params, **given)):
            deltas.append(delta)
            if not options.json:
                print(delta.text, end="", flush=True)
        print(printable_json(_result(engine, deltas)) if options.json else "")


def _result(engine: Engine, deltas: list[Delta]) -> dict[str, object]:
    finish = deltas[-1].finish
    assert finish is not None  # the last delta has it
    plan, stats = engine.plan, engine.stats()
    return {
        "token_ids": [token_id for delta in deltas for token_id in delta.token_ids],
        "text": "".join(delta.text for delta in deltas),
        "finish_reason": finish.reason.value,
        "matched_stop": finish.matched_stop,
        "usage": asdict(finish.usage),
        "timings": asdict(finish.timings),
        "cache": {
            "policy": plan.policy,
            "reason": plan.reason,
            "activation_share": plan.activation_share,
            "block_size": plan.block_size,
            "peak_blocks": {pool.name.lower(): count for pool, count in stats.peak_blocks.items()},
            "resident_share": plan.resident_share,
            "weights_streamed_bytes": stats.weights_streamed_bytes,
            "cache_loaded_bytes": stats.cache_loaded_bytes,
            "regenerated_tokens": stats.regenerated_tokens,
            "recomputed_tokens": stats.recomputed_tokens,
        },
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
