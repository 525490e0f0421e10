"""A thread that a task owns for its blocking calls, so that the event loop never waits for a device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import torch

T = TypeVar("T")


class _Job(NamedTuple):
    """A call, and who waits for its result in which loop."""

    function: Callable[[], object]
    done: asyncio.Future[Any]


class Worker:
    """One thread, in inference mode. Leaving waits for the call under way, also where its awaiter was cancelled.

    The executor of `concurrent.futures` takes the event loop and the thread twice as long for a call, and there are
    several for each mini-batch of a layer.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)  # a program may end without leaving
        self._thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """The result of `function` on the thread."""
        return await self._submit(function)  # in no variable: an error would hold the frame that holds it

    def _submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(function, done))
        return done

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    @torch.inference_mode()
    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.done.cancelled():
                self._settle(job)
            del job  # before waiting for the next: its function and result may hold much

    def _settle(self, job: _Job) -> None:
        try:
            tell = partial(_give, job.done, job.function())
        except BaseException as error:
            tell = partial(_fail, job.done, error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            job.done.get_loop().call_soon_threadsafe(tell)
        del job, tell  # an error holds this frame: it must not hold the error


def _give(done: asyncio.Future[T], result: T) -> None:
    if not done.cancelled():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.cancelled():
        done.set_exception(error)
