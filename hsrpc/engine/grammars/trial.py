"""Compiles the constraints of strangers in a process of its own first: one that takes too long ends with it alone.

Most of what llguidance does for a constraint it bounds itself, but not all: an intersection of twenty expressions takes
ten seconds, and of more for ever; a chain of thousands of rules needs more stack than a thread has.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import hsrpc
from hsrpc.constraint import Constraint
from hsrpc.engine.grammars.notation import compilable, read_constraint
from hsrpc.errors import InvalidRequestError

MAX_SECONDS = 2.0
"""Seconds of a processor, to compile a constraint."""
STACK_BYTES = 256 * 1024**2
"""Stack of a thread that compiles, bytes: enough for what 128 KiB can nest."""
_MAX_MEMORY = 2 * 1024**3
_START = "from hsrpc.engine.grammars.trial import main; main()"
_SIMPLIFY = "make it simpler: fewer and shorter parts, repetitions and intersections"


class Trial:
    """The process, which is started when it is needed. For one thread.

    `max_seconds` of a processor are what a constraint may take.
    """

    def __init__(self, max_seconds: float = MAX_SECONDS) -> None:
        self._max_seconds = max_seconds
        self._process: subprocess.Popen[str] | None = None

    def compilable(self, constraint: Constraint) -> str:
        """The text of a constraint that llguidance can compile within bounds.

        Raises:
            InvalidRequestError: it cannot.
        """
        process = self._running()
        assert process.stdin is not None  # it is a pipe
        assert process.stdout is not None
        process.stdin.write(json.dumps([constraint.field, constraint.text]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer.endswith("\n"):
            raise InvalidRequestError(constraint.field, self._bury(process))
        found = json.loads(answer)
        if "problem" in found:
            raise InvalidRequestError(constraint.field, found["problem"])
        return str(found["notation"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._bury(self._process)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            home = str(Path(hsrpc.__file__).parents[1])
            path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(  # noqa: S603 (this program's own interpreter)
                [sys.executable, "-c", _START, str(self._max_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # it is not told of Ctrl-C
            )
        return self._process

    def _bury(self, process: subprocess.Popen[str]) -> str:
        """Why it has ended."""
        with process:  # closes the pipes and waits
            pass
        self._process = None
        if process.returncode == -signal.SIGVTALRM:
            return f"takes longer than {self._max_seconds:g} s to compile; {_SIMPLIFY}"
        return f"takes too much memory to compile; {_SIMPLIFY}"


def main() -> None:
    """Answer line by line, as `Trial` asks; ends with its standard input."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_answer_all, args=[float(sys.argv[1])])
    thread.start()
    thread.join()


def _answer_all(max_seconds: float) -> None:
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_VIRTUAL, max_seconds)
        answer = _answer(*json.loads(line))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(json.dumps(answer), flush=True)


def _answer(field: str, text: str) -> dict[str, str]:
    try:
        return {"notation": compilable(read_constraint(field, text))}
    except InvalidRequestError as error:
        return {"problem": error.description}
