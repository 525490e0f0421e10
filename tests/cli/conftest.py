"""Runs the command line in this process, as the console script would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from hsrpc.cli.main import main

torch.set_num_threads(1)

SMALL = ("--device=cpu", "--gpu-memory=13MiB", "--host-memory=64MiB", "--max-model-len=96", "--max-prefill-tokens=16")
"""The bundled model with a device budget that its weights do not fit in."""


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
