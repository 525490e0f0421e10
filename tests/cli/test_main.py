"""What all commands share: help, exit codes, one line for an error."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from hsrpc import __version__
from hsrpc.cli import generate, info
from hsrpc.cli.main import build_parser

COMMANDS = ("serve", "generate", "chat", "batch", "plan", "convert", "info", "bench", "top")


def examples(text: str) -> list[list[str]]:
    """The arguments of the example commands in a help text, without remarks, pipes and the program's name."""
    lines = [line.strip() for line in text.partition("examples:\n")[2].splitlines()]
    commands = [line[line.index("hsrpc ") :].partition("  ")[0].partition(" | ")[0] for line in lines if line]
    return [shlex.split(command)[1:] for command in commands]


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_shows_examples_that_parse(hsrpc, command):
    """Every help ends with examples, each of which the parser takes."""
    ran = hsrpc(*command, "--help")
    assert (ran.code, ran.err) == (0, "")
    found = examples(ran.out)
    assert len(found) >= 2
    for arguments in found:
        assert arguments[: len(command)] == list(command)
        assert callable(build_parser().parse_args(arguments).run)


def test_help_names_every_command_and_says_what_it_does(hsrpc):
    """`hsrpc --help` lists the commands with a summary each."""
    lines = {line.split()[0]: line.split()[1:] for line in hsrpc("--help").out.splitlines() if line.strip()}
    assert all(len(lines[name]) > 3 for name in COMMANDS)


def test_help_loads_nothing_that_the_client_install_lacks():
    """All helps and --version print without torch, numpy, grpc or any other package of the extras."""
    code = """
import sys
from hsrpc.cli.main import main
for arguments in [["--help"], ["--version"]] + [[name, "--help"] for name in sys.argv[1:]]:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
names = ("torch", "numpy", "transformers", "tokenizers", "grpc", "uvloop", "rich", "tqdm", "matplotlib")
sys.exit(" ".join(name for name in names if name in sys.modules) or 0)
"""
    command = [sys.executable, "-c", code, *COMMANDS]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr.strip()) == (0, "")


