"""Experts that come on demand: the same tokens at every size of the cache, and nothing that is not accounted for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from hsrpc import Engine, EngineConfig
from hsrpc.device.device import Event
from hsrpc.engine.forward import Pass
from hsrpc.engine.graphs import DecodeGraphs
from hsrpc.engine.stats import EngineStats
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.roofline import StepRecord
from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.step import MiniBatch
from hsrpc.schedule.sweep import Op, OpKind
from tests.engine.conftest import tightest
from tests.engine.reference import Reference
from tests.engine.support import before, collect, config_for, greedy, idle, ids, parts

MODEL = "qwen3-moe"
NUM_EXPERTS, NUM_LAYERS = 6, 3
"""Experts of a layer, and layers that have some; another one has none."""
IN_GRAPHS: dict[str, object] = {"cache_policy": "kv", "activation_share": None, "resident_share": 1.0}
WAYS: dict[str, dict[str, object]] = {"launched": {}, "in graphs": IN_GRAPHS, "others stream": {"resident_share": 0.0}}
"""Steps on one thread, in graphs, and by three tasks that take turns."""
POLICIES = [("kv", None), ("activation", None), ("hybrid", 0.5), ("recompute", None), ("auto", None)]


def with_slots(slots: int) -> Callable[[Planner], Plan]:
    """The planner's own plan, with so many slots in each layer."""

    def choose(planner: Planner) -> Plan:
        plan = planner.plan()
        assert plan.demand is not None
        demand = replace(plan.demand, slots=slots)
        return replace(plan, demand=demand, device_bytes=plan.device_bytes | {DeviceUse.EXPERTS: demand.device_bytes})

    return choose


def on_demand(made: Reference, **settings: object) -> EngineConfig:
    """Room for all; the other weights stay, or stream where nothing does."""
    room = {"gpu_memory": "1GiB", "host_memory": "1GiB", "resident_share": 0.5}
    return config_for(made, experts="demand", **(room | settings))


@contextmanager
def graphs_run() -> Iterator[list[int]]:
    """The sizes of the mini-batches that graphs run meanwhile."""
    run, found = DecodeGraphs.run, list[int]()

    def noted(graphs: DecodeGraphs, batch: MiniBatch, *others: object) -> Pass | None:
        found.append(batch.num_queries)
        return run(graphs, batch, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeGraphs, "run", noted)
        yield found


async def check(
    made: Reference,
    config: EngineConfig,
    choose: Callable[[Planner], Plan] = Planner.plan,
    observe: Callable[[StepRecord], object] | None = None,
) -> tuple[Plan, EngineStats]:
    """All prompts at once give the reference's tokens."""
    async with Engine(config, choose_plan=choose, observe=observe) as engine, asyncio.timeout(60):
        assert await outputs(engine, made.prompts, len(made.outputs[0])) == made.outputs
        await idle(engine)
        return engine.plan, engine.stats()


