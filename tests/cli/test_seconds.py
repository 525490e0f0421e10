"""Every option and every setting that takes seconds: what it refuses, and what it says of 0."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields

import pytest

from hsrpc.cli.main import build_parser
from hsrpc.cli.options import SecondsOption
from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.server.config import ServerConfig
from hsrpc.server.security import SecurityConfig

NO_TIMES = ("-1", "-0.001", "-1e-9", "nan", "inf", "-inf", "1e300", "1e7", "soon", "")
NAMED_AS_TIME = re.compile(r"[-_](timeout|time|age|delay|interval|duration|goal|seconds)$")


def options(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    """All options of all commands, each with its command's words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from options(command, (*path, name))
        elif action.option_strings:
            yield path, action


TIMES = [
    pytest.param(path, action, id=" ".join((*path, action.option_strings[-1])))
    for path, action in options(build_parser())
    if isinstance(action.type, SecondsOption)
]


def test_whatever_takes_seconds_has_their_type() -> None:
    """An option that is named as a time is, or whose value is called SECONDS, is in the tables below."""
    found = list(options(build_parser()))
    assert len(TIMES) >= 10
    for path, action in found:
        named = bool(NAMED_AS_TIME.search(action.option_strings[-1])) or action.metavar == "SECONDS"
        assert named == isinstance(action.type, SecondsOption), (path, action.option_strings)
        assert named == (action.metavar == "SECONDS"), (path, action.option_strings)


@pytest.mark.parametrize(("path", "action"), TIMES)
def test_what_is_no_time_is_refused(hsrpc, path, action) -> None:
    """Negative, not a number, without end, or beyond what a timer takes: one line that names option, value, range."""
    [flag] = action.option_strings
    for text in NO_TIMES:
        ran = hsrpc(*path, f"{flag}={text}")
        assert (ran.code, ran.out) == (2, ""), text
        [line] = ran.err.splitlines()
        assert f"argument {flag}: {text!r} is not a time that it may be; give seconds, {action.type.allowed}" in line


@pytest.mark.parametrize(("path", "action"), TIMES)
def test_zero_is_refused_or_explained(hsrpc, path, action) -> None:
    """Where 0 is taken, help says what it does; elsewhere it is refused, as is what is as good as 0."""
    allowed, [flag] = action.type.allowed, action.option_strings
    if 0 in allowed:
        assert action.type("0") == 0
        said = re.search(r"\b0 (is never|ends them at once|does not wait)|default: 0,", action.help)
        assert said, action.help
        assert allowed.has_never == ("0 is never" in action.help)
    else:
        assert hsrpc(*path, f"{flag}=0").code == 2
    if allowed.low:
        assert hsrpc(*path, f"{flag}={allowed.low / 2}").code == 2
    assert (action.type(str(allowed.low)), action.type(str(allowed.high))) == (allowed.low, allowed.high)
    assert action.default is None or action.default in allowed


def settings() -> list[tuple[type, str]]:
    """The settings of Python that are times."""
    return [
        (kind, field.name)
        for kind in (EngineConfig, ServerConfig, SecurityConfig)
        for field in fields(kind)
        if NAMED_AS_TIME.search(field.name)
    ]


@pytest.mark.parametrize(("kind", "name"), settings(), ids=lambda value: getattr(value, "__name__", value))
def test_a_setting_refuses_what_the_option_does(kind, name) -> None:
    """The dataclasses name the setting that is no time, and of 0 they take what the options take."""
    for value in (-1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ConfigError, match=f"^{name}="):
            kind(**{name: value})
    for value in (0.0, 1e-9):
        takes_zero = name in ("drain_timeout", "max_message_delay") or (name == "max_connection_age" and value == 0)
        if takes_zero:
            assert getattr(kind(**{name: value}), name) == value
        else:
            with pytest.raises(ConfigError, match=f"^{name}="):
                kind(**{name: value})


def test_a_variable_and_a_file_refuse_it_too(hsrpc, monkeypatch, tmp_path) -> None:
    """A time is read in one way, wherever it comes from; TOML has nan and inf of its own."""
    file = tmp_path / "hsrpc.toml"
    for text in ("0", "nan", "inf", "-1"):
        monkeypatch.setenv("HSRPC_WRITE_TIMEOUT", text)
        ran = hsrpc("serve", "--print-config")
        assert (ran.code, f"HSRPC_WRITE_TIMEOUT: {text!r} is not a time" in ran.err) == (2, True)
        monkeypatch.delenv("HSRPC_WRITE_TIMEOUT")
        file.write_text(f"write-timeout = {text}\n")
        ran = hsrpc("serve", "--print-config", "--config", str(file))
        assert (ran.code, f"write-timeout: {text!r} is not a time" in ran.err) == (2, True)