def test_version(hsrpc):
    """--version prints the package's version."""
    assert hsrpc("--version").out == f"hsrpc {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "COMMAND"),
        (("frobnicate",), "'frobnicate' (choose from"),
        (("generate", "--frob", "hi"), "--frob; see `hsrpc generate --help`"),
        (("generate", "Once", "upon"), "unrecognized arguments: upon"),
        (("generate",), "PROMPT --token-ids is required"),
        (("generate", "--token-ids", "5", "hi"), "not allowed with argument"),
        (("generate", "--temperature", "hot", "hi"), "--temperature: invalid float value: 'hot'"),
        (("generate", "--max-tok", "5", "hi"), "--max-tok"),
        (("info", "--dtype", "int3"), "(choose from 'auto', 'float32', 'float16', 'bfloat16')"),
        (("serve", "--port", "http"), "--port: invalid int value: 'http'"),
        (("serve", "--shutdown-timeout", "-1"), "'-1' is not a time that it may be; give seconds, 0 to 1000000"),
        (("serve", "--shutdown-timeout", "soon"), "--shutdown-timeout: 'soon' is not a time"),
        (("convert", "here"), "DST"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_use_is_one_line_and_exits_with_2(hsrpc, arguments, named):
    """What the parser refuses is named in one line that says where help is."""
    ran = hsrpc(*arguments)
    assert (ran.code, ran.out) == (2, "")
    [line] = ran.err.splitlines()
    assert line.startswith("hsrpc")
    assert "error: " in line
    assert named in line
    assert "--help`" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("generate", "--gpu-memory", "5x", "hi"),
            "gpu_memory='5x': not a positive size in bytes; write it like",
        ),
        (("plan", "--host-memory", "0"), "host_memory='0': not a positive size"),
        (
            ("plan", "--activation-share", "0.5"),
            "activation_share=0.5: has no meaning with cache_policy=auto; use",
        ),
        (("info", "--cache-policy=hybrid", "--activation-share=2"), "activation_share=2.0: outside [0, 1]; give"),
        (("info", "--recompute-share=2"), "recompute_share=2.0: outside [0, 1]; give"),
        (("info", "--cache-policy=recompute", "--recompute-share=0"), "recompute_share=0.0: has no meaning with"),
        (("plan", "--min-batch=9", "--max-batch=8"), "min_batch=9: more than max_batch=8; give at most that"),
        (("info", "--max-batch", "0"), "max_batch=0: not a positive whole number; give 1 or more"),
        (("serve", "--print-config", "--port", "99999"), "port=99999: not a port; give 0 to 65535"),
        (("plan", "--model", "random:gpt-9"), "'gpt-9' is not a known shape; use one of opt-125m"),
        (("info", "--model", "./no-such-model"), "'./no-such-model' is not a directory; give a directory, or a hub id"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_one_line_and_exits_with_1(hsrpc, arguments, message):
    """The line names the setting, its value and the remedy."""
    ran = hsrpc(*arguments)
    assert (ran.code, ran.out) == (1, "")
    [line] = ran.err.splitlines()
    assert line.startswith(f"hsrpc: error: {message}")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "hsrpc: error: [Errno 28] No space left on device\n"),
    ],
    ids=["Ctrl-C", "a full disk"],
)
def test_what_the_system_does_is_no_traceback(hsrpc, monkeypatch, error, code, message):
    """Ctrl-C exits with 130, a failing system call with 1 and the system's words."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(info, "run", fail)
    ran = hsrpc("info")
    assert (ran.code, ran.err) == (code, message)


def test_a_missing_extra_is_named(hsrpc, monkeypatch):
    """Without the engine's packages, the message says what to install."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    ran = hsrpc("generate", "hi")
    assert (ran.code, ran.err) == (1, "hsrpc: error: uvloop is not installed; pip install 'hsrpc[engine,plot]'\n")


def test_a_fault_of_hsrpc_itself_is_not_hidden(hsrpc, monkeypatch):
    """An unforeseen exception keeps its traceback: it is ours to mend."""

    def fail(_: object) -> None:
        raise ModuleNotFoundError("no module", name="hsrpc.engine")

    monkeypatch.setattr(generate, "run", fail)
    with pytest.raises(ModuleNotFoundError):
        hsrpc("generate", "hi")


def test_a_closed_pipe_ends_quietly():
    """`hsrpc info | head -0` prints no traceback and exits as a program that SIGPIPE ended."""
    code = "import os, sys; from hsrpc.cli import info, main; info.run = lambda _: print('x' * 100_000)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code + "sys.exit(main.main(['info']))"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(30)) == (b"", 141)
    process.stderr.close()


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The end to write to of a pipe that has no room and is not read."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with suppress(BlockingIOError):
        while True:
            os.write(theirs, bytes(4096))
    os.set_blocking(theirs, True)
    yield theirs
    os.close(theirs)
    os.close(ours)


@pytest.mark.parametrize(("arguments", "code"), [(("info", "--max-batch=0"), 1), (("info", "--frob"), 2)])
def test_an_error_that_nobody_reads_holds_up_no_end(full_pipe, arguments, code):
    """The line is given up, and the exit code is that of the error."""
    command = [sys.executable, "-m", "hsrpc.cli.main", *arguments]
    assert subprocess.run(command, check=False, stderr=full_pipe, timeout=20).returncode == code


def test_an_error_where_standard_error_is_closed():
    """It goes nowhere, neither to standard output nor as a second error."""
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "hsrpc.cli.main", "info", "--max-batch=0"]
    ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, timeout=20)
    assert (ran.returncode, ran.stdout) == (1, b"")


def test_the_end_collects_no_garbage():
    """What there is as the process ends goes with it; the interpreter does not look through it before."""
    code = (
        "import atexit, gc; from hsrpc.cli.main import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000))\n"
        "main(['info', '--help'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "True True"
