"""Commands whose output goes to a terminal that is not UTF-8."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from hsrpc.cli.main import main
from hsrpc.engine.engine import Engine
from hsrpc.request import Delta, Finish, FinishReason, Timings, Usage
from tests.cli.conftest import SMALL

TEXT = "naïve café 東京 🙂"
ENCODINGS = ("ascii", "cp1252", "latin-1")


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """What a command that ends well prints to a standard output of an encoding."""

    def run(encoding: str, *arguments: str) -> bytes:
        output = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, encoding=encoding))
        assert main(arguments) == 0
        sys.stdout.flush()
        return output.getvalue()

    return run


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says TEXT."""

    async def generate(*_: object, **__: object) -> AsyncIterator[Delta]:
        yield Delta(text=TEXT, finish=Finish(FinishReason.EOS, Usage(1, 1, 0), Timings(0, 0, 0, 0)))

    monkeypatch.setattr(Engine, "generate", generate)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_of_a_model_is_printed_with_replacements(printed, encoding):
    """A question mark stands for each character that the terminal lacks."""
    assert printed(encoding, "generate", *SMALL, "hi") == TEXT.encode(encoding, errors="replace") + b"\n"


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8"])
def test_json_loses_nothing(printed, encoding):
    """It has escapes where the terminal is not UTF-8."""
    output = printed(encoding, "generate", *SMALL, "--json", "hi")
    assert json.loads(output)["text"] == TEXT
    assert (TEXT.encode() in output) == (encoding == "utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_plan_is_printed(printed, encoding):
    """Tables are drawn in what the terminal has."""
    assert b"device memory" in printed(encoding, "plan", *SMALL)


def test_settings_are_printed_as_they_are(printed):
    """A value of --print-config can be read again."""
    output = printed("ascii", "serve", "--print-config", "--model", "café")
    assert b'"caf\\u00e9"' in output


@pytest.mark.parametrize("module", ["hsrpc.cli.main", "hsrpc.cli.demo"])
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_programs_print_any_text(module, environment):
    """Both begin with it, whatever the locale; replaced is what they print themselves."""
    code = (
        f"import runpy, sys, asyncio\nsys.argv = ['hsrpc', 'info']\n"
        "from hsrpc.cli import info, terminal\n"
        f"info.run = lambda _: print({TEXT!a})\n"
        f"def run(main): main.close(); print({TEXT!a})\n"
        "asyncio.run = run\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=os.environ | environment)
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stdout.splitlines()[-1] == TEXT.encode("ascii", errors="replace")


def test_the_environments_choice_counts(monkeypatch):
    """`PYTHONIOENCODING=ascii:backslashreplace` is what a user asked for."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", output)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert output.errors == "backslashreplace"
