"""Flags that say what an output must be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hsrpc.cli.options import unescaped
from hsrpc.constraint import Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import ConfigError


def add_constraint_options(parser: argparse.ArgumentParser) -> None:
    """The flags of constraints, of which a command takes one kind."""
    group = parser.add_argument_group("what the output must be").add_mutually_exclusive_group()
    group.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON that this JSON Schema describes")
    group.add_argument("--json-object", action="store_true", help="any JSON object")
    group.add_argument("--regex", metavar="REGEX", help="what this regular expression matches as a whole")
    group.add_argument(
        "--grammar", type=Path, metavar="FILE", help="what this grammar derives, in Lark's notation or GBNF"
    )
    group.add_argument(
        "--choice", action="append", type=unescaped, metavar="TEXT", help="this text, or one of several where repeated"
    )


def constraint_of(options: argparse.Namespace) -> dict[str, Any]:
    """The setting that the flags give; empty where they give none.

    Raises:
        ConfigError: a file cannot be read.
        InvalidRequestError: a constraint is wrong.
    """
    constraint = _read(options)
    return {} if constraint is None else {"constraint": constraint}


def _read(options: argparse.Namespace) -> Constraint | None:
    if options.json_schema is not None:
        return JsonSchema(_text("json_schema", options.json_schema))
    if options.grammar is not None:
        return Grammar(_text("grammar", options.grammar))
    if options.regex is not None:
        return Regex(options.regex)
    if options.choice is not None:
        return Choice(tuple(options.choice))
    return JsonObject() if options.json_object else None


def _text(flag: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(flag, str(file), f"it cannot be read: {problem}", "give a file of text") from None
