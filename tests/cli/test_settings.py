"""Settings from flags, HSRPC_* variables and a TOML file."""

from __future__ import annotations

import argparse
import os
import tomllib
from pathlib import Path

import pytest

from hsrpc.cli.main import build_parser
from hsrpc.cli.options import Parser
from hsrpc.cli.settings import add_settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the surroundings."""
    for name in [name for name in os.environ if name.startswith("HSRPC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "hsrpc.toml"


def sources(options: argparse.Namespace) -> dict[str, str]:
    return {setting.name: setting.source.value for setting in options.settings}


def test_flag_over_environment_over_file_over_default(monkeypatch, file):
    """The first of the four that has a value wins, and is named."""
    file.write_text('port = 1\nhost = "::1"\nmax-batch = 3\nlog_prompts = true\n')
    monkeypatch.setenv("HSRPC_PORT", "2")
    monkeypatch.setenv("HSRPC_HOST", "10.0.0.1")
    options = build_parser().parse_args(["serve", "--config", str(file), "--port", "3"])
    assert (options.port, options.host, options.max_batch, options.block_size) == (3, "10.0.0.1", 3, 16)
    assert options.log_prompts is True
    found = sources(options)
    names = ("port", "host", "max-batch", "log-prompts", "block-size")
    assert [found[name] for name in names] == ["flag", "environment", "file", "file", "default"]


def test_a_flag_with_the_default_value_wins(monkeypatch):
    """A flag counts because it was given, not because it differs."""
    monkeypatch.setenv("HSRPC_PORT", "2")
    options = build_parser().parse_args(["serve", "--port", "50051"])
    assert (options.port, sources(options)["port"]) == (50051, "flag")


def test_the_file_may_be_named_by_a_variable(monkeypatch, file):
    """HSRPC_CONFIG is --config."""
    file.write_text("port = 7\n")
    monkeypatch.setenv("HSRPC_CONFIG", str(file))
    assert build_parser().parse_args(["serve"]).port == 7


def test_every_flag_is_a_setting():
    """Nothing has to be listed twice: the settings are the parser's options."""
    parser = build_parser().parse_args(["serve"]).parser
    flags = {option.lstrip("-") for action in parser.options() for option in action.option_strings}
    assert set(sources(build_parser().parse_args(["serve"]))) == flags - {"config", "print-config"}


def test_what_is_printed_is_a_file_of_the_same_settings(hsrpc, monkeypatch, file):
    """--print-config prints TOML that gives the same again, and loads no model."""
    monkeypatch.setenv("HSRPC_MODEL", 'no such model " # é')
    first = hsrpc("serve", "--print-config", "--port=1", "--max-step-time=0.5", "--log-prompts", "--log-format=json")
    assert (first.code, first.err) == (0, "")
    lines = {line.split(" =")[0].lstrip("# "): line.rpartition("# ")[2] for line in first.out.splitlines()}
    picked = ("model", "port", "max-batch", "log-prompts")
    assert [lines[name] for name in picked] == ["environment", "flag", "default", "flag"]
    settings = tomllib.loads(first.out)
    assert (settings["port"], settings["max-step-time"], settings["log-prompts"]) == (1, 0.5, True)
    monkeypatch.delenv("HSRPC_MODEL")
    file.write_text(first.out)
    second = hsrpc("serve", "--print-config", "--config", str(file))
    assert tomllib.loads(second.out) == settings


