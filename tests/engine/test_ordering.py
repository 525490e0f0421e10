"""Each wait, and each promise to keep memory, is needed: without any one of them the ordered device finds a race.

They are known by the function that calls for them, not by lines. Who adds, moves or removes one edits `SHOWN`.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch

from hsrpc import Engine, EngineConfig
from hsrpc.engine import lanes
from hsrpc.engine.generation import Generation
from hsrpc.engine.lanes import crosses
from hsrpc.engine.startup import ChoosePlan
from hsrpc.errors import OutOfDeviceMemoryError
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import LayerSizes, Stays
from hsrpc.schedule.step import Packed, StepCounts, StopFlag
from hsrpc.schedule.sweep import BatchShape, LayerPlacement, Op, OpKind, sweep
from hsrpc.testing.half_group import half_of_two, plan_for_half
from hsrpc.testing.ordered_device import OrderedDevice, RaceError, ordered_devices
from tests.engine.gpus.support import in_all_ways, plan_where
from tests.engine.reference import Reference
from tests.engine.support import collect, config_for, greedy, idle, parts, tight, weights_on_device
from tests.engine.test_scaled_weights import edit_config, edit_tensors

NUM_REQUESTS, NUM_TOKENS = 6, 10


async def crowd(engine: Engine, made: Reference, num_tokens: int = NUM_TOKENS) -> None:
    """Requests of several lengths, so that prompts are computed beside others' tokens."""
    prompts = made.prompts[:NUM_REQUESTS]
    await asyncio.gather(*(collect(engine.generate(p, greedy(num_tokens, logprobs=1))) for p in prompts))
    await idle(engine)


async def streaming(made: Reference) -> None:
    """Weights, K and V and activations all cross the bus; the first steps are of a prompt alone, and sample nothing."""
    async with Engine(config_for(made, gpu_memory="1GiB", host_memory="64MiB", placement="host")) as engine:
        await collect(engine.generate([5] * 60, greedy(2)))
        await crowd(engine, made)


async def preemption(made: Reference) -> None:
    """As few blocks as the planner allows."""
    async with Engine(tight(made)) as engine, asyncio.timeout(60):
        await crowd(engine, made, 40)
        assert engine.stats().preemptions > 0


async def partly_resident(made: Reference) -> None:
    """Some of each layer's weights stay."""
    config = config_for(made, gpu_memory="1GiB", host_memory="64MiB", resident_share=0.5)
    async with Engine(config) as engine, asyncio.timeout(60):
        assert 0 < engine.plan.resident_share < 1
        await crowd(engine, made)


async def weights_resident(made: Reference) -> None:
    """One thread launches loads and layers."""
    async with Engine(weights_on_device(made)) as engine, asyncio.timeout(60):
        await crowd(engine, made)


async def mini_batches(made: Reference) -> None:
    """Buffers for one request at a time: several mini-batches a layer."""
    config = tight(made, max_batch=3, expected_context=24)
    async with Engine(config) as engine, asyncio.timeout(60):
        rows = engine.plan.buffers.rows
        assert rows < sum(map(len, made.prompts[:3])) + 3 * 20
        await crowd(engine, made, 20)


async def recompute(made: Reference) -> None:
    """Some requests keep no cache."""
    config = tight(made, recompute_share=0.6, expected_context=90)
    async with Engine(config) as engine, asyncio.timeout(60):
        assert engine.plan.recompute.tokens > 0
        await crowd(engine, made)


async def ahead(made: Reference) -> None:
    """Steps as graphs, launched before the tokens of those before."""
    config = config_for(made, gpu_memory="1GiB", host_memory="1GiB", cache_policy="kv", activation_share=None)
    async with Engine(config) as engine, asyncio.timeout(60):
        assert parts(engine).executor.runs_ahead
        await crowd(engine, made)


async def ahead_and_loads(made: Reference) -> None:
    """Some blocks on the host: steps as graphs, and others that load what they read."""
    config = tight(made, cache_policy="kv", activation_share=None, resident_share=1.0)
    async with Engine(replace(config, gpu_memory=config.gpu_memory + 150_000)) as engine, asyncio.timeout(60):
        assert parts(engine).executor.runs_ahead
        await collect(engine.generate(made.prompts[0], greedy(4)))
        await crowd(engine, made, 40)
        await collect(engine.generate(made.prompts[0], greedy(4)))
        assert engine.stats().cache_loaded_bytes > 0


