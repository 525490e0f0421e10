"""hsrpc serve: what is printed, what signals do, and what keeps it from starting."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import pytest

from hsrpc.client import CallError, Client
from hsrpc.request import FinishReason
from tests.cli.conftest import SMALL

PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Served:
    """A serving process and a client of it."""

    process: subprocess.Popen[str]
    client: Client


@contextmanager
def served(*flags: str) -> Iterator[Served]:
    """`hsrpc serve` on a free port, ready."""
    command = [sys.executable, "-m", "hsrpc.cli.main", "serve", "--port=0", "--device=cpu", *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            prefix, _, address = process.stdout.readline().strip().rpartition(" ")
            assert prefix == "listening on"
            with Client(address) as client:
                client.wait_ready(120)
                yield Served(process, client)
        finally:
            process.kill()


def test_sigterm_drains(hsrpc):
    """The service gives what generate prints; SIGTERM lets a running stream end, refuses others, and exits with 0."""
    flags = ("--gpu-memory=64MiB", "--host-memory=64MiB", "--max-model-len=384", "--shutdown-timeout=60")
    with served(*flags) as server:
        text = server.client.complete(PROMPT, temperature=0, max_tokens=24).text
        assert text + "\n" == hsrpc("generate", *SMALL, "--temperature=0", "--max-tokens=24", PROMPT).out
        with server.client.generate(PROMPT, ignore_eos=True, seed=1) as stream:
            deltas = [next(stream)]
            server.process.send_signal(signal.SIGTERM)
            assert refusal(server.client).code is grpc.StatusCode.UNAVAILABLE
            deltas += stream
        assert deltas[-1].finish.reason in (FinishReason.CONTEXT_LENGTH, FinishReason.MAX_TOKENS)
        assert deltas[-1].finish.usage.completion_tokens > 300
        assert server.process.wait(30) == 0
        assert server.process.stdout.read() == ""
        assert "Traceback" not in server.process.stderr.read()


def refusal(client: Client) -> CallError:
    """The error of new requests, once there is one."""
    for _ in range(200):
        try:
            client.complete(PROMPT, max_tokens=1)
        except CallError as error:
            return error
        time.sleep(0.005)
    pytest.fail("requests are still taken")


def test_the_second_signal_exits():
    """A second signal ends the process at once, whatever runs."""
    with served(*SMALL, "--max-model-len=512", "--gpu-memory=20MiB", "--shutdown-timeout=60") as server:
        streams = [server.client.generate(PROMPT, ignore_eos=True) for _ in range(16)]
        next(streams[0])
        server.process.send_signal(signal.SIGINT)
        refusal(server.client)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.process.wait(30) == 128 + signal.SIGTERM
        assert time.monotonic() - started < 10
        with pytest.raises(CallError):
            list(streams[-1])
        assert "Traceback" not in server.process.stderr.read()


def test_a_signal_before_the_port_is_open():
    """While Python still loads the engine, SIGTERM ends the process with its code, and others leave it alone."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'hsrpc.engine.engine':\n"
        "            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):\n"
        "                os.kill(os.getpid(), number)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from hsrpc.cli.main import main\n"
        "sys.exit(main(['serve', '--port=0']))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (128 + signal.SIGTERM, "", "")


def test_a_budget_that_is_too_small_exits_with_1(hsrpc):
    """The port is open while the model loads; what keeps it from loading is the last line."""
    ran = hsrpc("serve", "--port=0", *SMALL, "--gpu-memory=1KiB")
    assert ran.code == 1
    assert ran.out.startswith("listening on 127.0.0.1:")
    assert ran.err.startswith("hsrpc: error: gpu_memory='1.0 KiB': too small for a context of 96: ")
    assert ran.err.count("\n") == 1


def test_a_port_in_use(hsrpc):
    """The address that cannot be bound is named before any model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = hsrpc("serve", f"--port={port}", *SMALL)
    problem = f"port='127.0.0.1:{port}': cannot be bound; take an address of this machine and a free port"
    assert (ran.code, ran.out, ran.err.splitlines()[-1]) == (1, "", f"hsrpc: error: {problem}")
