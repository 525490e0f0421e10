"""An engine that computes nothing: it hands out tokens at a given rate, to measure and test what is in front of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Self, Unpack

from hsrpc.config import CachePolicy, DeviceKind, EngineConfig
from hsrpc.engine.generation import Generation
from hsrpc.engine.gpus.contract import GpuFacts
from hsrpc.engine.stats import EngineStats, GpuStats
from hsrpc.engine.validation import Validator
from hsrpc.errors import InvalidRequestError, RequestExistsError
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.machine import Machine
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import CacheRow, LayerSizes, ModelSizes, TensorSizes
from hsrpc.prompt import Chat, Prompt, Text, field_of, told
from hsrpc.request import Delta, Finish, FinishReason, SamplingParams, Timings, TokenLogprob, Usage
from hsrpc.schedule.blocks import PoolId
from hsrpc.server.engine_protocol import SubmitOptions

STEP_SECONDS = 0.005
"""Tokens come in steps, as from an engine whose model is small."""
_MAX_MODEL_LEN = 10_000_000
_SEED = 7
_WORD = Delta(" word", (7,))
_LAYER = LayerSizes(
    tensors=tuple(
        TensorSizes(
            name=name,
            num_elements=size,
            resident_bytes=4 * size,
            device_bytes=4 * size,
            buffer_bytes=4 * size,
            bus_bytes=4 * size,
            host_bytes=4 * size,
        )
        for name, size in {"attention": 4 * 64 * 64, "mlp": 2 * 64 * 256}.items()
    ),
    hidden_size=64,
    query_size=64,
    key_size=64,
    value_size=64,
    ffn_size=256,
    kv=CacheRow(128, 512),
    activation=CacheRow(64, 256),
    compute_bytes=4,
)
_SIZES = ModelSizes(
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=256,
    vocab_size=128,
    context_length=512,
    compute_bytes=4,
    layers=(_LAYER, _LAYER),
    fixed_bytes=4 * 128 * 64,
)
_HARDWARE = Hardware(load_bandwidth=5e10, store_bandwidth=5e10, gemm_rate=1e14, memory_bandwidth=1e12)
_MACHINE = Machine(
    name="none",
    kind=DeviceKind.CPU,
    device_memory=2**26,
    host_memory=2**26,
    dtype="float32",
    hardware=_HARDWARE,
)
_NO_BLOCKS = dict.fromkeys(PoolId, 0)


@dataclass(frozen=True, slots=True)
class StubSpec:
    """A model in name only."""

    name: str
    family: str = "opt"
    sizes: ModelSizes = _SIZES
    vocab_size: int = _SIZES.vocab_size
    eos_token_ids: tuple[int, ...] = (2,)
    bos_token_id: int | None = 1
    pad_token_id: int | None = None
    architectures: tuple[str, ...] = ("OPTForCausalLM",)


class StubTokenizer:
    """One token a character: its ASCII code. Its chat template writes each message as `role: content` on a line."""

    has_chat_template = True

    async def encode(self, prompt: str | Text | Chat, client: str = "") -> list[int]:
        text = await self.render(prompt) if isinstance(prompt, Chat) else told(prompt)
        return [ord(letter) % _SIZES.vocab_size for letter in text]

    async def render(self, chat: Chat, client: str = "") -> str:
        return "".join(f"{turn.role}: {turn.content}\n" for turn in chat.turns)

    async def decode(self, token_ids: Sequence[int], client: str = "", skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    def with_special_tokens(self, token_ids: Sequence[int]) -> list[int]:
        return list(token_ids)

    async def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": b"{}"}


class StubGeneration(Generation):
    """Counts what it was given."""

    def __init__(self, request_id: str, prompt: Sequence[int], params: SamplingParams, engine: StubEngine) -> None:
        super().__init__(request_id, prompt, params, partial(engine.abort, request_id))
        self.started = time.perf_counter()
        self.given = 0


class StubEngine:
    """While entered it gives every live request `rate` tokens per second, one delta a token, until its `max_tokens`."""

    def __init__(self, rate: float = 0.0, name: str = "stub", num_gpus: int = 1) -> None:
        self.rate = rate
        self.spec = StubSpec(name)
        self.tokenizer = StubTokenizer()
        self.device = _MACHINE.name
        self.gpus = [GpuFacts("", _MACHINE)] * num_gpus
        self.max_model_len = _MAX_MODEL_LEN
        self.plan = replace(_plan(), num_gpus=num_gpus)
        self.default_params = SamplingParams()
        self.failed_in_a_row = 0
        self.live: dict[str, StubGeneration] = {}
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

    async def submit(self, prompt: Prompt, params: SamplingParams, **options: Unpack[SubmitOptions]) -> StubGeneration:
        ids = await self.tokenizer.encode(prompt) if isinstance(prompt, str | Text | Chat) else list(prompt)
        room = self.max_model_len - len(ids)
        if room < (not params.only_scores):
            raise InvalidRequestError(field_of(prompt), f"{len(ids)} tokens")
        request_id = options.get("request_id") or f"made-{next(self._ids)}"
        if request_id in self.live:
            raise RequestExistsError(request_id)
        effective = replace(params.within(room), seed=_SEED if params.seed is None else params.seed)
        self.live[request_id] = generation = StubGeneration(request_id, ids, effective, self)
        if params.prompt_logprobs is not None and len(ids) > 1:
            generation.put(Delta(prompt_logprobs=stub_logprobs(ids, params.prompt_logprobs)))
        return generation

    async def tokenize(self, prompt: str | Text | Chat, *, client: str = "") -> list[int]:
        self._validator.check_length(prompt)
        return await self.tokenizer.encode(prompt, client)

    async def render(self, chat: Chat, *, client: str = "") -> str:
        self._validator.check_length(chat)
        return await self.tokenizer.render(chat, client)

    async def detokenize(self, token_ids: Sequence[int], *, client: str = "", skip_special_tokens: bool = True) -> str:
        self._validator.check_token_ids(token_ids)
        return await self.tokenizer.decode(token_ids, client, skip_special_tokens)

    @property
    def _validator(self) -> Validator:
        return Validator(self.spec.vocab_size, self.max_model_len)

    def abort(self, request_id: str) -> bool:
        is_live = request_id in self.live
        if is_live:
            self.end(request_id, FinishReason.ABORTED)
        return is_live

    def end(self, request_id: str, reason: FinishReason) -> None:
        """The last delta of a live request."""
        generation = self.live.pop(request_id)
        seconds = time.perf_counter() - generation.started
        usage = Usage(len(generation.prompt_token_ids), generation.given)
        generation.put(Delta(finish=Finish(reason, usage, Timings(0.0, 0.0, seconds, 0.0))))

    def stats(self) -> EngineStats:
        return EngineStats(
            queued=0,
            queued_tokens=0,
            gpus=[self._gpu(number) for number in range(len(self.gpus))],
            peak_blocks=_NO_BLOCKS,
            steps=self._steps,
            step_seconds=STEP_SECONDS,
            prompt_tokens=0,
            generated_tokens=self._tokens,
            preemptions=0,
        )

    def _gpu(self, number: int) -> GpuStats:
        """Live requests go to the GPUs in turn."""
        running = len(range(number, len(self.live), len(self.gpus)))
        return GpuStats(running=running, used_blocks=_NO_BLOCKS, kept_blocks=_NO_BLOCKS, peak_blocks=_NO_BLOCKS)

    def heartbeat(self) -> float:
        return 0.0

    async def wait_failed(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            self._steps += 1
            now = time.perf_counter()
            for generation in list(self.live.values()):
                self._give(generation, int((now - generation.started) * self.rate))

    def _give(self, generation: StubGeneration, due: int) -> None:
        max_tokens = generation.params.max_tokens or 0
        for _ in range(min(due, max_tokens) - generation.given):
            generation.put(_WORD)
            generation.given += 1
            self._tokens += 1
        if generation.given == max_tokens:
            self.end(generation.request_id, FinishReason.MAX_TOKENS)


def stub_logprobs(prompt: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """What a prompt's tokens but the first are scored: the place of each, which is its rank as well."""
    best = tuple((token_id, -1.0 - token_id) for token_id in range(top))
    return tuple(TokenLogprob(token_id, -float(place), place, best) for place, token_id in enumerate(prompt[1:], 1))


def _plan() -> Plan:
    """The real planner's answer for a tiny model."""
    config = EngineConfig(cache_policy=CachePolicy.HYBRID, activation_share=0.5, max_batch=4)
    return Planner(_SIZES, Budgets(device=2**26, host=2**26), _HARDWARE, config).plan()
