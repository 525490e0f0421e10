"""hsrpc batch, before it starts an engine: the prefix that the planner may count on, by looking at the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice

from hsrpc.batch.count import count_tokens
from hsrpc.batch.order import Job
from hsrpc.batch.outlook import load_of
from hsrpc.cli.loop import run_loop
from hsrpc.config import CachePolicy, EngineConfig
from hsrpc.engine.startup import open_model_tokenizer

_MAX_LINES = 512
_MAX_BYTES = 2**22
"""How much of an input is looked at."""


def shared_prefix(windows: Iterable[list[Job]], config: EngineConfig, names: Sequence[str]) -> int:
    """First tokens that requests have in common with those that run before them, on average; 0: less than a block.

    That is of the first lines to run. It is 0 where a prefix is given, and where none is shared.

    Raises:
        HsrpcError: the model cannot be read.
    """
    if config.expected_shared_prefix or not config.prefix_cache or config.cache_policy is CachePolicy.RECOMPUTE:
        return 0

    async def serves(name: str) -> bool:
        return not names or name in names

    with closing(open_model_tokenizer(config)) as tokenizer:
        count = run_loop(count_tokens([list(_first(windows))], tokenizer.encode, serves, output=1))
    shared = load_of(count).shared
    return shared if shared >= config.block_size else 0


def _first(windows: Iterable[list[Job]]) -> Iterator[Job]:
    num_bytes = 0
    for job in islice(next(iter(windows), []), _MAX_LINES):
        yield job
        num_bytes += job.line.num_bytes
        if num_bytes >= _MAX_BYTES:
            return