async def coded(made: Reference, dtype: str) -> None:
    settings = {"gpu_memory": "1GiB", "host_memory": "64MiB", "placement": "host", "weight_coding": "lossless"}
    async with Engine(config_for(made, dtype=dtype, **settings)) as engine, asyncio.timeout(60):
        assert engine.plan.decode_buffer_bytes
        await crowd(engine, made)


async def coded_float16(made: Reference) -> None:
    """Weights cross the bus coded, with planes."""
    await coded(made, "float16")


async def coded_bfloat16(made: Reference) -> None:
    """The same, without."""
    await coded(made, "bfloat16")


async def kept_packed(made: Reference) -> None:
    """Some weights stay on the device packed, experts too: they are decoded with those that cross the bus."""
    settings = {"experts": "stream", "resident_share": 0.5, "resident_weights": "packed"}
    config = config_for(quantised(made), gpu_memory="1GiB", host_memory="64MiB", **settings)
    async with Engine(config) as engine:
        assert engine.plan.kept_bytes
        await crowd(engine, made)


async def cancels(made: Reference) -> None:
    """Steps are abandoned in the middle, over and over."""
    async with Engine(tight(made)) as engine, asyncio.timeout(60):
        for delay in range(10):
            generations = [await engine.submit(prompt, greedy(20)) for prompt in made.prompts[:2]]
            await anext(generations[0])
            await asyncio.sleep(0.001 * delay)
            for generation in generations:
                generation.close()
        await crowd(engine, made)


async def gives_up(config: EngineConfig, made: Reference, choose_plan: ChoosePlan = Planner.plan) -> None:
    """Steps end in the middle of a layer, with the device under way; the next ones are right."""
    async with Engine(config, choose_plan=choose_plan) as engine, asyncio.timeout(60):
        executor, num_failures, left, drawn = parts(engine).executor, 0, 9, Random(0)
        launch = executor._launch

        def failing(state: object, op: Op) -> None:
            nonlocal num_failures, left
            left -= 1
            if left == 0:  # any kind of operation, in any layer
                num_failures, left = num_failures + 1, drawn.randrange(3, 60)
                raise torch.OutOfMemoryError("no memory")
            launch(state, op)

        executor._launch = failing

        async def one(generation: Generation) -> None:
            with suppress(OutOfDeviceMemoryError):
                await collect(generation)

        while num_failures < 20:
            await asyncio.gather(*[one(await engine.submit(prompt, greedy(5))) for prompt in made.prompts[:3]])
        executor._launch = launch
        await crowd(engine, made)


async def out_of_memory(made: Reference) -> None:
    await gives_up(config_for(made, gpu_memory="1GiB", host_memory="64MiB", placement="host"), made)


async def out_of_memory_weights_resident(made: Reference) -> None:
    await gives_up(weights_on_device(made), made)


async def window(made: Reference) -> None:
    """All layers read a part of the cache; it is preempted and computed again."""
    async with Engine(tight(made)) as engine, asyncio.timeout(60):
        assert engine.spec.sizes.sliding_window
        await crowd(engine, made, 40)


async def windows(made: Reference) -> None:
    """Every second layer has one: steps as graphs, and others that load what each layer sees."""
    await ahead_and_loads(made)


async def absorbing(made: Reference) -> None:
    """Single queries attend to latents: in blocks on the device, and from the host in buffers beside their new rows."""
    settings = {"cache_policy": "activation", "activation_share": None, "latent_attention": "absorb"}
    async with Engine(tight(made, **settings)) as engine, asyncio.timeout(60):
        assert engine.plan.absorbs
        await crowd(engine, made)
        assert engine.stats().cache_loaded_bytes > 0


async def chosen_experts(made: Reference) -> None:
    """Experts come on demand, the other weights stay: one thread waits for the choice."""
    config = config_for(made, experts="demand", resident_share=0.6, gpu_memory="1GiB", host_memory="64MiB")
    async with Engine(config) as engine, asyncio.timeout(60):
        await crowd(engine, made)
        assert engine.stats().expert_loads > engine.stats().expert_hits > 0


async def chosen_experts_in_graphs(made: Reference, share: float = 0.6) -> None:
    """All of the cache is read in place: steps are graphs, in segments between which the host waits for the choice."""
    settings = {"cache_policy": "kv", "activation_share": None, "gpu_memory": "1GiB", "host_memory": "1GiB"}
    config = config_for(made, experts="demand", resident_share=share, **settings)
    async with Engine(config) as engine, asyncio.timeout(60):
        await crowd(engine, made)
        assert engine.stats().expert_loads > engine.stats().expert_hits > 0


