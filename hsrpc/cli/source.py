"""Who continues a command's prompts: an engine in this process, or a server."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields, replace
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from hsrpc.cli.connection import add_connection_options, connection_settings
from hsrpc.cli.options import add_engine_options, engine_config
from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError, InvalidRequestError
from hsrpc.prompt import CHAT_HINT, Prompt
from hsrpc.request import Delta

if TYPE_CHECKING:
    from hsrpc.client import AsyncClient
    from hsrpc.engine.engine import Engine
    from hsrpc.v1.server_pb2 import BlockUse

_log = logging.getLogger(__name__)

T = TypeVar("T")
Run: TypeAlias = Callable[[Coroutine[Any, Any, T]], T]


class Source(Protocol):
    """Continues prompts."""

    def generate(self, prompt: Prompt, settings: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        """The deltas of one request, which closing the generator aborts.

        Raises:
            HsrpcError: while iterating; the request was refused, or failed.
        """
        ...

    async def model(self) -> tuple[str, bool]:
        """Name of the model, and whether it has a chat template."""
        ...

    async def cache(self) -> dict[str, object]:
        """What was decided about the cache, and what it did since the engine started."""
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """An engine in this process."""

    engine: Engine

    def generate(self, prompt: Prompt, settings: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        return self.engine.generate(prompt, replace(self.engine.default_params, **settings))

    async def model(self) -> tuple[str, bool]:
        return self.engine.spec.name, self.engine.tokenizer.has_chat_template

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

    async def generate(self, prompt: Prompt, settings: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        if self.seeds is not None:
            settings = {**settings, "seed": self.seeds.randrange(2**63)}
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
        raise InvalidRequestError(field.removeprefix("chat."), description) from None


def _pool(use: BlockUse) -> str:
    """Name of a pool, as `PoolId` has it."""
    kinds, tiers = ("", "kv", "activation"), ("", "device", "host")
    return f"{tiers[use.tier]}_{kinds[use.kind]}"


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The flags of a server and of an engine, of which a command uses one."""
    add_connection_options(parser, target=None, target_help="no server, an engine in this process")
    add_engine_options(parser)


@contextmanager
def running_source(options: argparse.Namespace) -> Iterator[tuple[Run[Any], Source]]:
    """The source that the flags choose, and what runs coroutines on its event loop; nothing runs in between.

    Raises:
        HsrpcError: the flags contradict each other, or the engine cannot be started.
    """
    with asyncio.Runner(loop_factory=_loop_factory(options)) as runner:
        context = _open_source(options)
        source = runner.run(context.__aenter__())
        try:
            yield runner.run, source
        finally:
            runner.run(context.__aexit__(None, None, None))


def _loop_factory(options: argparse.Namespace) -> Callable[[], asyncio.AbstractEventLoop]:
    if options.target is not None:
        return asyncio.new_event_loop  # all that an installation without the extra `engine` has
    import uvloop

    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new_event_loop


@asynccontextmanager
async def _open_source(options: argparse.Namespace) -> AsyncIterator[Source]:
    if options.target is None:
        _check_connection_settings(options)
        from hsrpc.engine.engine import Engine

        async with Engine(engine_config(options), progress=sys.stderr.isatty()) as engine:
            yield Embedded(engine)
        return
    _check_engine_settings(options)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once, as grpc loads
    from hsrpc.client import AsyncClient

    async with AsyncClient(options.target, **connection_settings(options)) as client:
        yield Remote(client, None if options.seed is None else Random(options.seed))


def _check_connection_settings(options: argparse.Namespace) -> None:
    """Without a server there is nothing to connect to."""
    for name, value in vars(options).items():
        if name in ("token_file", "tls_ca", "tls_cert", "tls_key") and value is not None:
            raise ConfigError(name, str(value), "has no meaning without a server", "give --target HOST:PORT too")


def _check_engine_settings(options: argparse.Namespace) -> None:
    """A server has an engine of its own, which these settings would not change; but for the seed, that of `Remote`."""
    given, defaults = engine_config(options), EngineConfig(seed=options.seed)
    for field in fields(EngineConfig):
        if getattr(given, field.name) != getattr(defaults, field.name):
            problem, remedy = f"has no meaning with --target {options.target}", "give it to the server, or leave it out"
            raise ConfigError(field.name, getattr(options, field.name), problem, remedy)
