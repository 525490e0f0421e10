"""An engine that computes nothing: it hands out tokens at a given rate, to measure what is in front of an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Self

from hsrpc.config import EngineConfig
from hsrpc.core.plan import Budgets, Hardware, Plan
from hsrpc.core.planner import Planner
from hsrpc.core.request import Delta, Finish, FinishReason, SamplingParams, Timings, Usage
from hsrpc.core.sizes import ModelSizes
from hsrpc.engine.generation import Generation
from hsrpc.engine.stats import EngineStats

STEP_SECONDS = 0.005
"""Tokens come in steps, as from an engine whose model is small."""
_MAX_MODEL_LEN = 10_000_000
_WORD = Delta(" word", (7,))
_SIZES = ModelSizes(
    num_layers=1,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=256,
    vocab_size=1024,
    context_length=_MAX_MODEL_LEN,
    element_bytes=2,
    layer_tensors={"attention": 4 * 64 * 64, "mlp": 2 * 64 * 256},
    fixed_elements=1024 * 64,
)
_HARDWARE = Hardware(load_bandwidth=5e10, store_bandwidth=5e10, gemm_rate=1e14, memory_bandwidth=1e12)


@dataclass(frozen=True, slots=True)
class StubSpec:
    """A model in name only."""

    name: str = "stub"
    family: str = "stub"
    sizes: ModelSizes = _SIZES
    vocab_size: int = _SIZES.vocab_size
    eos_token_ids: tuple[int, ...] = ()


class StubTokenizer:
    """One token a character."""

    async def encode(self, text: str) -> list[int]:
        return [ord(letter) % _SIZES.vocab_size for letter in text]

    async def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


@dataclass(slots=True)
class _Live:
    generation: Generation
    started: float
    given: int = 0


class StubEngine:
    """Gives every live request `rate` tokens per second, one delta a token, until its `max_tokens`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.spec = StubSpec()
        self.tokenizer = StubTokenizer()
        self.device = "none"
        self.max_model_len = _MAX_MODEL_LEN
        self.plan: Plan = Planner(
            _SIZES, Budgets(device=2**26, host=2**26), _HARDWARE, EngineConfig(expected_context=128, max_batch=4)
        ).plan()
        self._live: dict[str, _Live] = {}
        self._ids = count()
        self._steps = 0
        self._tokens = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        client: str = "",
        max_wait: float | None = None,
    ) -> Generation:
        ids = await self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        request_id = request_id or f"stub-{next(self._ids)}"
        effective = replace(params, seed=params.seed or 0, max_tokens=params.max_tokens or _MAX_MODEL_LEN)
        generation = Generation(request_id, ids, effective, partial(self.abort, request_id))
        self._live[request_id] = _Live(generation, time.perf_counter())
        return generation

    def abort(self, request_id: str) -> bool:
        live = self._live.pop(request_id, None)
        if live is not None:
            self._end(live, FinishReason.ABORTED)
        return live is not None

    def stats(self) -> EngineStats:
        return EngineStats(
            queued=0,
            running=len(self._live),
            used_blocks={},
            peak_blocks={},
            steps=self._steps,
            step_seconds=STEP_SECONDS,
            prompt_tokens=0,
            generated_tokens=self._tokens,
            preemptions=0,
            weights_streamed_bytes=0,
            cache_loaded_bytes=0,
            regenerated_tokens=0,
            peak_device_bytes=0,
        )

    def heartbeat(self) -> float:
        return 0.0

    async def wait_failed(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            self._steps += 1
            now = time.perf_counter()
            for request_id, live in list(self._live.items()):
                self._give(request_id, live, int((now - live.started) * self.rate))

    def _give(self, request_id: str, live: _Live, due: int) -> None:
        most = live.generation.params.max_tokens or 0
        for _ in range(min(due, most) - live.given):
            live.generation.put(_WORD)
            live.given += 1
            self._tokens += 1
        if live.given == most:
            del self._live[request_id]
            self._end(live, FinishReason.MAX_TOKENS)

    def _end(self, live: _Live, reason: FinishReason) -> None:
        seconds = time.perf_counter() - live.started
        usage = Usage(len(live.generation.prompt_token_ids), live.given)
        live.generation.put(Delta(finish=Finish(reason, usage, Timings(0.0, 0.0, seconds, 0.0))))