async def chosen_experts_and_streaming(made: Reference) -> None:
    """The other weights and blocks cross the bus beside them; some requests keep no cache, so steps have groups."""
    config = tight(made, experts="demand", recompute_share=0.6, expected_context=90)
    async with Engine(config) as engine, asyncio.timeout(60):
        await crowd(engine, made)
        assert engine.stats().weights_streamed_bytes > engine.stats().expert_loaded_bytes > 0


async def packed_experts(made: Reference) -> None:
    """Quantised experts come on demand, and are decoded where they lie; the other weights stream, or stay packed."""
    settings = {"experts": "demand", "resident_weights": "packed", "resident_share": 0.6}
    config = config_for(quantised(made), gpu_memory="1GiB", host_memory="64MiB", **settings)
    async with Engine(config) as engine, asyncio.timeout(60):
        assert engine.plan.demand.is_coded
        await crowd(engine, made)
        assert engine.stats().expert_loads > engine.stats().expert_hits > 0


async def packed_experts_in_graphs(made: Reference) -> None:
    """The same in graphs: a segment begins with the decoding of what was loaded behind the one before."""
    await chosen_experts_in_graphs(quantised(made), share=0.85)


async def streamed_experts(made: Reference) -> None:
    """Coded experts stream; those that were chosen are decoded, in steps of several groups."""
    settings = {"weight_coding": "lossless", "dtype": "bfloat16", "placement": "host", "recompute_share": 0.6}
    async with Engine(config_for(made, gpu_memory="1GiB", host_memory="64MiB", **settings)) as engine:
        assert engine.plan.recompute.tokens > 0
        await crowd(engine, made)


def quantised(made: Reference) -> Reference:
    """The same model, its matrices in codes of float8; nobody compares its tokens."""
    directory = made.directory.with_name(f"{made.directory.name}-fp8")
    if not directory.exists():
        shutil.copytree(made.directory, directory)
        edit_tensors(directory, with_codes)
        edit_config(directory, {"quant_method": "modelopt", "quant_algo": "FP8"})
    return Reference(directory, made.prompts, made.outputs)


def with_codes(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name], tensors[f"{name}_scale"] = (tensors[name] / scale).to(torch.float8_e4m3fn), scale


async def gathered(made: Reference) -> None:
    """One of two GPUs: it loads half of what streams, and gets the other half; steps are stopped, others are idle."""
    config = config_for(made, gpu_memory="1GiB", host_memory="64MiB", placement="host")
    with half_of_two():
        async with Engine(config, choose_plan=plan_for_half) as engine, asyncio.timeout(60):
            await crowd(engine, made)
            await idle_steps(engine)
            leaver = await engine.submit([5] * 60, greedy(20))
            await anext(leaver)
            leaver.close()
            await idle(engine)
            await crowd(engine, made, 3)


async def gathered_coded(made: Reference) -> None:
    """The same, with weights that are decoded once they are whole."""
    settings = {"gpu_memory": "1GiB", "host_memory": "64MiB", "placement": "host"}
    config = config_for(made, dtype="bfloat16", weight_coding="lossless", **settings)
    with half_of_two():
        async with Engine(config, choose_plan=plan_for_half) as engine, asyncio.timeout(60):
            await crowd(engine, made)


async def gathered_spread(
    made: Reference, stays: Callable[[int, LayerSizes], Stays] = in_all_ways, **more: str
) -> None:
    """Some of its weights are spread over both GPUs; steps in which this one is idle, the first among them."""
    config = config_for(made, **({"gpu_memory": "1GiB", "host_memory": "64MiB"} | more))
    with half_of_two():
        plan = partial(plan_where, gpus=2, stays=stays)
        async with Engine(config, choose_plan=plan) as engine, asyncio.timeout(60):
            await idle_steps(engine)
            await crowd(engine, made)
            await idle_steps(engine)
            await crowd(engine, made, 3)


async def gathered_spread_coded(made: Reference) -> None:
    """The same, with weights that are decoded once they are whole."""
    await gathered_spread(made, dtype="bfloat16", weight_coding="lossless")


async def one_layer_is_spread(made: Reference) -> None:
    """The others stay: its buffers are filled in turns, a step ahead, and the device is behind where steps fail."""

    def stays(number: int, layer: LayerSizes) -> Stays:
        return Stays(spread=1.0) if number == 1 else Stays(ready=layer.names)

    config = config_for(made, gpu_memory="1GiB", host_memory="64MiB")
    with half_of_two():
        await gives_up(config, made, partial(plan_where, gpus=2, stays=stays))


