"""Who continues prompts: an engine in this process, or a server."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import CHAT_HINT, Chat, Prompt, Text
from hsrpc.request import Delta

if TYPE_CHECKING:
    from hsrpc.client import AsyncClient
    from hsrpc.engine.engine import Engine
    from hsrpc.v1.server_pb2 import BlockUse

_log = logging.getLogger(__name__)


class Bounds(NamedTuple):
    """Where texts begin and end."""

    max_model_len: int
    """Most tokens of a request, prompt and output together."""
    bos_token_id: int | None
    """Token that begins a text; None: the model names none."""
    eos_token_ids: Sequence[int]
    """Tokens that end one."""


class Source(Protocol):
    """Continues prompts."""

    def generate(
        self, prompt: Prompt, settings: dict[str, Any], request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of one request, which closing the generator aborts.

        Raises:
            HsrpcError: while iterating; the request was refused, or failed.
        """
        ...

    async def model(self) -> tuple[str, bool]:
        """Name of the model, and whether it has a chat template."""
        ...

    async def serves(self, name: str) -> bool:
        """Whether a request may call the model so."""
        ...

    async def text_of(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special ones shown."""
        ...

    async def tokenize(self, prompt: str | Text | Chat) -> list[int]:
        """Token ids that a request with this prompt has."""
        ...

    async def render(self, chat: Chat) -> str:
        """The text that the model's template makes of a conversation."""
        ...

    async def bounds(self) -> Bounds:
        """Bounds of the model's texts."""
        ...

    async def max_batch(self) -> int:
        """Most requests that run at once."""
        ...

    async def cache(self) -> dict[str, object]:
        """What was decided about the cache, and what it did since the engine started."""
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """An engine in this process."""

    engine: Engine
    names: Sequence[str] = ()
    """What requests may call the model; empty: its own name."""

    def generate(
        self, prompt: Prompt, settings: dict[str, Any], request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        return self.engine.generate(prompt, replace(self.engine.default_params, **settings), request_id=request_id)

    async def model(self) -> tuple[str, bool]:
        return self.engine.spec.name, self.engine.tokenizer.has_chat_template

    async def serves(self, name: str) -> bool:
        return name in (self.names or (self.engine.spec.name,))

    async def text_of(self, token_ids: Sequence[int]) -> str:
        return await self.engine.tokenizer.decode(token_ids, skip_special_tokens=False)  # takes no place in the queue

    async def tokenize(self, prompt: str | Text | Chat) -> list[int]:
        return await self.engine.tokenizer.encode(prompt)  # likewise

    async def render(self, chat: Chat) -> str:
        return await self.engine.tokenizer.render(chat)

    async def bounds(self) -> Bounds:
        spec = self.engine.spec
        return Bounds(self.engine.max_model_len, spec.bos_token_id, spec.eos_token_ids)

    async def max_batch(self) -> int:
        return self.engine.plan.max_batch

    async def cache(self) -> dict[str, object]:
        plan, stats = self.engine.plan, self.engine.stats()
        return {
            "policy": plan.policy,
            "reason": plan.reason,
            "activation_share": plan.activation_share,
            "format": plan.cache_format,
            "block_size": plan.block_size,
            "peak_blocks": {pool.name.lower(): count for pool, count in stats.peak_blocks.items()},
            "resident_share": plan.resident_share,
            "weights_streamed_bytes": stats.weights_streamed_bytes,
            "cache_loaded_bytes": stats.cache_loaded_bytes,
            "regenerated_tokens": stats.regenerated_tokens,
            "recomputed_tokens": stats.recomputed_tokens,
        }


@dataclass(frozen=True, slots=True)
class Remote:
    """A server."""

    client: AsyncClient
    seeds: Random | None
    """Draws the seeds of requests, as an engine with --seed does; None: the server does."""

    async def generate(
        self, prompt: Prompt, settings: dict[str, Any], request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        if self.seeds is not None:
            settings = {"seed": self.seeds.randrange(2**63), **settings}
        if request_id is not None:
            settings = {**settings, "request_id": request_id}
        with _refusals():
            async with self.client.generate(prompt, **{**settings, "return_token_ids": True}) as stream:
                async for delta in stream:
                    yield delta
                    if isinstance(prompt, str) and delta.finish is not None and delta.finish.is_nothing:
                        await self._hint()

    async def _hint(self) -> None:
        """What the server's engine tells its own log."""
        _, has_chat_template = await self.model()
        if has_chat_template:
            _log.warning(CHAT_HINT)

    async def model(self) -> tuple[str, bool]:
        found = await self.client.get_model()
        return found.name, found.has_chat_template

    async def serves(self, name: str) -> bool:
        from hsrpc.client import CallError

        try:
            await self.client.get_model(name)
        except CallError as error:
            if error.code.name != "NOT_FOUND":
                raise
            return False
        return True

    async def text_of(self, token_ids: Sequence[int]) -> str:
        return await self.client.detokenize(token_ids, skip_special_tokens=False)

    async def tokenize(self, prompt: str | Text | Chat) -> list[int]:
        with _refusals():
            return await self.client.tokenize(prompt)

    async def render(self, chat: Chat) -> str:
        with _refusals():
            return await self.client.render(chat)

    async def bounds(self) -> Bounds:
        found = await self.client.get_model()
        bos = found.bos_token_id if found.HasField("bos_token_id") else None
        return Bounds(found.max_model_len, bos, tuple(found.eos_token_ids))

    async def max_batch(self) -> int:
        return (await self.client.get_server_info()).plan.max_batch

    async def cache(self) -> dict[str, object]:
        info = await self.client.get_server_info()
        plan, measured = info.plan, info.measured
        return {
            "policy": plan.cache_policy,
            "reason": plan.cache_decision,
            "activation_share": plan.activation_share,
            "peak_blocks": {_pool(use): use.peak for use in info.load.blocks},
            "resident_share": plan.resident_share,
            "weights_streamed_bytes": measured.weights_streamed_bytes,
            "cache_loaded_bytes": measured.cache_loaded_bytes,
            "regenerated_tokens": measured.regenerated_tokens,
            "recomputed_tokens": measured.recomputed_tokens,
        }


@contextmanager
def _refusals() -> Iterator[None]:
    """What a server finds wrong in a field is told as an engine in this process would tell it."""
    from hsrpc.client import CallError

    try:
        yield
    except CallError as error:
        field, colon, description = error.message.partition(": ")
        if error.code.name != "INVALID_ARGUMENT" or not colon:
            raise
        name = field.removeprefix("chat.").removeprefix("constraint.").replace("choice.texts", "choice")
        raise InvalidRequestError(name, description) from None


def _pool(use: BlockUse) -> str:
    """Name of a pool, as `PoolId` has it."""
    kinds, tiers = ("", "kv", "activation"), ("", "device", "host")
    return f"{tiers[use.tier]}_{kinds[use.kind]}"
