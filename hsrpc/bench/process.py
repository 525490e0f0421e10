"""Processes of their own, so that load and service do not share an interpreter."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from hsrpc.errors import HsrpcError

_STOP_SECONDS = 60.0
_JOIN_SECONDS = 10.0


@contextmanager
def connected(function: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """Our end of a pipe to `function` in a process: it gets the other end and `arguments`, and ends when sent None."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(None)
        process.join(_JOIN_SECONDS)
    finally:
        process.kill()
        process.join()


class ServerProcessError(HsrpcError):
    """The server did not come up; its messages are on standard error."""


class ServerProcess:
    """`hsrpc serve` with the given arguments: listening once made, stopped on exit.

    `program` is what Python is told to run: `hsrpc`, or a script that becomes it.

    Raises:
        ServerProcessError: on construction, when the server ends before it listens.
    """

    def __init__(
        self, arguments: Sequence[str], *, port: int = 0, program: Sequence[str] = ("-m", "hsrpc.cli.main")
    ) -> None:
        command = [
            sys.executable,
            *program,
            "serve",
            "--port",
            str(port),
            "--log-level=warning",
            *arguments,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 own arguments
        self.address = self._read_address()
        self.port = int(self.address.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: nothing is drained."""
        self._process.kill()
        self.wait()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL where that does not help; the exit code."""
        self._process.terminate()
        try:
            return self.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, within `timeout` s.
        """
        code = self._process.wait(timeout)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def _read_address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("listening on "):
                return line.removeprefix("listening on ").strip()
        raise ServerProcessError(f"hsrpc serve ended with {self.wait()} before it listened")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