async def idle_steps(engine: Engine) -> None:
    """Steps in which the other GPUs compute, and this one does not."""
    executor = parts(engine).executor
    for _ in range(3):
        counts = StepCounts(requests=0, decode=0, prefill=0, recomputed=0, context=0)
        nothing = Packed(step_id=-1, mini_batches=(), sampling=(), counts=counts)
        assert await executor.execute(executor.order(nothing, StopFlag())) == ([], [])


Scenario = Callable[[Reference], Awaitable[None]]
SCENARIOS: list[Scenario] = [
    streaming,
    preemption,
    partly_resident,
    weights_resident,
    mini_batches,
    recompute,
    ahead,
    ahead_and_loads,
    coded_float16,
    coded_bfloat16,
    kept_packed,
    cancels,
    out_of_memory,
    out_of_memory_weights_resident,
    window,
    windows,
    absorbing,
    chosen_experts,
    chosen_experts_in_graphs,
    chosen_experts_and_streaming,
    packed_experts,
    packed_experts_in_graphs,
    streamed_experts,
    gathered,
    gathered_coded,
    gathered_spread,
    gathered_spread_coded,
    one_layer_is_spread,
]

LAUNCH = "engine.lanes.StepRun.launch"
"""Waits for the events that the step's list asks for, each kind of which is left out by itself: see `EDGES`."""

CHOICE = "host waits for compute in engine.tasks.experts.ExpertLoader.load"

SHOWN: dict[str, Scenario] = {
    "compute waits for load in engine.tasks.executor.Executor._join_streams": out_of_memory_weights_resident,
    "host waits for all in engine.opened_model.OpenedModel.open": streaming,
    CHOICE: chosen_experts,
    "compute waits for load in engine.graphs.DecodeGraphs._launch": chosen_experts_in_graphs,
    "host waits for compute in model.sampler.PendingSample.result": streaming,
    "load waits for compute in engine.lanes.StepRun.hold_loads": cancels,
    "load waits for store in engine.lanes.StepRun.hold_loads": streaming,
    "gather waits for load in engine.lanes.StepRun._hold_gathers": one_layer_is_spread,
    "memory is kept for store in device.device.Device._upload_memory": streaming,
    "memory is kept for store in engine.tasks.cache.CacheManager.store": streaming,
    f"compute waits for gather in {LAUNCH}": gathered,
    f"compute waits for load in {LAUNCH}": streaming,
    f"gather waits for load in {LAUNCH}": gathered,
    f"gather waits for compute in {LAUNCH}": gathered_spread,
    f"load waits for gather in {LAUNCH}": gathered,
    f"load waits for compute in {LAUNCH}": streaming,
    f"store waits for compute in {LAUNCH}": streaming,
}
"""Whoever waits, and where: a scenario that goes wrong without it."""

UNSEEN: dict[str, tuple[Scenario, str]] = {
    "host waits for compute in engine.tasks.executor.Executor._sample": (streaming, "the host's pace"),
    "host waits for compute in engine.pace.Pace.turn": (mini_batches, "the host's pace, and memory"),
}
"""Whoever waits for something other than order on the device, and for what: without it nothing is out of order."""

EDGES: dict[tuple[OpKind, OpKind], Scenario] = {
    (OpKind.ATTEND, OpKind.LOAD_BLOCKS): mini_batches,
    (OpKind.ATTEND, OpKind.STORE): streaming,
    (OpKind.FINISH, OpKind.GATHER_SPREAD): gathered_spread,
    (OpKind.FINISH, OpKind.LOAD_WEIGHTS): streaming,
    (OpKind.GATHER, OpKind.DECODE): gathered_coded,
    (OpKind.GATHER, OpKind.LOAD_WEIGHTS): gathered,
    (OpKind.GATHER, OpKind.PROJECT): gathered,
    (OpKind.GATHER_SPREAD, OpKind.DECODE): gathered_spread_coded,
    (OpKind.GATHER_SPREAD, OpKind.LOAD_WEIGHTS): gathered_spread,
    (OpKind.GATHER_SPREAD, OpKind.PROJECT): gathered_spread,
    (OpKind.LOAD_BLOCKS, OpKind.PLACE): streaming,
    (OpKind.LOAD_EXPERTS, OpKind.DECODE_EXPERTS): packed_experts,
    (OpKind.LOAD_EXPERTS, OpKind.FINISH): chosen_experts,
    (OpKind.LOAD_WEIGHTS, OpKind.DECODE): coded_bfloat16,
    (OpKind.LOAD_WEIGHTS, OpKind.GATHER): gathered,
    (OpKind.LOAD_WEIGHTS, OpKind.PROJECT): streaming,
}
"""Which kind of operation waits for which, first the one that is waited for; a scenario that goes wrong without it."""


