"""Runs the lines of a batch: so many requests at a time, each line written once all of its requests have ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import Protocol
from uuid import uuid4

from hsrpc.batch.answer import Answer, Output, output_line
from hsrpc.batch.call import Call
from hsrpc.batch.caller import Caller, seed_for
from hsrpc.batch.order import Job
from hsrpc.batch.refusal import Fault, Refusal
from hsrpc.errors import HsrpcError
from hsrpc.source import Source


class Results(Protocol):
    """Takes the lines of output as they come."""

    def put(self, line: bytes, *, is_error: bool) -> None:
        """Take a line, which is on its way to a file then.

        Raises:
            OSError: one before it could not be written.
        """
        ...


@dataclass(slots=True)
class Tally:
    """What a run has done so far."""

    lines: int = 0
    """Lines that were written, those in error among them."""
    errors: int = 0
    requests: int = 0
    """Requests whose outputs are in lines that were written."""
    prompt_tokens: int = 0
    """Tokens of all these requests' prompts: a prompt with several outputs counts with each."""
    cached_tokens: int = 0
    """Those of them that were found in blocks of other requests, and not computed."""
    completion_tokens: int = 0
    longest: int = 0
    """Most tokens of one of them, prompt and output."""

    def add(self, answer: Answer) -> None:
        """Count the requests of a line."""
        for output in answer.outputs:
            usage = output.finish.usage
            self.requests += 1
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens
            self.completion_tokens += usage.completion_tokens
            self.longest = max(self.longest, usage.prompt_tokens + usage.completion_tokens)


@dataclass(slots=True, eq=False)
class _Work:
    """A line that runs."""

    job: Job
    call: Call
    request_id: str = field(default_factory=lambda: uuid4().hex)
    outputs: dict[int, Output] = field(default_factory=dict)
    refusal: Refusal | None = None

    @property
    def is_done(self) -> bool:
        return self.refusal is not None or len(self.outputs) == self.call.num_requests


class Runner:
    """Sends lines to `source` and their outputs to `results`. With a `seed` a line has the same seeds in every run."""

    def __init__(
        self,
        source: Source,
        results: Results,
        *,
        concurrency: int,
        seed: int | None = None,
        retry_seconds: float = 300.0,
        note: Callable[[Tally], object] = lambda _: None,
    ) -> None:
        self.tally = Tally()
        self._caller = Caller(source, retry_seconds)
        self._results = results
        self._slots = asyncio.Semaphore(concurrency)
        self._seed = seed
        self._note = note

    async def run(self, windows: Iterator[list[Job]]) -> None:
        """Run all lines to their ends. Cancelled, it ends the requests that run; what is done was given to the results.

        Raises:
            HsrpcError, OSError: the batch cannot go on.
        """
        try:
            async with asyncio.TaskGroup() as group:
                async for jobs in _read_ahead(windows):
                    for job in jobs:
                        await self._start(job, group)
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _start(self, job: Job, group: asyncio.TaskGroup) -> None:
        """Begin a line, once there are places for its requests."""
        call = job.task
        refusal = await self._caller.check_model(call) if isinstance(call, Call) else call
        if not isinstance(call, Call) or refusal is not None:
            assert refusal is not None  # what is no call is one
            self._write(job, refusal, uuid4().hex)
            return
        work = _Work(job, call)
        for index in range(call.num_requests):
            await self._slots.acquire()
            group.create_task(self._request(work, index))

    async def _request(self, work: _Work, index: int) -> None:
        try:
            if work.is_done:  # another of its requests was refused
                return
            seed = seed_for(self._seed, work.job.line.id)
            found = await self._caller.output(work.call, index, seed, work.request_id)
            if work.is_done:
                return
            if isinstance(found, Refusal):
                work.refusal = found
            else:
                work.outputs[index] = found
            if work.is_done:
                self._write(work.job, work.refusal or await self._answer(work), work.request_id)
        finally:
            self._slots.release()

    async def _answer(self, work: _Work) -> Answer | Refusal:
        outputs = [output for _, output in sorted(work.outputs.items())]
        return await self._caller.answer(work.call, outputs, work.request_id)

    def _write(self, job: Job, result: Answer | Refusal | Fault, request_id: str) -> None:
        is_error = not isinstance(result, Answer)
        self._results.put(output_line(job.line, result, request_id), is_error=is_error)
        self.tally.lines += 1
        self.tally.errors += is_error
        if isinstance(result, Answer):
            self.tally.add(result)
        self._note(self.tally)


async def _read_ahead(windows: Iterator[list[Job]]) -> AsyncIterator[list[Job]]:
    """The windows, of which the next is read while one runs."""
    coming = _read(windows)
    while (jobs := await coming) is not None:
        coming = _read(windows)
        yield jobs


def _read(windows: Iterator[list[Job]]) -> asyncio.Future[list[Job] | None]:
    """The next window; on a daemon thread, as whoever ends must not wait for what standard input may never bring."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Job] | None] = loop.create_future()

    def deliver(jobs: list[Job] | None, error: Exception | None) -> None:
        if future.done():  # cancelled
            return
        if error is None:
            future.set_result(jobs)
        else:
            future.set_exception(error)

    def read() -> None:
        jobs, error = None, None
        try:
            jobs = next(windows, None)
        except Exception as found:
            error = found
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(deliver, jobs, error)

    Thread(target=read, name="hsrpc-batch-input", daemon=True).start()
    return future


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """An error of a group, the gravest: what nobody foresaw before what hsrpc raises on purpose."""
    found = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in errors.exceptions]
    return min(found, key=lambda error: isinstance(error, HsrpcError | OSError))
