"""An engine without a model that uses the host as one on a GPU does: a step ahead of its device, on loop and thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hsrpc.engine.worker import Worker
from hsrpc.plan.roofline import StepRecord
from hsrpc.request import Delta, SamplingParams
from hsrpc.testing.stub_engine import StubEngine, StubGeneration

_IDLE_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class PretendedStep:
    """Seconds. The next step is launched while the device computes one: it takes as long as the longer of the two."""

    device: float
    host: float
    """Seconds of Python: a quarter on the event loop before the launch, half on a thread, a quarter at the end."""


class PretendEngine(StubEngine):
    """While entered it gives each live request a token a step, and each step's record to `observe`."""

    def __init__(self, step: PretendedStep, max_batch: int, observe: Callable[[StepRecord], object]) -> None:
        super().__init__(name="no model")
        self.plan = replace(self.plan, max_batch=max_batch)
        self.device = f"no device, steps of {step.device * 1e3:g} ms with {step.host * 1e3:g} ms of host work"
        self._step = step
        self._observe = observe
        self._device_ends = 0.0
        """When what has been launched will have been computed."""

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> AsyncGenerator[Delta, None]:
        """Generate as an engine does."""
        generation = await self.submit(prompt, params)
        try:
            async for delta in generation:
                yield delta
        finally:
            generation.close()

    async def _run(self) -> None:
        async with Worker("pretend") as worker:
            while True:
                await asyncio.sleep(_IDLE_SECONDS)
                await self._run_steps(worker)

    async def _run_steps(self, worker: Worker) -> None:
        """While there are requests."""
        self._device_ends = began = time.perf_counter()
        while self.live:
            batch = list(self.live.values())
            await self._compute(worker)
            began = self._note(began, len(batch))
            for generation in batch:
                self._hand_out(generation)

    async def _compute(self, worker: Worker) -> None:
        """The step that the device is at; the next one is launched."""
        ready = self._device_ends
        _work(self._step.host / 4)
        await worker.run(self._launch)
        await worker.run(partial(_wait_until, ready))
        _work(self._step.host / 4)

    def _launch(self) -> None:
        _work(self._step.host / 2)
        self._device_ends = max(self._device_ends, time.perf_counter()) + self._step.device

    def _note(self, began: float, requests: int) -> float:
        """When the step ended."""
        ended = time.perf_counter()
        self._observe(
            StepRecord(
                seconds=ended - began,
                num_requests=requests,
                decode_tokens=requests,
                prefill_tokens=0,
                context_tokens=0,
                weight_bytes=0,
                cache_bytes=0,
                regenerated_tokens=0,
            )
        )
        return ended

    def _hand_out(self, generation: StubGeneration) -> None:
        if self.live.get(generation.request_id) is generation:
            self._give(generation, generation.given + 1)


def _work(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _wait_until(at: float) -> None:
    time.sleep(max(0.0, at - time.perf_counter()))
