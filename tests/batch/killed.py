"""The command `hsrpc batch` over a stub, as a process of its own that a test may kill."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from hsrpc.batch import outputs, progress, run, windows
from hsrpc.cli import batch, batch_report
from hsrpc.cli.main import main
from hsrpc.request import Delta
from tests.batch.support import StubSource

LOADED = (batch_report, outputs, progress, run, windows)
"""By the server of processes, before it forks: each then begins at once."""
SECONDS = 0.001
"""That a request takes."""


class Told(StubSource):
    """Says so when the first request has ended."""

    def __init__(self, told: Connection) -> None:
        super().__init__(seconds=SECONDS)
        self._told = told
        self._is_first = True

    async def generate(self, *arguments: Any) -> AsyncGenerator[Delta, None]:
        async for delta in super().generate(*arguments):
            yield delta
        if self._is_first:
            self._is_first = False
            self._told.send("the first request has ended")


def run_batch(arguments: Sequence[str], told: Connection) -> None:
    """What a shell does for `hsrpc batch ARGUMENTS`; says through `told` that it begins, and that lines come."""

    @contextmanager
    def running_stub(_: argparse.Namespace, **__: object) -> Iterator[tuple[Any, StubSource]]:
        with asyncio.Runner() as runner:
            yield runner.run, Told(told)

    batch.running_source = running_stub  # type: ignore[assignment]
    outputs.GATHER_SECONDS = 0.01
    told.send("it begins")
    sys.exit(main(["batch", *arguments, "--target", "nowhere:1"]))
