"""A thread that a task owns for its blocking calls, so that the event loop never waits for a device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

T = TypeVar("T")


class Worker:
    """One thread, in inference mode. Leaving waits for the call under way, also where its awaiter was cancelled."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[[], T]) -> T:
        """The result of `function` on the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, _in_inference_mode, function)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)


def _in_inference_mode(function: Callable[[], T]) -> T:
    with torch.inference_mode():
        return function()
