"""A client's program: requests as lines in, results as lines out."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from pathlib import Path
from typing import IO

from clients.conformance.result import Json, Result

_END_SECONDS = 20
_NO_WAY = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
"""A proxy that is not there: a client reaches a server on its own machine without one."""


class ProgramError(Exception):
    """The program ended, said nothing in time, or said what is no answer."""


class Program:
    """One running `build/conformance`; started again by the next request after it has failed one."""

    def __init__(self, path: Path, log: Path) -> None:
        self._path = path
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, request: Json) -> None:
        """Send a request, to which `answer` is to be read."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._failed(f"ended with {process.wait()}") from None

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def answer(self, name: str, seconds: float) -> list[Result]:
        """Results of the request of that id.

        Raises:
            ProgramError: there is none in time, or it is no answer.
        """
        assert self._process is not None
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise self._failed(f"no answer in {seconds:.0f} s") from None
        if not line:
            raise self._failed(f"ended with {self._process.wait()}")
        try:
            answer = json.loads(line)
            if answer["id"] != name:
                raise ValueError(f"the id is {answer['id']!r}, not {name!r}")
            return [Result.read(entry) for entry in answer["results"]]
        except (ValueError, TypeError, KeyError) as error:
            raise self._failed(f"no answer as the protocol has it ({error!r}): {line[:1000]}") from None

    def close(self) -> None:
        """End of input, upon which it must exit with 0.

        Raises:
            ProgramError: it does not.
        """
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        process.stdin.close()
        try:
            code = process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ProgramError(f"still there {_END_SECONDS} s after the end of its input") from None
        if code != 0:
            raise ProgramError(f"ended with {code} after the end of its input")

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [self._path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | _NO_WAY,
                text=True,
                encoding="utf-8",
            )
        assert self._process.stdout is not None
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._process

    def _failed(self, problem: str) -> ProgramError:
        """The error, with what the program said last to people; the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        said = self._log.read_text(encoding="utf-8", errors="replace")[-1500:].strip()
        return ProgramError(f"{problem}; its stderr: {said or 'nothing'}")


def _read_lines(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    """Each line, and an empty one at the end."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")
