"""What an input holds, counted without running any."""

from __future__ import annotations

import pytest

from hsrpc.batch.count import count_tokens
from hsrpc.batch.ledger import Ledger
from hsrpc.batch.windows import Windows
from hsrpc.errors import EngineUnavailableError, InvalidRequestError
from hsrpc.prompt import Chat, Text, told
from tests.batch.support import MODEL, completion, write_lines


async def tokenize(prompt: str | Text | Chat) -> list[int]:
    if "bad" in told(prompt):
        raise InvalidRequestError("text", "no")
    if "gone" in told(prompt):
        raise EngineUnavailableError("gone")
    return list(map(ord, told(prompt)))


async def serves(name: str) -> bool:
    return name == MODEL


def windows(tmp_path, *lines: object) -> Windows:
    return Windows(str(write_lines(tmp_path / "in.jsonl", lines)), Ledger())


async def test_tokens_of_all_requests(tmp_path):
    """Prompts count with each of their outputs; the longest request is found; what is not bounded is assumed."""
    lines = (
        completion("a", prompt="four", max_tokens=10, n=2),
        completion("b", prompt=["one", [5, 6]], max_tokens=3),
        {
            **completion("c", prompt="x"),
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
        },
    )
    found = await count_tokens(windows(tmp_path, *lines), tokenize, serves, 100)
    rendered = len(told(Chat([{"role": "user", "content": "hi"}])))
    assert (found.lines, found.requests, found.refused, found.unbounded) == (3, 5, 0, 1)
    assert found.prompt_tokens == 4 + 4 + 3 + 2 + rendered
    assert found.output_tokens == 20 + 6 + 100
    assert (found.longest, found.longest_line, found.longest_prompt) == (rendered + 100, 3, rendered)


async def test_what_prompts_share(tmp_path):
    """Each with the one before it, in the order in which they run, and with its own other outputs."""
    lines = (
        completion("a", prompt=[1, 2, 3, 4], max_tokens=1),
        completion("b", prompt=[[1, 2, 3], [1, 2, 5, 6]], max_tokens=1, n=2),
        completion("c", prompt=[7], max_tokens=1),
    )
    found = await count_tokens(windows(tmp_path, *lines), tokenize, serves, 100)
    assert found.shared_tokens == 3 + 3 + 2 + 4


async def test_what_would_be_refused(tmp_path):
    """Is counted, and the first are told by line."""
    lines = (b"oops", completion("a", model="no"), completion("b", suffix="."), completion("c", prompt="bad"))
    found = await count_tokens(windows(tmp_path, *lines), tokenize, serves, 100)
    assert (found.lines, found.refused, found.requests) == (4, 4, 0)
    assert len(found.problems) == 3
    assert any(problem.startswith("line 1: not JSON") for problem in found.problems)


async def test_a_failure_that_is_no_refusal(tmp_path):
    """Ends the count."""
    with pytest.raises(EngineUnavailableError):
        await count_tokens(windows(tmp_path, completion("a", prompt="gone")), tokenize, serves, 100)
