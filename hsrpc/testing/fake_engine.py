"""An engine for tests: it says what it is told to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self, Unpack

from hsrpc.engine.stats import EngineStats
from hsrpc.errors import EngineFaultError
from hsrpc.prompt import Chat, Prompt, Text
from hsrpc.request import Delta, Finish, FinishReason, SamplingParams, Timings, Usage
from hsrpc.schedule.blocks import PoolId
from hsrpc.server.engine_protocol import SubmitOptions
from hsrpc.testing.stub_engine import StubEngine, StubGeneration

WORDS = ("Once", " upon", " a", " time")
USAGE = Usage(3, 4, 1, drafted_tokens=6, accepted_tokens=3)
TIMINGS = Timings(queue=0.5, prefill=1.0, decode=2.0, first_token=1.5)


class FakeEngine(StubEngine):
    """Answers every prompt with WORDS at once, or, if `held`, with what the test puts into the generations."""

    def __init__(self, *, held: bool = False, load_gate: asyncio.Event | None = None, num_gpus: int = 1) -> None:
        super().__init__(name="fake/model", num_gpus=num_gpus)
        self.held = held
        self.load_gate = load_gate
        """Entering waits for it."""
        self.load_error: Exception | None = None
        """Entering raises it."""
        self.refusal: Exception | None = None
        """Raised by the next submits, and by the tokenizer's calls."""
        self.aborted: list[str] = []
        self.submitted: list[SamplingParams] = []
        self.prompts: list[Prompt] = []
        self.clients: list[str] = []
        """Keys of those that submitted or used the tokenizer, refused ones too."""
        self.users: list[str] = []
        """Users of those that submitted."""
        self.max_waits: list[float | None] = []
        self.salts: list[str] = []
        self.device = "cpu"
        self.max_model_len = 256
        self.beat = 0.0
        """Seconds that its step takes already."""
        self._fault = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self.load_gate:
            await self.load_gate.wait()
        if self.load_error:
            raise self.load_error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.clear()

    async def submit(self, prompt: Prompt, params: SamplingParams, **options: Unpack[SubmitOptions]) -> StubGeneration:
        self.users.append(options.get("user", ""))
        self._receive(options.get("client", ""))
        self.max_waits.append(options.get("max_wait"))
        self.salts.append(options.get("cache_salt", ""))
        self.prompts.append(prompt)
        generation = await super().submit(prompt, params, **options)
        self.submitted.append(generation.params)
        if not self.held:
            self.say(generation.request_id, *(() if params.only_scores else WORDS))
            self.end(generation.request_id)
        return generation

    async def tokenize(self, prompt: str | Text | Chat, *, client: str = "") -> list[int]:
        self._receive(client)
        return await super().tokenize(prompt, client=client)

    async def detokenize(self, token_ids: Sequence[int], *, client: str = "", skip_special_tokens: bool = True) -> str:
        self._receive(client)
        return await super().detokenize(token_ids, client=client, skip_special_tokens=skip_special_tokens)

    def _receive(self, client: str) -> None:
        self.clients.append(client)
        if self.refusal:
            raise self.refusal

    def say(self, request_id: str, *words: str) -> None:
        """Put a token a word; its id is the word's length."""
        for word in words:
            self.live[request_id].put(Delta(word, (len(word),)))

    def end(self, request_id: str, reason: FinishReason = FinishReason.EOS, matched: str | int | None = None) -> None:
        if reason is FinishReason.ABORTED:
            self.aborted.append(request_id)
        self.live.pop(request_id).put(Delta(finish=Finish(reason, USAGE, TIMINGS, matched)))

    def stats(self) -> EngineStats:
        stats = super().stats()
        blocks = {**dict.fromkeys(PoolId, 0), PoolId.HOST_KV: 3}
        busy = partial(
            replace, used_blocks=blocks, weights_streamed_bytes=1000, cache_loaded_bytes=500, busy_seconds=1.5
        )
        return replace(
            stats,
            queued=1,
            queued_tokens=7,
            gpus=[busy(gpu) for gpu in stats.gpus],
            steps=4,
            step_seconds=2.0,
            prompt_tokens=10,
            generated_tokens=20,
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