def test_a_setting_that_is_wrong_is_refused_before_it_is_printed(hsrpc):
    """--print-config checks as starting would."""
    ran = hsrpc("serve", "--print-config", "--port=70000")
    assert (ran.code, ran.out) == (1, "")
    assert "port=70000: not a port" in ran.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot is no setting; did you mean port?"),
        ("max-batch = 8\nmax_batch = 9", "max-batch and max_batch are one setting; give it once"),
        ("max_queued-tokens = 1\nmax-queued_tokens = 1", "max_queued-tokens and max-queued_tokens are one setting"),
        ("[serve]\nport = 1", "serve is no setting; did you mean"),
        ("port = 'http'", "port = 'http': not of type int"),
        ("port = true", "port = true: takes one value"),
        ("port = [1]", "port = [1]: takes one value"),
        ("device = 'tpu'", "device = 'tpu': choose from auto, cuda, cpu"),
        ("log-prompts = 'maybe'", "log-prompts = 'maybe': give true or false"),
        ("shutdown-timeout = -1", "shutdown-timeout: '-1' is not a time"),
        ("print-config = true", "print-config is no setting"),
        ("port =", "not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(hsrpc, file, text, message):
    """It names the file, the key and the remedy, and exits with 2."""
    file.write_text(text)
    ran = hsrpc("serve", "--print-config", "--config", str(file))
    assert (ran.code, ran.out) == (2, "")
    assert str(file) in ran.err
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_a_file_that_is_not_there(hsrpc, file):
    """It is named."""
    assert f"--config {file}: No such file or directory" in hsrpc("serve", "--print-config", "--config", str(file)).err


def test_a_variable_that_is_misspelt_is_refused(hsrpc, monkeypatch):
    """One that is like a setting is refused with the nearest name; one of somebody else's is not ours to judge."""
    monkeypatch.setenv("HSRPC_SERVICE_PORT_GRPC", "50051")
    monkeypatch.setenv("HSRPC_TARGET", "x")
    assert build_parser().parse_args(["serve"]).port == 50051
    monkeypatch.setenv("HSRPC_MAX_BACH", "4")
    ran = hsrpc("serve", "--print-config")
    assert ran.code == 2
    assert "environment variable HSRPC_MAX_BACH is no setting; did you mean HSRPC_MAX_BATCH?" in ran.err


@pytest.mark.parametrize("variable", ["HSRPC_max_batch", "hsrpc_MAX_BATCH", "HSRPC_MAX-BATCH"])
def test_a_variable_has_one_spelling(hsrpc, monkeypatch, variable):
    """Another is refused, with the one that counts beside it or without, so that no value is passed over."""
    monkeypatch.setenv(variable, "4")
    message = f"environment variable {variable} is no setting; did you mean HSRPC_MAX_BATCH?"
    assert message in hsrpc("serve", "--print-config").err
    monkeypatch.setenv("HSRPC_MAX_BATCH", "8")
    assert message in hsrpc("serve", "--print-config").err


def test_a_misspelt_name_of_the_file_is_refused(hsrpc, monkeypatch, file):
    """HSRPC_CONFIG has one spelling too."""
    monkeypatch.setenv("HSRPC_config", str(file))
    assert "HSRPC_config is no setting; did you mean HSRPC_CONFIG?" in hsrpc("serve", "--print-config").err


def test_a_setting_has_one_flag():
    """No flag has a second spelling, so that none can be given twice under two; nor do two flags set one thing."""
    options = build_parser().parse_args(["serve"]).parser.options()
    assert [action.option_strings for action in options if len(action.option_strings) != 1] == []
    assert len({action.dest for action in options}) == len(options)


def test_a_variable_of_a_wrong_type_names_itself(hsrpc, monkeypatch):
    """What Kubernetes puts into HSRPC_PORT for a service of that name is no port."""
    monkeypatch.setenv("HSRPC_PORT", "tcp://10.0.0.1:50051")
    assert "HSRPC_PORT = 'tcp://10.0.0.1:50051': not of type int" in hsrpc("serve", "--print-config").err


def test_a_switch_that_turns_off(file):
    """A flag that stores False is true in a file where it is given."""
    parser = Parser(prog="x")
    parser.add_argument("--no-reflection", dest="reflection", action="store_false")
    add_settings(parser)
    file.write_text("no-reflection = true\n")
    options = parser.parse_args(["--config", str(file)])
    assert (options.reflection, options.settings[0].value) == (False, True)
    assert (parser.parse_args([]).reflection, parser.parse_args([]).settings[0].value) == (True, False)