async def outputs(engine: Engine, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    streams = [collect(engine.generate(prompt, greedy(num_tokens))) for prompt in prompts]
    return [ids(deltas) for deltas in await asyncio.gather(*streams)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slots", range(NUM_EXPERTS + 1))
async def test_tokens_are_the_references_at_every_size(
    slots: int, way: str, reference: Callable[[str], Reference]
) -> None:
    """However steps are launched, batches that are padded among them; what was copied is what was counted."""
    made, seen, streams = reference(MODEL), list[StepRecord](), way == "others stream"
    with graphs_run() as sizes:
        plan, stats = await check(made, on_demand(made, **WAYS[way]), with_slots(slots), seen.append)
    assert plan.demand is not None
    assert (sum(plan.streamed_bytes) > 0) == streams
    assert {3, 5, 6} <= {*sizes} if way == "in graphs" else not sizes
    assert stats.expert_loads >= NUM_LAYERS * NUM_EXPERTS
    assert stats.expert_loaded_bytes == stats.expert_loads * plan.demand.expert_bytes
    assert (stats.expert_hits > 0) == (slots > 0)
    if slots == NUM_EXPERTS:
        assert stats.expert_loads == NUM_LAYERS * NUM_EXPERTS  # each once
    if not streams:
        assert sum(step.weight_bytes for step in seen) == stats.expert_loaded_bytes == stats.weights_streamed_bytes


@pytest.mark.parametrize("slots", [0, 1, 4])
@pytest.mark.parametrize(("policy", "share"), POLICIES)
async def test_tokens_do_not_depend_on_policies_and_budgets(
    policy: str, share: float | None, slots: int, reference: Callable[[str], Reference]
) -> None:
    """Requests are preempted, blocks and the other weights cross the bus beside the experts."""
    made = reference(MODEL)
    config = tightest(on_demand(made, cache_policy=policy, activation_share=share, resident_share=0.0))
    _, stats = await check(made, config, with_slots(slots))
    assert stats.preemptions > 0 or policy == "recompute"


async def test_no_step_is_launched_ahead_of_a_choice(reference: Callable[[str], Reference]) -> None:
    """Also where all of the cache is read in place, and steps of other models are graphs."""
    made = reference(MODEL)
    async with Engine(on_demand(made, **IN_GRAPHS)) as engine, asyncio.timeout(60):
        assert not parts(engine).executor.runs_ahead
        with graphs_run() as sizes:
            assert await outputs(engine, made.prompts[:4], 20) == [each[:20] for each in made.outputs[:4]]
        assert len(sizes) >= 19


EXPERT_FAMILIES = ("qwen2-moe", "mixtral", "olmoe", "granite-moe", "gpt-oss", "glm4-moe", "deepseek-v3")


@pytest.mark.parametrize("model", EXPERT_FAMILIES)
async def test_every_family_with_experts_loads_them_on_demand(
    model: str, reference: Callable[[str], Reference]
) -> None:
    """Shared experts, biases, other routers: what is no expert's is there in any case."""
    made = reference(model)
    config = tightest(config_for(made, experts="demand", cache_policy="kv", activation_share=None))
    await check(made, config, with_slots(2))


@pytest.mark.parametrize("model", EXPERT_FAMILIES)
async def test_graphs_of_every_family_wait_for_its_experts(model: str, reference: Callable[[str], Reference]) -> None:
    """Windows, sinks, routers by groups of experts, layers without experts before the others."""
    made = reference(model)
    async with Engine(on_demand(made, **IN_GRAPHS), choose_plan=with_slots(3)) as engine, asyncio.timeout(60):
        with graphs_run() as sizes:
            assert await outputs(engine, made.prompts[:3], 20) == [each[:20] for each in made.outputs[:3]]
        assert 3 in sizes  # padded
        assert engine.stats().expert_hits > 0
        await idle(engine)


async def test_padding_takes_the_experts_of_the_first_row(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests in a graph for four: nothing is loaded, or read, that none of them has chosen."""
    made, choices = reference("olmoe"), list[torch.Tensor]()
    async with Engine(on_demand(made, **IN_GRAPHS), choose_plan=with_slots(3)) as engine, asyncio.timeout(60):
        device = parts(engine).device
        arrived = device.arrived

        def noted(target: torch.Tensor, event: Event) -> torch.Tensor:
            found = arrived(target, event)
            if sizes and sizes[-1] == 3:  # no prompt comes any more
                choices.append(found.clone())
            return found

        monkeypatch.setattr(device, "arrived", noted)
        with graphs_run() as sizes:
            await outputs(engine, made.prompts[:3], 10)
    assert len(choices) > 4
    assert all(torch.equal(first, last) for first, _, _, last in choices)
    assert not all(torch.equal(first, second) for first, second, _, _ in choices)


async def test_graphs_that_attend_to_latents_wait_for_experts(reference: Callable[[str], Reference]) -> None:
    """Activations in place, as they are stored."""
    made = reference("deepseek-v3")
    latents = IN_GRAPHS | {"cache_policy": "activation", "latent_attention": "absorb"}
    async with Engine(on_demand(made, **latents), choose_plan=with_slots(3)) as engine, asyncio.timeout(60):
        assert engine.plan.absorbs
        with graphs_run() as sizes:
            assert await outputs(engine, made.prompts[:3], 20) == [each[:20] for each in made.outputs[:3]]
        assert 3 in sizes


async def test_graphs_and_other_steps_take_turns(reference: Callable[[str], Reference]) -> None:
    """Steps with prompts, or with blocks on the host, load experts that graphs find, and the other way round."""
    made = reference(MODEL)
    config = tightest(on_demand(made, **IN_GRAPHS))
    config = replace(config, gpu_memory=config.gpu_memory + 150_000)
    async with Engine(config, choose_plan=with_slots(1)) as engine, asyncio.timeout(60):
        with graphs_run() as sizes:
            assert await outputs(engine, made.prompts[:1], 20) == [made.outputs[0][:20]]
            assert len(sizes) == 19
            assert await outputs(engine, made.prompts[:8], 40) == [each[:40] for each in made.outputs[:8]]
            assert engine.stats().cache_loaded_bytes > 0
            assert await outputs(engine, made.prompts[:1], 20) == [made.outputs[0][:20]]
            assert len(sizes) >= 38
        await idle(engine)


async def test_requests_of_graphs_are_preempted(reference: Callable[[str], Reference]) -> None:
    """All blocks lie on the device, and there are few: prompts are computed anew between steps in graphs."""
    made = reference(MODEL)

    def few_blocks(planner: Planner) -> Plan:
        return replace(with_slots(2)(planner), num_blocks={pool: 14 * (pool is PoolId.DEVICE_KV) for pool in PoolId})

    async with Engine(on_demand(made, **IN_GRAPHS), choose_plan=few_blocks) as engine, asyncio.timeout(60):
        with graphs_run() as sizes:
            assert await outputs(engine, made.prompts[:8], 40) == [each[:40] for each in made.outputs[:8]]
        assert engine.stats().preemptions > 0
        assert len(sizes) > 40
        await idle(engine)


@pytest.mark.parametrize("recompute", [0.3, 1.0])
async def test_several_groups_of_a_step_load_one_after_the_other(
    recompute: float, reference: Callable[[str], Reference]
) -> None:
    """Mini-batches of recomputed requests go through the layers on their own; what one has used, the next may lose."""
    made = reference(MODEL)
    config = tightest(on_demand(made, recompute_share=recompute, expected_context=90))
    await check(made, config, with_slots(1))


@pytest.mark.parametrize("way", WAYS)
async def test_steps_that_are_left_in_the_middle_lose_no_expert(
    way: str, reference: Callable[[str], Reference]
) -> None:
    """Whatever a step had loaded when nobody waited for it any more: the next ones have the right weights."""
    made = reference(MODEL)
    async with Engine(on_demand(made, **WAYS[way]), choose_plan=with_slots(2)) as engine, asyncio.timeout(60):
        for delay in range(15):
            generations = [await engine.submit(prompt, greedy(20)) for prompt in made.prompts[:2]]
            await anext(generations[0])
            await asyncio.sleep(0.0005 * delay)
            for generation in generations:
                generation.close()
        await idle(engine)
        assert await outputs(engine, made.prompts[:4], 20) == [each[:20] for each in made.outputs[:4]]


@pytest.mark.parametrize("layer", [0, 1, 3])
async def test_nothing_is_launched_behind_the_choice_at_which_a_step_is_left(
    layer: int, reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experts may be loaded; the next request's step begins anew, and finds them or their like."""
    made = reference(MODEL)
    async with Engine(on_demand(made, **IN_GRAPHS), choose_plan=with_slots(2)) as engine, asyncio.timeout(60):
        loop, prefetcher, launched, left = asyncio.get_running_loop(), parts(engine).prefetcher, list[Op](), False
        load, generation = prefetcher.load_experts, await engine.submit(made.prompts[0], greedy(20))

        async def leave() -> None:
            generation.close()

        def loading(number: int) -> int:
            nonlocal left
            found = load(number)
            if number == layer and len(sizes) > 3 and not left:
                asyncio.run_coroutine_threadsafe(leave(), loop).result(20)
                launched.clear()
                left = True
            return found

        monkeypatch.setattr(prefetcher, "load_experts", loading)
        before(engine, monkeypatch, {*OpKind}, launched.append)
        with graphs_run() as sizes:
            await collect(generation)
            await idle(engine)
        assert left
        assert launched == []
        assert await outputs(engine, made.prompts[:4], 20) == [each[:20] for each in made.outputs[:4]]


@pytest.mark.parametrize("way", WAYS)
async def test_after_steps_that_ran_out_of_memory_all_experts_are_right(
    way: str, reference: Callable[[str], Reference]
) -> None:
    """Between choice and loads, between loads and use, and anywhere else."""
    made, kinds = reference(MODEL), [OpKind.ROUTE, OpKind.FINISH, OpKind.ATTEND, OpKind.PROJECT]
    async with Engine(on_demand(made, **WAYS[way]), choose_plan=with_slots(2)) as engine, asyncio.timeout(60):
        for kind in kinds:
            with pytest.MonkeyPatch.context() as patch:
                before(engine, patch, {kind}, partial(fail_in, layer=3))
                with pytest.raises(OutOfDeviceMemoryError):
                    await outputs(engine, made.prompts[:1], 20)
            await idle(engine)
            assert await outputs(engine, made.prompts[:3], 20) == [each[:20] for each in made.outputs[:3]]


def fail_in(op: Op, layer: int) -> None:
    if op.layer == layer:
        raise torch.OutOfMemoryError("no memory")


async def test_without_warm_up_counts_begin_at_nothing(reference: Callable[[str], Reference]) -> None:
    """And can be begun anew."""
    made = reference(MODEL)
    async with Engine(on_demand(made)) as engine:
        assert (engine.stats().expert_hits, engine.stats().expert_loads) == (0, 0)
        await outputs(engine, made.prompts[:1], 3)
        assert engine.stats().expert_loads > 0
        parts(engine).prefetcher.reset_counts()
        assert (engine.stats().expert_loads, engine.stats().weights_streamed_bytes) == (0, 0)
