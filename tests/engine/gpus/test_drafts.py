"""Draft models of several GPUs: each is asked for the requests that run on its GPU, and knows all tokens of these."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc import Engine, SamplingParams
from hsrpc.constraint import Regex
from hsrpc.draft.allocation import StepPrice
from hsrpc.draft.drafter import Wanted
from hsrpc.engine.gpus.drafts import FarDrafter, NearDrafter
from hsrpc.engine.gpus.messages import Draft, Drafted, Forget
from hsrpc.engine.gpus.ranks import RankProcess
from hsrpc.errors import EngineFaultError
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from tests.engine.gpus.support import GREEDY, config_for, planned
from tests.engine.reference import Reference
from tests.engine.support import collect, idle, ids, text, until

GPUS = 3


class Echo:
    """A drafter that says who was asked about, and of what length; and that knows who was not forgotten."""

    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        self.known: dict[str, list[int]] = {}
        self.fails = False

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        if self.fails:
            raise ValueError("no memory")
        self.known |= {each.request_id: list(each.token_ids) for each in wanted}
        return [[self.gpu, int(each.request_id), len(each.token_ids), each.max_tokens] for each in wanted]

    def forget(self, request_ids: Collection[str]) -> None:
        for request_id in request_ids:
            del self.known[request_id]


class NearBy:
    """A rank without a process: it answers when it is told."""

    def __init__(self, gpu: int) -> None:
        self.echo = Echo(gpu)
        self.sent: list[Draft | Forget] = []
        self._near = NearDrafter(self.echo)
        self._answers: SimpleQueue[Drafted | None] = SimpleQueue()

    def send(self, message: Draft | Forget) -> None:
        self.sent.append(message)
        if isinstance(message, Draft):
            self._answers.put(self._near.draft(message))
        else:
            self._near.forget(message)

    def end(self) -> None:
        self._answers.put(None)

    def drafted(self) -> Drafted | None:
        return self._answers.get_nowait()


def at_once(call: Callable[..., object], *args: object) -> None:
    """Call it, as an event loop does that has nothing else to do."""
    call(*args)


def far(ranks: Sequence[NearBy]) -> FarDrafter:
    return FarDrafter(ranks, at_once)


def wanted(number: int, token_ids: Sequence[int], gpu: int) -> Wanted:
    return Wanted(str(number), "", token_ids, 1, 2, gpu)


CALLS = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 5), st.tuples(st.integers(0, GPUS - 1), st.integers(0, 3)), max_size=6),
        st.sets(st.integers(0, 5), max_size=2),
    ),
    max_size=12,
)


@given(calls=CALLS)
@settings(max_examples=40)
def test_each_is_drafted_for_where_it_runs(calls: list[tuple[dict[int, tuple[int, int]], set[int]]]) -> None:
    """Requests grow, move and end in any order: their GPU knows all their tokens, no other one holds anything, and no
    token is told twice to the same."""
    ranks = [NearBy(gpu) for gpu in range(GPUS)]
    drafter, tokens, places = far(ranks), dict[int, list[int]](), dict[int, int]()
    told = 0
    for asked, ended in calls:
        for number, (gpu, more) in asked.items():
            known = tokens.setdefault(number, [number])
            known += range(more)
            told += 1 + more if places.get(number) is None else more
            told += len(known) - more if places.get(number, gpu) != gpu else 0
            places[number] = gpu
        drafts = drafter.draft([wanted(number, tokens[number], gpu) for number, (gpu, _) in asked.items()])
        assert drafts == [[gpu, number, len(tokens[number]), 2] for number, (gpu, _) in asked.items()]
        held = {int(name): known for rank in ranks for name, known in rank.echo.known.items()}
        assert {number: held[number] for number in asked} == {number: tokens[number] for number in asked}
        assert sorted(int(name) for rank in ranks for name in rank.echo.known) == sorted(places)
        assert all(str(number) in ranks[gpu].echo.known for number, gpu in places.items())
        drafter.forget([str(number) for number in ended])
        for number in ended:
            tokens.pop(number, None)
            places.pop(number, None)
    sent = [each for rank in ranks for message in rank.sent if isinstance(message, Draft) for each in message.wanted]
    assert sum(len(each.token_ids) for each in sent) == told


def test_one_that_cannot_draft_leaves_no_answer_behind() -> None:
    """The drafter is then left out; the others' answers are taken, and not for those of the next time."""
    ranks = [NearBy(gpu) for gpu in range(2)]
    drafter, both = far(ranks), [wanted(0, [1, 2], 0), wanted(1, [3], 1)]
    ranks[0].echo.fails = True
    with pytest.raises(RuntimeError, match="GPU 0 could not draft"):
        drafter.draft(both)
    ranks[0].echo.fails = False
    assert drafter.draft(both) == [[0, 0, 2, 2], [1, 1, 1, 2]]
    ranks[1].end()
    with pytest.raises(EngineFaultError, match="GPU 1"):
        drafter.draft([wanted(1, [3], 1)])


