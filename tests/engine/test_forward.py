"""Mini-batches that go through projections and MLP together, and how far they are launched ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from weakref import ref

import pytest
import torch

from hsrpc import Engine
from hsrpc.engine.pace import Pace
from hsrpc.model.families.opt import Opt
from hsrpc.model.family import Projection
from hsrpc.schedule import assemble
from hsrpc.schedule.sweep import OpKind
from tests.engine.reference import Reference
from tests.engine.support import before, collect, greedy, idle, ids, roomy

pytestmark = pytest.mark.usefixtures("ordered")


async def test_a_decode_step_reads_the_weights_once(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several mini-batches attend one after the other; projections and MLP of a layer are computed once for all."""
    made, calls = reference("opt"), Counter[OpKind | str]()
    finish = Opt.finish_layer

    def finish_counted(*args: object) -> object:
        calls["finish"] += 1
        return finish(*args)

    monkeypatch.setattr(Opt, "finish_layer", finish_counted)
    async with Engine(roomy(made, max_batch=3)) as engine:
        before(engine, monkeypatch, {OpKind.PROJECT, OpKind.ATTEND}, lambda op: calls.update([op.kind]))
        generations = [await engine.submit(prompt, greedy(40)) for prompt in made.prompts[:3]]
        assert sum(map(len, made.prompts[:3])) + 3 * 40 > engine.plan.buffers.rows  # several mini-batches in the end
        outputs = [ids(await collect(generation)) for generation in generations]
        assert outputs == [output[:40] for output in made.outputs[:3]]
        assert calls[OpKind.ATTEND] > calls["finish"] == engine.stats().steps * engine.spec.sizes.num_layers
        assert calls[OpKind.PROJECT] == calls["finish"]
        await idle(engine)


async def test_one_group_at_a_time_holds_its_projections(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace has room for one: those of the group before are gone when the next is projected."""
    made, held, most = reference("opt"), [], 0
    project = Opt.project

    def watched(*args: torch.Tensor) -> Projection:
        nonlocal most
        found = project(*args)
        held.append(ref(found.kv))
        most = max(most, sum(tensor() is not None for tensor in held))
        return found

    monkeypatch.setattr(Opt, "project", watched)
    monkeypatch.setattr(assemble, "group_numbers", lambda queries, _: list(range(len(queries))))
    async with Engine(roomy(made, max_batch=3)) as engine:
        generations = [await engine.submit(prompt, greedy(40)) for prompt in made.prompts[:3]]
        outputs = [ids(await collect(generation)) for generation in generations]
        assert outputs == [output[:40] for output in made.outputs[:3]]
        assert len(held) > engine.stats().steps * engine.spec.sizes.num_layers  # several groups in some steps
        assert most == 1
        await idle(engine)


async def test_each_mini_batch_of_a_layer_waits_its_turn(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its new tokens, before the first of its operations: what is launched keeps its rows until they are stored.

    How long it waits is tested with the pace.
    """
    made, turns, attends, planned = reference("opt"), [], [], []
    begin, turn = Pace.__init__, Pace.turn

    def begun(pace: Pace, device: object, max_queries: int) -> None:
        planned.append(max_queries)
        begin(pace, device, max_queries)

    def watched(pace: Pace, place: tuple[int, int], num_queries: int) -> None:
        turns.append((place, num_queries))
        turn(pace, place, num_queries)

    monkeypatch.setattr(Pace, "__init__", begun)
    monkeypatch.setattr(Pace, "turn", watched)
    async with Engine(roomy(made, max_batch=3)) as engine:
        kinds = {OpKind.PROJECT, OpKind.PLACE, OpKind.REBUILD, OpKind.ATTEND, OpKind.FINISH, OpKind.STORE}

        def launched(op: object) -> None:
            assert turns[-1][0] == op.place
            attends.extend([op.place] * (op.kind is OpKind.ATTEND))

        before(engine, monkeypatch, kinds, launched)
        generations = [await engine.submit(prompt, greedy(40)) for prompt in made.prompts[:3]]
        outputs = [ids(await collect(generation)) for generation in generations]
        assert outputs == [output[:40] for output in made.outputs[:3]]
        await idle(engine)
        assert planned == [engine.plan.buffers.queries]
        assert [place for place, _ in groupby(place for place, _ in turns)] == attends
        assert {batch for (_, batch), _ in turns} > {0}
        computed = sum(len(prompt) + 39 for prompt in made.prompts[:3])
        assert sum(_counts_of_places(turns)) == engine.spec.sizes.num_layers * computed


def _counts_of_places(turns: list[tuple[tuple[int, int], int]]) -> list[int]:
    """New tokens of each mini-batch of a layer, in order: the same at each of its operations."""
    found = [{count for _, count in same} for _, same in groupby(turns, key=lambda turn: turn[0])]
    assert all(len(counts) == 1 for counts in found)
    return [counts.pop() for counts in found]
