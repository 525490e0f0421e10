"""Runs the command line in this process, as the console script would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hsrpc.cli.main import main
from hsrpc.client import Client

torch.set_num_threads(1)

SMALL = ("--device=cpu", "--gpu-memory=13MiB", "--host-memory=64MiB", "--max-model-len=96", "--max-prefill-tokens=16")
"""The bundled model with a device budget that its weights do not fit in."""

TALKING = (*SMALL, "--max-model-len=384")
"""With room for a story and questions about it."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def hsrpc(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`hsrpc("plan", "--json")` is what a shell does for `hsrpc plan --json`."""

    def run(*arguments: str) -> Ran:
        capfd.readouterr()
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            code = end.code
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """A server of the bundled model, in a process of its own."""
    command = [sys.executable, "-m", "hsrpc.cli.main", "serve", "--port=0", *TALKING]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = next(line for line in process.stdout if "listening on" in line).split()[-1]
            with Client(address) as client:
                client.wait_ready(60)
            yield address
        finally:
            process.kill()
