"""The flags of who continues a command's prompts, and what is opened by them."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from hsrpc.cli.connection import add_connection_options, connection_settings
from hsrpc.cli.options import add_engine_options, engine_config
from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.source import Embedded, Remote, Source

if TYPE_CHECKING:
    from hsrpc.plan.roofline import StepRecord

T = TypeVar("T")
Run: TypeAlias = Callable[[Coroutine[Any, Any, T]], T]


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The flags of a server and of an engine, of which a command uses one."""
    add_connection_options(parser, target=None, target_help="no server, an engine in this process")
    add_engine_options(parser)


@contextmanager
def running_source(
    options: argparse.Namespace,
    *,
    names: Sequence[str] = (),
    observe: Callable[[StepRecord], object] | None = None,
    retries: bool = True,
) -> Iterator[tuple[Run[Any], Source]]:
    """The source that the flags choose, and what runs coroutines on its event loop; nothing runs in between.

    An engine in this process answers to `names` (empty: its model's own), and `observe` is told of its steps.
    Calls of a server are made again where they may be, unless `retries` is false: then the caller does it.

    Raises:
        HsrpcError: the flags contradict each other, or the engine cannot be started.
    """
    with asyncio.Runner(loop_factory=_loop_factory(options)) as runner:
        context = _open_source(options, names, observe, retries)
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
async def _open_source(
    options: argparse.Namespace,
    names: Sequence[str],
    observe: Callable[[StepRecord], object] | None,
    retries: bool,
) -> AsyncIterator[Source]:
    if options.target is None:
        _check_connection_settings(options)
        from hsrpc.engine.engine import Engine

        async with Engine(engine_config(options), progress=sys.stderr.isatty(), observe=observe) as engine:
            yield Embedded(engine, names)
        return
    _check_engine_settings(options)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once, as grpc loads
    from hsrpc.client import NO_RETRIES, AsyncClient

    settings = connection_settings(options)
    async with AsyncClient(options.target, options=() if retries else NO_RETRIES, **settings) as client:
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
