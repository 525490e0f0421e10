"""Drafts change no token: whatever is drafted, outputs are those of an engine that drafts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from random import Random

import pytest

from hsrpc import Engine, EngineConfig
from hsrpc.draft.drafter import Drafter, Wanted
from hsrpc.draft.replay import ReplayDrafter
from hsrpc.engine.stats import EngineStats
from tests.engine.conftest import tightest
from tests.engine.reference import VOCAB, Reference
from tests.engine.support import idle
from tests.engine.test_equivalence import config_for, generate_all


class Hostile:
    """Drafts that are wrong in any way, or in none."""

    def __init__(self, reference: Reference, seed: int = 0) -> None:
        self._right = replay(reference)
        self._random = Random(seed)
        self.forgotten: list[str] = []

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        return [self._spoil(draft, each) for draft, each in zip(self._right.draft(wanted), wanted, strict=True)]

    def forget(self, request_ids: Collection[str]) -> None:
        self.forgotten += request_ids
        self._right.forget(request_ids)

    def _spoil(self, draft: Sequence[int], wanted: Wanted) -> Sequence[int]:
        assert 1 <= wanted.max_tokens <= 15
        assert wanted.token_ids[wanted.num_prompt_tokens :]
        anything = [self._random.randrange(VOCAB) for _ in range(wanted.max_tokens)]
        cut = self._random.randrange(wanted.max_tokens + 1)
        return self._random.choice(
            [
                draft,
                [*draft[:cut], *anything],
                [*draft, *anything, *anything],
                [],
                [-1, *draft],
                [*draft[:cut], VOCAB, *draft[cut:]],
                [*draft[:cut], 2**70, -(2**70)],
            ]
        )


def replay(reference: Reference, acceptance: float = 1.0) -> ReplayDrafter:
    outputs = zip(map(tuple, reference.prompts), reference.outputs, strict=True)
    return ReplayDrafter(dict(outputs), acceptance)


async def check(made: Reference, config: EngineConfig, drafter: Drafter) -> EngineStats:
    """Every token is the reference's, and nothing is held at the end."""
    async with Engine(config, drafter=drafter) as engine:
        assert await generate_all(engine, made) == made.outputs
        await idle(engine)
        return engine.stats()


POLICIES: Iterable[dict[str, object]] = (
    {"cache_policy": "kv"},
    {"cache_policy": "activation"},
    {"cache_policy": "hybrid", "activation_share": 0.5},
    {"cache_policy": "recompute"},
    {"cache_policy": "auto"},
    {"recompute_share": 0.6, "expected_context": 90},
    {"cache_policy": "kv", "block_size": 4},
)


@pytest.mark.parametrize("settings", POLICIES)
@pytest.mark.parametrize("model", ["opt", "mistral-window"])
async def test_tokens_equal_the_reference_with_tight_budgets(
    model: str, settings: dict[str, object], reference: Callable[[str], Reference]
) -> None:
    made = reference(model)
    config = tightest(config_for(made, **settings))
    steps = []
    for drafter in (replay(made), replay(made, 0.6), Hostile(made)):
        stats = await check(made, config, drafter)
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens
        steps.append(stats.steps)
    print(steps, stats)
