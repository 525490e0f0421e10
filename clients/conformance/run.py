"""Runs the cases against a client's program."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from clients.conformance.cases import Case, Occupied, Pause, Suite, filled_in
from clients.conformance.judge import problems
from clients.conformance.program import Program, ProgramError
from clients.conformance.result import Json, Result
from clients.conformance.servers import RunningServer, Servers, until

_ANSWER_SECONDS = 90
_WAIT_SECONDS = 30
_IDLE_SECONDS = 5
_MAX_FAILURES = 3
"""Cases in a row whose program ends or says nothing, after which the others are not run."""
_BLOCKER_TOKENS = {Occupied.UNTIL_REFUSED: 500, Occupied.THROUGHOUT: 40}
"""Output of the calls that keep a server busy: long ones, so that a refusal comes before the first of them ends, and
short ones, so that the server asks for a short delay."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case went with a language's client."""

    language: str
    case: str
    problems: Sequence[str]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        head = f"{self.language:12} {'ok' if self.passed else 'FAILED':6} {self.seconds:5.1f} s  {self.case}"
        return "\n".join((head, *(f"    {problem}" for problem in self.problems)))


class Runner:
    """Runs a suite's cases, one after the other, against one program at a time."""

    def __init__(self, suite: Suite, servers: Servers, folder: Path) -> None:
        self._suite = suite
        self._servers = servers
        self._folder = folder
        self._references: dict[str, Result] = {}

    def run(self, language: str, path: Path) -> Iterator[Outcome]:
        """Each case's outcome, as it is known."""
        self._servers.start([case.server for case in self._suite.cases])
        program = Program(path, self._folder / f"{language}.log")
        failures = 0
        for case in self._suite.cases:
            begun = time.monotonic()
            found: tuple[str, ...] = ("not run: the program fails each time",)
            if failures < _MAX_FAILURES:
                try:
                    found = tuple(dict.fromkeys(self._problems(case, language, program)))
                    failures = 0
                except ProgramError as error:
                    found, failures = (str(error),), failures + 1
            yield Outcome(language, case.name, found, time.monotonic() - begun)
        try:
            program.close()
        except ProgramError as error:
            yield Outcome(language, "end of input", (str(error),), 0)

    def _problems(self, case: Case, language: str, program: Program) -> Iterator[str]:
        server = self._servers[case.server]
        request = filled_in(case.request, server.direct.tokenize)
        reference = self._reference(case, request, server)
        pause_file = self._folder / f"{language}-{case.name.replace(' ', '-')}"
        busy = server.occupied(_BLOCKER_TOKENS[case.occupied]) if case.occupied else nullcontext()
        with busy:
            num_refusals = server.num_refusals
            program.ask(_line(case, request, server, pause_file))
            if case.pause is not None:
                yield from _paused(case, server, pause_file, program)
            if case.occupied is Occupied.UNTIL_REFUSED:
                until(lambda: server.num_refusals > num_refusals, _WAIT_SECONDS)
            results = program.answer(case.name, _ANSWER_SECONDS) if case.occupied is Occupied.THROUGHOUT else None
        yield from problems(case, results or program.answer(case.name, _ANSWER_SECONDS), reference)
        refused = server.num_refusals - num_refusals
        if refused < case.expect.refusals:
            yield f"the server refused {refused} calls; {case.expect.refusals} or more were to be"

    def _reference(self, case: Case, request: Json, server: RunningServer) -> Result | None:
        """What a direct call gives, made once for all languages."""
        if case.expect.error is not None or case.expect.cancelled:
            return None
        if case.name not in self._references:
            self._references[case.name] = server.direct.generate(request)
        return self._references[case.name]


def _line(case: Case, request: Json, server: RunningServer, pause_file: Path) -> Json:
    return {
        "id": case.name,
        "target": server.address,
        **server.access(case.client),
        "call": case.call,
        "request": request,
        "deadline_s": case.deadline_s,
        "cancel_after": case.cancel_after,
        "streams": case.streams,
        "repeat": case.repeat,
        "pause_file": str(pause_file) if case.pause is not None else None,
    }


def _paused(case: Case, server: RunningServer, pause_file: Path, program: Program) -> Iterator[str]:
    """What is found between two repeats of a case, whose client then goes on."""
    generated = server.direct.num_generated_tokens()
    waiting = pause_file.with_name(f"{pause_file.name}.waiting")
    until(lambda: waiting.exists() or program.has_ended, _WAIT_SECONDS)
    if not waiting.exists():
        yield f"no file {waiting.name} in {_WAIT_SECONDS} s"
    elif case.pause is Pause.RESTART:
        server.restart()
    else:
        yield from _not_idle(case, server, generated)
    pause_file.touch()


def _not_idle(case: Case, server: RunningServer, generated_before: int) -> Iterator[str]:
    if not until(lambda: server.direct.load() == (0, 0), _IDLE_SECONDS):
        yield f"{_IDLE_SECONDS} s after the client left its calls {server.direct.load()} run and wait at the server"
    done = server.direct.num_generated_tokens() - generated_before
    most = case.streams * server.direct.max_model_len() // 2
    if done > most:
        yield f"the server generated {done} tokens for {case.streams} calls that end early; at most {most} were to be"
