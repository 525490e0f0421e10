"""Programs that do not keep to the protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clients.conformance.program import Program, ProgramError

RESULT = {
    **{"text": "Hi", "deltas": 1, "token_ids": [], "logprobs": [], "prompt_tokens": 1, "completion_tokens": 1},
    **{"finish_reason": None, "stop_string": None, "cancelled": False, "error": None},
}
ANSWER = json.dumps({"id": "it", "results": [RESULT]})


@pytest.fixture
def program(tmp_path: Path):
    """Makes a program of a shell script; each line of input is read by the script itself."""

    def make(script: str) -> Program:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return Program(path, tmp_path / "log")

    return make


def test_one_that_answers(program):
    """Each request in turn, until the end of its input."""
    good = program(f"while read -r line; do echo '{ANSWER}'; done")
    for _ in range(2):
        good.ask({"id": "it"})
        assert good.answer("it", 10)[0].text == "Hi"
    good.close()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("read -r line; echo too bad >&2; exit 3", "ended with 3; its stderr: too bad"),
        ("read -r line; echo nonsense; read -r line", "no answer as the protocol has it .*nonsense"),
        (f"read -r line; echo '{ANSWER.replace('it', 'other')}'; read -r line", "the id is 'other', not 'it'"),
        (f"read -r line; echo '{ANSWER.replace('deltas', 'delta')}'; read -r line", "KeyError\\('deltas'\\)"),
        ("read -r line; read -r line", "no answer in 0 s"),
    ],
)
def test_one_that_does_not(program, script, problem):
    """What it did is told, and the next request starts it again."""
    bad = program(script)
    for _ in range(2):
        bad.ask({"id": "it"})
        with pytest.raises(ProgramError, match=problem):
            bad.answer("it", 0.4 if "in 0 s" in problem else 10)
    bad.close()


def test_one_that_ends_badly(program):
    """The end of its input is no failure."""
    bad = program(f"read -r line; echo '{ANSWER}'; read -r line; exit 4")
    bad.ask({"id": "it"})
    bad.answer("it", 10)
    with pytest.raises(ProgramError, match="ended with 4 after the end of its input"):
        bad.close()
