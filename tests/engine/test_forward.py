"""Mini-batches that go through projections and MLP together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc import Engine
from hsrpc.engine import forward
from hsrpc.engine.forward import Forward, group_batches
from hsrpc.model.families.opt import Opt
from hsrpc.request import SamplingParams
from hsrpc.schedule.packing import pack
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import MiniBatch, Work
from tests.engine.reference import Reference
from tests.engine.support import collect, greedy, idle, ids, roomy


def batch_of(count: int) -> MiniBatch:
    return pack([Work(Request("r", [1] * count, SamplingParams(), 0, 0.0), 0, count, samples=True)], 16, None)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), most=st.integers(1, 20))
def test_groups_are_neighbours_that_fit(counts: list[int], most: int) -> None:
    """In order, none lost, none larger than it may be unless it is one mini-batch, none smaller than it need be."""
    batches = [batch_of(count) for count in counts]
    groups = group_batches(batches, most)
    assert [batch for group in groups for batch in group] == batches
    sizes = [[batch.num_queries for batch in group] for group in groups]
    assert all(sum(size) <= most or len(size) == 1 for size in sizes)
    assert all(sum(size) + after[0] > most for size, after in pairwise(sizes))


async def test_a_decode_step_reads_the_weights_once(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several mini-batches attend one after the other; projections and MLP of a layer are computed once for all."""
    made, calls = reference("opt"), {"finish": 0, "compute": 0}
    finish, compute = Opt.finish_layer, Forward.compute

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(Opt, "finish_layer", counted("finish", finish))
    monkeypatch.setattr(Forward, "compute", counted("compute", compute))
    async with Engine(roomy(made, max_batch=3)) as engine:
        buffers = engine._scheduler.limits.buffers
        generations = [await engine.submit(prompt, greedy(40)) for prompt in made.prompts[:3]]
        assert sum(map(len, made.prompts[:3])) + 3 * 40 > buffers.rows  # several mini-batches in the end
        outputs = [ids(await collect(generation)) for generation in generations]
        assert outputs == [output[:40] for output in made.outputs[:3]]
        assert calls["compute"] > calls["finish"] == engine.stats().steps * engine.spec.sizes.num_layers
        await idle(engine)


async def test_one_group_at_a_time_holds_its_projections(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace has room for one: those of the group before are gone when the next is projected."""
    made, held, most = reference("opt"), [], 0
    project = Opt.queries_keys_values

    def watched(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal most
        found = project(*args)
        held.append(ref(found[1]))
        most = max(most, sum(tensor() is not None for tensor in held))
        return found

    monkeypatch.setattr(Opt, "queries_keys_values", watched)
    monkeypatch.setattr(forward, "group_batches", lambda batches, _: [[batch] for batch in batches])
    async with Engine(roomy(made, max_batch=3)) as engine:
        generations = [await engine.submit(prompt, greedy(40)) for prompt in made.prompts[:3]]
        outputs = [ids(await collect(generation)) for generation in generations]
        assert outputs == [output[:40] for output in made.outputs[:3]]
        assert len(held) > engine.stats().steps * engine.spec.sizes.num_layers  # several groups in some steps
        assert most == 1
        await idle(engine)


async def test_no_more_is_launched_ahead_than_memory_is_planned_for(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mini-batches, and in their new tokens: what is launched keeps its rows until they are stored."""
    made, under_way = reference("opt"), []
    compute = Forward.compute

    def watched(self: Forward, *args: object) -> object:
        found = compute(self, *args)
        under_way.append(([count for _, count in self._under_way], self._max_queries))
        return found

    monkeypatch.setattr(Forward, "compute", watched)
    async with Engine(roomy(made, max_batch=3)) as engine:
        outputs = [ids(await collect(engine.generate(made.prompts[0], greedy(12)))) for _ in range(2)]
        assert outputs == [made.outputs[0][:12]] * 2
        await idle(engine)
    assert max(len(counts) for counts, _ in under_way) == 9  # one more than were launched before it
    assert all(sum(counts) <= 2 * most for counts, most in under_way)
    assert any(sum(counts) > most for counts, most in under_way)
