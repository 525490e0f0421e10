"""How many requests and tokens an input holds, counted without running any."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from hsrpc.batch.call import Call
from hsrpc.batch.order import Job
from hsrpc.batch.refusal import Refusal
from hsrpc.batch.retry import failure_of
from hsrpc.errors import HsrpcError
from hsrpc.prompt import Chat, Prompt, Text

_MAX_TOLD = 3


@dataclass(slots=True)
class Count:
    """What was found in an input."""

    lines: int = 0
    refused: int = 0
    """Lines that would be refused, whatever their length."""
    problems: tuple[str, ...] = ()
    """What is wrong with the first of these."""
    requests: int = 0
    prompt_tokens: int = 0
    """Tokens of all requests' prompts: a prompt with several outputs counts with each."""
    output_tokens: int = 0
    """At most."""
    unbounded: int = 0
    """Requests that give no max_tokens."""
    longest: int = 0
    """Most tokens of a request, prompt and output."""
    longest_line: int = 0
    longest_prompt: int = 0
    shared_tokens: int = 0
    """Tokens of prompts with which the prompt before began as well."""
    _last: Sequence[int] = ()

    def refuse(self, line: int, problem: str) -> None:
        """Count a line that would be refused."""
        self.refused += 1
        if len(self.problems) < _MAX_TOLD:
            self.problems += (problem if problem.startswith("line ") else f"line {line}: {problem}",)

    def add(self, line: int, prompt: Sequence[int], output: int, n: int) -> None:
        """Count `n` requests with one prompt of a line, which has these tokens."""
        size = len(prompt)
        self.requests += n
        self.prompt_tokens += n * size
        self.output_tokens += n * output
        self.shared_tokens += _num_shared(self._last, prompt) + (n - 1) * size
        self._last = prompt
        self.longest_prompt = max(self.longest_prompt, size)
        if size + output > self.longest:
            self.longest, self.longest_line = size + output, line


async def count_tokens(
    windows: Iterable[list[Job]],
    tokenize: Callable[[str | Text | Chat], Awaitable[list[int]]],
    serves: Callable[[str], Awaitable[bool]],
    output: int,
) -> Count:
    """Count all lines; `output` tokens are taken for a request that gives no max_tokens."""
    found = Count()
    for job in _jobs(windows):
        found.lines += 1
        number, task = job.line.number, job.task
        if not isinstance(task, Call):
            found.refuse(number, task.message)
        elif not await serves(task.model):
            found.refuse(number, f"model: {task.model!r} is not served here")
        else:
            await _count(found, number, task, tokenize, output)
    return found


async def _count(
    found: Count,
    number: int,
    call: Call,
    tokenize: Callable[[str | Text | Chat], Awaitable[list[int]]],
    output: int,
) -> None:
    try:
        prompts = [await _token_ids(prompt, tokenize) for prompt in call.prompts]
    except HsrpcError as error:
        failure = failure_of(error, call)
        if not isinstance(failure, Refusal):
            raise
        found.refuse(number, failure.message)
        return
    if call.max_tokens is None:
        found.unbounded += call.num_requests
    for prompt in prompts:
        found.add(number, prompt, call.max_tokens or output, call.n)


async def _token_ids(prompt: Prompt, tokenize: Callable[[str | Text | Chat], Awaitable[list[int]]]) -> Sequence[int]:
    return await tokenize(prompt) if isinstance(prompt, str | Text | Chat) else prompt


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """First tokens of both."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _jobs(windows: Iterable[list[Job]]) -> Iterator[Job]:
    for jobs in windows:
        yield from jobs