CHOSEN = (OpKind.ROUTE, OpKind.LOAD_EXPERTS)
"""The edge that the host waits for as well: it has to know what was chosen."""


def reference_of(scenario: Scenario, reference: Callable[[str], Reference]) -> Reference:
    models = {window: "mistral-window", windows: "ministral", absorbing: "deepseek-v2"}
    of_experts = (chosen_experts, chosen_experts_in_graphs, chosen_experts_and_streaming)
    of_experts += (packed_experts, packed_experts_in_graphs, streamed_experts, kept_packed)
    models |= dict.fromkeys(of_experts, "qwen3-moe")
    return reference(models.get(scenario, "opt"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_nothing_is_out_of_order_and_every_wait_is_listed(
    scenario: Scenario, reference: Callable[[str], Reference], ordered: list[OrderedDevice]
) -> None:
    """The fixture finds no race; whoever waits is known here."""
    await scenario(reference_of(scenario, reference))
    (device,) = ordered
    assert device.num_operations > 1000
    assert device.sites - SHOWN.keys() - UNSEEN.keys() == set()


async def run_without(site: str, scenario: Scenario, made: Reference) -> list[str]:
    """The races of a scenario in which one site is left out that occurs in it."""
    with ordered_devices(without=site) as opened:
        await scenario(made)
    (device,) = opened
    assert site in device.sites
    return device.races


@pytest.mark.parametrize(("site", "scenario"), SHOWN.items())
async def test_without_it_there_is_a_race(site: str, scenario: Scenario, reference: Callable[[str], Reference]) -> None:
    """Each wait and each keep, left out one at a time."""
    assert await run_without(site, scenario, reference_of(scenario, reference)) != []


@pytest.mark.parametrize("site", UNSEEN)
async def test_what_is_said_to_order_nothing_orders_nothing(site: str, reference: Callable[[str], Reference]) -> None:
    """Once it does, it belongs to the others."""
    scenario, _ = UNSEEN[site]
    assert await run_without(site, scenario, reference_of(scenario, reference)) == []


def test_every_edge_of_a_list_is_known() -> None:
    """Operations of different streams wait for one another in no other way."""
    kinds = itertools.product((False, True), repeat=3)
    placements = tuple(
        LayerPlacement(2**26, coded, has_coded_experts=experts, on_demand=demand) for coded, experts, demand in kinds
    )
    batches = tuple(BatchShape(group, loads=True, rebuilds=True, stores=True) for group in (0, 0, 1))
    gathered = tuple(place._replace(is_gathered=True) for place in placements if not place.on_demand)
    spread = tuple(place._replace(bus_bytes=0, spread_bytes=2**20) for place in gathered)
    between = tuple(itertools.chain(*zip(gathered, spread, gathered, strict=True)))
    several = (sweep(layers, shapes).ops for layers in (gathered, spread, between) for shapes in (batches, ()))
    found = set()
    for ops in (sweep(placements, batches).ops, *several):
        found |= {(ops[a].kind, op.kind) for op in ops for a in op.after if crosses(op.kind, ops[a].kind)}
    assert found == EDGES.keys() | {CHOSEN}


@pytest.mark.parametrize(
    ("edge", "scenario"),
    [*EDGES.items(), ((OpKind.LOAD_BLOCKS, OpKind.PLACE), windows)],
    ids=lambda each: str(getattr(each, "__name__", each)),
)
async def test_without_an_edge_there_is_a_race(
    edge: tuple[OpKind, OpKind],
    scenario: Scenario,
    reference: Callable[[str], Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The events that one kind of operation waits for, left out one kind at a time."""
    before, after = edge
    monkeypatch.setattr(lanes, "crosses", lambda kind, first: crosses(kind, first) and (first, kind) != (before, after))
    with pytest.raises(RaceError), ordered_devices():
        await scenario(reference_of(scenario, reference))


@pytest.mark.parametrize("scenario", [chosen_experts, chosen_experts_in_graphs])
async def test_experts_are_not_overwritten_before_their_last_reader(
    scenario: Scenario, reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice is behind all that used experts before it: loads that wait neither for it nor for its event race.

    In graphs the host alone waits, so that its wait orders all.
    """
    made = reference_of(scenario, reference)
    monkeypatch.setattr(lanes, "crosses", lambda kind, first: crosses(kind, first) and (first, kind) != CHOSEN)
    races = await run_without(CHOICE, scenario, made)
    assert any(race.startswith("experts on demand") and "write by copy_runs" in race for race in races)
    assert any("reading the result" in race for race in races)
    with ordered_devices():  # the host's wait alone orders all
        await scenario(made)
