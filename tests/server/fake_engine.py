"""An engine without a model: it speaks the engine's contract, and says what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Self

from hsrpc.config import CachePolicy, EngineConfig
from hsrpc.core.blocks import PoolId
from hsrpc.core.plan import Budgets, Hardware, Plan
from hsrpc.core.planner import Planner
from hsrpc.core.request import Delta, Finish, FinishReason, SamplingParams, Timings, Usage
from hsrpc.core.sizes import ModelSizes
from hsrpc.engine.generation import Generation
from hsrpc.engine.stats import EngineStats
from hsrpc.errors import EngineFaultError, InvalidRequestError, RequestExistsError

SIZES = ModelSizes(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=256,
    vocab_size=128,
    context_length=512,
    element_bytes=4,
    layer_tensors={"attention": 4 * 64 * 64, "mlp": 2 * 64 * 256},
    fixed_elements=128 * 64,
)
HARDWARE = Hardware(load_bandwidth=5e10, store_bandwidth=5e10, gemm_rate=1e14, memory_bandwidth=1e12)
WORDS = ("Once", " upon", " a", " time")


def make_plan() -> Plan:
    """The real planner's answer for a tiny model."""
    config = EngineConfig(cache_policy=CachePolicy.HYBRID, activation_share=0.5, max_batch=4)
    return Planner(SIZES, Budgets(device=64 * 1024**2, host=64 * 1024**2), HARDWARE, config).plan()


@dataclass(frozen=True)
class FakeSpec:
    name: str = "fake/model"
    family: str = "opt"
    sizes: ModelSizes = SIZES
    vocab_size: int = SIZES.vocab_size
    eos_token_ids: tuple[int, ...] = (2,)


class FakeTokenizer:
    """One token a character: its ASCII code."""

    async def encode(self, text: str) -> list[int]:
        return [ord(letter) % SIZES.vocab_size for letter in text]

    async def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def finish(reason: FinishReason = FinishReason.EOS, *, matched: str | int | None = None) -> Finish:
    return Finish(reason, Usage(3, 4, 1), Timings(queue=0.5, prefill=1.0, decode=2.0, first_token=1.5), matched)


@dataclass
class FakeEngine:
    """Answers every prompt with WORDS at once, or, if `held`, with what the test puts into the generations."""

    held: bool = False
    refusal: Exception | None = None
    """Raised by the next submits."""
    load_gate: asyncio.Event | None = None
    """Entering waits for it."""
    load_error: Exception | None = None
    """Entering raises it."""
    live: dict[str, Generation] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    submitted: list[SamplingParams] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    """Keys of those that submitted, refused ones too."""
    max_waits: list[float | None] = field(default_factory=list)
    spec: FakeSpec = FakeSpec()
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    device: str = "cpu"
    max_model_len: int = 256
    beat: float = 0.0
    """Seconds that its step takes already."""

    def __post_init__(self) -> None:
        self.plan = make_plan()
        self._fault = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self.load_gate:
            await self.load_gate.wait()
        if self.load_error:
            raise self.load_error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.clear()

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        client: str = "",
        max_wait: float | None = None,
    ) -> Generation:
        self.clients.append(client)
        self.max_waits.append(max_wait)
        if self.refusal:
            raise self.refusal
        ids = await self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if len(ids) >= self.max_model_len:
            raise InvalidRequestError("text" if isinstance(prompt, str) else "token_ids", f"{len(ids)} tokens")
        request_id = request_id or f"made-{len(self.submitted)}"
        if request_id in self.live:
            raise RequestExistsError(request_id)
        params = replace(params, seed=params.seed or 7, max_tokens=params.max_tokens or self.max_model_len - len(ids))
        generation = Generation(request_id, ids, params, partial(self.close, request_id))
        self.submitted.append(params)
        self.live[request_id] = generation
        if not self.held:
            self.say(request_id, *WORDS)
            self.end(request_id)
        return generation

    def say(self, request_id: str, *words: str) -> None:
        """Put a token a word; its id is the word's length."""
        for word in words:
            self.live[request_id].put(Delta(word, (len(word),)))

    def end(self, request_id: str, reason: FinishReason = FinishReason.EOS, matched: str | int | None = None) -> None:
        self.live.pop(request_id).put(Delta(finish=finish(reason, matched=matched)))

    def close(self, request_id: str) -> bool:
        """What a generation's close does: abort it if it is still live."""
        if request_id not in self.live:
            return False
        self.aborted.append(request_id)
        self.end(request_id, FinishReason.ABORTED)
        return True

    abort = close

    def stats(self) -> EngineStats:
        return EngineStats(
            queued=1,
            running=len(self.live),
            used_blocks={PoolId.HOST_KV: 3},
            peak_blocks={},
            steps=4,
            step_seconds=2.0,
            prompt_tokens=10,
            generated_tokens=20,
            preemptions=0,
            weights_streamed_bytes=1000,
            cache_loaded_bytes=500,
            regenerated_tokens=0,
            peak_device_bytes=0,
        )

    def heartbeat(self) -> float:
        return self.beat

    def die(self) -> None:
        """All generations end with the fault."""
        for generation in self.live.values():
            generation.fail(EngineFaultError("secret: /models/path"))
        self._fault.set()

    async def wait_failed(self) -> None:
        await self._fault.wait()
        raise EngineFaultError("secret: /models/path")
