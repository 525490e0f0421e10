"""Flags with which a command reaches a server."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hsrpc.cli.connection import add_connection_options, connection_settings
from hsrpc.errors import ConfigError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_connection_options(parser, target="127.0.0.1:50051", target_help="this machine")
    return parser.parse_args(arguments)


def test_nothing_is_set_without_flags():
    """A server on this machine, without TLS and without a token."""
    options = parse()
    assert options.target == "127.0.0.1:50051"
    assert set(connection_settings(options).values()) == {None}


def test_the_token_comes_from_its_file(tmp_path: Path):
    """The newline that editors leave behind does not count."""
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    assert connection_settings(parse("--token-file", str(file)))["token"] == "0123456789abcdef"


@pytest.mark.parametrize("content", ["", "\n", "two words", "ümlaut-0123456789"])
def test_a_file_that_is_no_token_is_refused(content: str, tmp_path: Path):
    """The message names the file, and not what is in it."""
    file = tmp_path / "token"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="not a token alone") as caught:
        connection_settings(parse("--token-file", str(file)))
    assert content.strip() not in str(caught.value) or not content.strip()


def test_a_certificate_needs_its_key():
    """One without the other is refused."""
    with pytest.raises(ConfigError, match="go together"):
        connection_settings(parse("--tls-cert", "me.pem"))