def drafting(planner: Planner) -> Plan:
    """A plan by which all that can be drafted pays."""
    plan = planned(planner)
    price = StepPrice(step_seconds=1.0, row_seconds=1e-6, spare_seconds=0.5, max_rows=100)
    return replace(plan, drafts=replace(plan.drafts, price=price))


async def test_tokens_equal_the_reference(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model drafts for itself, so that all is accepted; requests give way to each other, and one leaves; a
    constraint holds behind drafted tokens. Then a rank ends before it answers, and so does everything else."""
    made, sent, send = reference("opt"), dict[RankProcess, list[Draft | Forget]](), RankProcess.send

    def watched(rank: RankProcess, message: tuple[object, ...]) -> None:
        if isinstance(message, Draft | Forget):
            sent.setdefault(rank, []).append(message)
        send(rank, message)

    def asked() -> list[set[str]]:
        """Requests that each rank has drafted for."""
        drafts = [[each for each in messages if isinstance(each, Draft)] for messages in sent.values()]
        return [{each.request_id for message in of_rank for each in message.wanted} for of_rank in drafts]

    def killing(rank: RankProcess, message: tuple[object, ...]) -> None:
        if isinstance(message, Draft):
            os.kill(rank.pid, signal.SIGKILL)
        send(rank, message)

    monkeypatch.setattr(RankProcess, "send", watched)
    config = config_for(
        made,
        2,
        cache_policy="activation",
        min_batch=6,
        gpu_memory="32MiB",  # an eighth is the draft model's
        host_memory="650KiB",
        draft_model=str(made.directory),
        max_draft_tokens=3,
    )
    matching = SamplingParams(temperature=0.0, max_tokens=12, constraint=Regex("[ab]{3}(c|d)+"))
    async with Engine(config, choose_plan=drafting) as engine, asyncio.timeout(60):
        leaver = await engine.submit(made.prompts[8], GREEDY, request_id="leaver")
        others = asyncio.gather(*(collect(engine.generate(prompt, GREEDY)) for prompt in made.prompts[:8]))
        await until(lambda: "leaver" in set().union(*asked()))
        leaver.close()
        assert [ids(deltas) for deltas in await others] == [output[: GREEDY.max_tokens] for output in made.outputs[:8]]
        stats = engine.stats()
        constrained = await collect(engine.generate(made.prompts[0], matching))
        await idle(engine)
        monkeypatch.setattr(RankProcess, "send", killing)
        with pytest.raises(EngineFaultError):
            await collect(engine.generate(made.prompts[0], GREEDY))
    assert "tasks have not ended" not in caplog.text
    assert re.fullmatch("[ab]{3}[cd]+", text(constrained))
    assert 0 < stats.accepted_tokens == stats.drafted_tokens
    assert stats.preemptions > 0
    assert len(asked()) == 2
    assert all(asked())
    forgotten = {name for each in chain(*sent.values()) if isinstance(each, Forget) for name in each.request_ids}
    assert "leaver" in forgotten
    assert len(forgotten) >= 9  # all that ended before the last was drafted for
