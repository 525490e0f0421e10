"""A command's settings from its flags, HSRPC_* variables and a TOML file, all derived from its parser."""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum, StrEnum
from typing import Any, NamedTuple

from hsrpc.cli.options import ABSENT, Parser
from hsrpc.cli.terminal import printable_json

PREFIX = "HSRPC_"
_OWN = ("config", "print_config")
"""Options about the settings themselves."""
_TYPO = 0.8
"""Likeness from which an unknown variable is taken for a misspelt one; others belong to somebody else."""


class Source(StrEnum):
    """Where a value came from; the first that has one wins."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


class Setting(NamedTuple):
    """One effective value."""

    name: str
    """Name in a settings file: the flag without its dashes in front."""
    value: object
    source: Source


def add_settings(parser: Parser) -> None:
    """Let the parser's options come from variables and a file too; its namespaces get `settings`, a list of them."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config", metavar="FILE", help="TOML file of settings named as the flags, such as max-batch = 8"
    )
    group.add_argument(
        "--print-config", action="store_true", help="print the settings in effect and where each came from, and exit"
    )
    parser.fill_in = _Sources(parser).fill_in


class _Sources:
    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def fill_in(self, parsed: argparse.Namespace) -> None:
        """Give every option its value: flag > environment > file > default."""
        for name in _OWN:
            if getattr(parsed, name) is ABSENT:
                setattr(parsed, name, None)
        by_name = {_name(action): action for action in self._parser.options() if action.dest not in _OWN}
        given = {
            Source.FLAG: {name: getattr(parsed, action.dest) for name, action in by_name.items()},
            Source.ENVIRONMENT: self._from_environment(by_name),
            Source.FILE: self._from_file(by_name, parsed.config or os.environ.get(f"{PREFIX}CONFIG")),
            Source.DEFAULT: {name: action.default for name, action in by_name.items()},
        }
        parsed.settings = []
        for name, action in by_name.items():
            source = next(source for source in Source if given[source].get(name, ABSENT) is not ABSENT)
            setattr(parsed, action.dest, given[source][name])
            parsed.settings.append(Setting(name, _shown(action, given[source][name]), source))

    def _from_environment(self, by_name: Mapping[str, argparse.Action]) -> dict[str, object]:
        names = {PREFIX + name.upper().replace("-", "_"): name for name in by_name}
        values = {}
        for variable, text in os.environ.items():
            if variable in names:
                values[names[variable]] = self._converted(by_name[names[variable]], text, variable)
            elif variable.upper().startswith(PREFIX) and variable != f"{PREFIX}CONFIG":
                near = get_close_matches(variable.upper(), [*names, f"{PREFIX}CONFIG"], 1, _TYPO)
                if near:
                    self._parser.error(f"environment variable {variable} is no setting; did you mean {near[0]}?")
        return values

    def _from_file(self, by_name: Mapping[str, argparse.Action], path: str | None) -> dict[str, object]:
        if not path:
            return {}
        values: dict[str, object] = {}
        spelt: dict[str, str] = {}
        for key, value in self._read(path).items():
            name = key.replace("_", "-")
            if name in spelt:
                self._parser.error(f"{path}: {spelt[name]} and {key} are one setting; give it once")
            spelt[name] = key
            if name not in by_name:
                near = get_close_matches(name, by_name, 1, 0.0)
                self._parser.error(f"{path}: {key} is no setting; did you mean {near[0]}?")
            values[name] = self._converted(by_name[name], value, f"{path}: {key}")
        return values

    def _read(self, path: str) -> dict[str, Any]:
        try:
            with open(path, "rb") as file:
                return tomllib.load(file)
        except OSError as error:
            self._parser.error(f"--config {path}: {error.strerror}; give a TOML file that can be read")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self._parser.error(f"--config {path}: not TOML: {error}")

    def _converted(self, action: argparse.Action, value: object, where: str) -> object:
        """`value` as the flag would have it."""
        if action.nargs == 0:
            return action.const if self._switch(value, where) else action.default
        if isinstance(value, bool | list | dict):
            self._parser.error(f"{where} = {json.dumps(value)}: takes one value, such as a number or a string")
        convert: Callable[[str], object] = action.type if callable(action.type) else str
        try:
            converted = convert(str(value))
        except argparse.ArgumentTypeError as error:
            self._parser.error(f"{where}: {error}")
        except (TypeError, ValueError):
            self._parser.error(f"{where} = {value!r}: not of type {getattr(convert, '__name__', 'number')}")
        if action.choices is not None and converted not in action.choices:
            self._parser.error(f"{where} = {value!r}: choose from {', '.join(map(str, action.choices))}")
        return converted

    def _switch(self, value: object, where: str) -> bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if str(value).lower() not in known:
            self._parser.error(f"{where} = {value!r}: give true or false")
        return known[str(value).lower()]


def print_settings(settings: Sequence[Setting]) -> None:
    """Print a TOML file that gives the same settings; each line says where its value came from."""
    for setting in settings:
        left = f"# {setting.name} =" if setting.value is None else f"{setting.name} = {_toml(setting.value)}"
        print(f"{left:<48}  # {setting.source}")


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1].lstrip("-")


def _shown(action: argparse.Action, value: object) -> object:
    """Value as in a file: a switch is true where it is given, whatever that sets."""
    return value == action.const if action.nargs == 0 else value


def _toml(value: object) -> str:
    """A basic string, a number or a truth value: JSON writes them as TOML does."""
    return printable_json(value.value if isinstance(value, Enum) else value)
