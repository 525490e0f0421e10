"""Runs the lines of a batch: so many requests at a time, each line written once all of its requests have ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from threading import Thread
from typing import Protocol
from uuid import uuid4

from hsrpc.batch.answer import Answer, Output, output_line
from hsrpc.batch.call import Call
from hsrpc.batch.order import Job
from hsrpc.batch.refusal import FAILED, Fault, Refusal
from hsrpc.batch.retry import MAX_ATTEMPTS, ChanceError, Retries, failure_of
from hsrpc.errors import HsrpcError
from hsrpc.request import Delta, FinishReason
from hsrpc.source import Source

_WAITING = 4
"""One request waits for each so many that run, so that a place which becomes free has one at once."""
_MIN_WAITING = 8


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
    """Of all these requests: a prompt with several outputs counts with each."""
    completion_tokens: int = 0
    longest: int = 0
    """Most tokens of one of them, prompt and output."""

    def add(self, answer: Answer) -> None:
        """Count the requests of a line."""
        for output in answer.outputs:
            usage = output.finish.usage
            self.requests += 1
            self.prompt_tokens += usage.prompt_tokens
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
        self._source = source
        self._results = results
        self._slots = asyncio.Semaphore(concurrency)
        self._seed = seed
        self._retries = Retries(retry_seconds)
        self._note = note
        self._served: dict[str, bool] = {}
        self._texts: dict[int, str] = {}

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
        task = job.task
        if isinstance(task, Call) and not await self._serves(task.model):
            name, _ = await self._source.model()
            task = Refusal.of_model(task.model, name)
        if not isinstance(task, Call):
            self._write(job, task, uuid4().hex)
            return
        work = _Work(job, task)
        for index in range(task.num_requests):
            await self._slots.acquire()
            group.create_task(self._request(work, index))

    async def _serves(self, model: str) -> bool:
        if model not in self._served:
            self._served[model] = await self._source.serves(model)
        return self._served[model]

    async def _request(self, work: _Work, index: int) -> None:
        try:
            if work.is_done:  # another of its requests was refused
                return
            found = await self._output(work, index)
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

    async def _output(self, work: _Work, index: int) -> Output | Refusal:
        """Output of one request, tried again where it fails by chance."""
        for attempt in count(1):
            try:
                return await self._generate(work, index, attempt)
            except HsrpcError as error:
                failure = failure_of(error, work.call)
            if isinstance(failure, ChanceError) and attempt >= MAX_ATTEMPTS:
                failure = Refusal(500, str(failure), FAILED)
            if isinstance(failure, Refusal):
                return failure
            await self._retries.wait(failure, attempt)
        raise AssertionError("attempts have no end")

    async def _generate(self, work: _Work, index: int, attempt: int) -> Output | Refusal:
        prompt, settings = work.call.request(index, self._seed_of(work.job))
        request_id = f"{work.request_id}-{index}-{attempt}"
        deltas: list[Delta] = []
        async with aclosing(self._source.generate(prompt, settings, request_id)) as stream:
            async for delta in stream:
                self._retries.note_alive()
                deltas.append(delta)
        finish = deltas[-1].finish if deltas else None
        if finish is None:
            raise ChanceError("the stream ended before its last response")
        if finish.reason is FinishReason.ABORTED:
            return Refusal(500, "the request was aborted", FAILED, code="aborted")
        return Output(
            "".join(delta.text for delta in deltas),
            [token_id for delta in deltas for token_id in delta.token_ids],
            [logprob for delta in deltas for logprob in delta.logprobs],
            finish,
        )

    def _seed_of(self, job: Job) -> int | None:
        """The seed of a line's first request, whatever ran before it."""
        if self._seed is None:
            return None
        return int.from_bytes(sha256(f"{self._seed} {job.line.id}".encode()).digest()[:7])

    async def _answer(self, work: _Work) -> Answer:
        outputs = [output for _, output in sorted(work.outputs.items())]
        named = {token_id for output in outputs for token_id in output.named_ids()}
        for token_id in named - self._texts.keys():
            self._texts[token_id] = await self._text(token_id)
        return Answer(work.request_id, work.call, outputs, self._texts)

    async def _text(self, token_id: int) -> str:
        """Text of a token within others: where a text begins, some tokenizers leave its space out."""
        once, twice = await self._source.text_of([token_id]), await self._source.text_of([token_id, token_id])
        return twice[len(once) :]

    def _write(self, job: Job, result: Answer | Refusal | Fault, request_id: str) -> None:
        is_error = not isinstance(result, Answer)
        self._results.put(output_line(job.line, result, request_id), is_error=is_error)
        self.tally.lines += 1
        self.tally.errors += is_error
        if isinstance(result, Answer):
            self.tally.add(result)
        self._note(self.tally)


def default_concurrency(max_batch: int) -> int:
    """Requests to have at a time where `max_batch` run at once."""
    return max_batch + max(_MIN_WAITING, max_batch // _WAITING)


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
