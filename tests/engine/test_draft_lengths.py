"""Who drafts how much: what pays, by what became of drafts before; and what drafts, by the configuration."""

from __future__ import annotations

import pytest

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import AUTO, BUNDLED_MODEL, DraftMethod
from hsrpc.draft.allocation import StepPrice
from hsrpc.engine.draft_lengths import AllThatFit, ByGain
from hsrpc.errors import ConfigError
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import DraftCandidate
from tests.engine.support import collect, greedy, ids

DRAFT_MODEL = f"{BUNDLED_MODEL}-draft"
FREE = StepPrice(step_seconds=1.0, row_seconds=1e-6, spare_seconds=0.5, max_rows=1000)
"""As where weights stream: rows cost next to nothing."""
DEAR = StepPrice(step_seconds=1.0, row_seconds=1.0, max_rows=1000)


def candidate(name: str, max_tokens: int = 7) -> DraftCandidate:
    return DraftCandidate(Request(name, [1, 2, 3], SamplingParams(), 0, 0.0), max_tokens)


def become(request: Request, drafted: int, accepted: int) -> None:
    request.num_drafted += drafted
    request.num_accepted += accepted


def test_all_that_fit_are_as_many_as_there_is_room_for() -> None:
    assert AllThatFit().choose([candidate("a"), candidate("b", 2)]) == [7, 2]


def test_a_request_drafts_what_its_drafts_were_worth() -> None:
    """Right ones are made longer and wrong ones given up, each request by its own; nothing where rows cost too much."""
    lengths, right, wrong = ByGain(FREE), candidate("right"), candidate("wrong")
    for _ in range(12):
        first, second = lengths.choose([right, wrong])
        become(right.request, first, first)
        become(wrong.request, second, 0)
    assert first == 7
    assert second < 3
    assert ByGain(DEAR).choose([right, wrong]) == [0, 0]


def test_another_request_of_the_same_name_begins_anew() -> None:
    """What the first one drafted is not counted against the second."""
    lengths, old = ByGain(FREE), candidate("a")
    become(old.request, lengths.choose([old])[0], 0)
    lengths.forget(["a"])
    assert lengths.choose([candidate("a")])[0] > 0


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 0),
        ({"drafter": "ngram"}, AUTO),
        ({"draft_model": DRAFT_MODEL}, AUTO),
        ({"drafter": "suffix", "max_draft_tokens": 3}, 3),
        ({"max_draft_tokens": AUTO}, AUTO),
    ],
)
def test_what_drafts_says_that_tokens_are_drafted(given: dict[str, object], tokens: int | str) -> None:
    config = EngineConfig(**given)
    assert config.draft_tokens == tokens
    assert config.drafter in (None, *DraftMethod)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"drafter": "guess"}, "drafter"),
        ({"drafter": "ngram", "draft_model": DRAFT_MODEL}, "drafter"),
        ({"drafter": "ngram", "max_draft_tokens": 0}, "drafter"),
        ({"draft_model": DRAFT_MODEL, "max_draft_tokens": 0}, "draft_model"),
        ({"max_draft_tokens": -1}, "max_draft_tokens"),
        ({"max_draft_tokens": "many"}, "max_draft_tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_named(given: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=") as caught:
        EngineConfig(**given)
    assert "<" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"drafter": "ngram"}, {"logit_bias": {70: 100.0}}),
        ({"drafter": "suffix"}, {"logit_bias": {70: 100.0}}),
        ({"draft_model": DRAFT_MODEL}, {}),
    ],
)
async def test_an_engine_drafts_by_its_configuration(
    given: dict[str, object], settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as without, and the usage says what was drafted, whether or not it pays on this machine."""
    monkeypatch.setattr("hsrpc.engine.engine.ByGain", lambda price: AllThatFit())
    told, params = "Once upon a time", greedy(24, **settings)
    shape = {"gpu_memory": "80MiB", "placement": "host", "max_batch": 1, "max_model_len": 128, "device": "cpu"}
    async with Engine(EngineConfig(**shape)) as engine:
        wanted = await collect(engine.generate(told, params))
    async with Engine(EngineConfig(**shape, max_draft_tokens=5, **given)) as engine:
        found = await collect(engine.generate(told, params))
        stats = engine.stats()
    assert ids(found) == ids(wanted)
    assert found[-1].finish is not None
    usage = found[-1].finish.usage
    assert 0 < usage.accepted_tokens <= usage.drafted_tokens == stats.drafted_tokens
