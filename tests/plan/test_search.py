"""The planner's answers for well-known models: near the best of an independent enumeration, and they really fit."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.config import CachePolicy, EngineConfig, Placement
from hsrpc.plan import planner as planner_module
from hsrpc.plan.device_memory import Staging, device_bytes
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.sizes import ModelSizes
from hsrpc.plan.step_time import Candidates, StepModel, Traffic
from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockKind, BlockManager, PoolId, Tier
from hsrpc.schedule.recompute import NO_RECOMPUTE
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler, SchedulerLimits
from hsrpc.schedule.sweep import BUFFERS
from tests.plan.test_plan import GIB, blocks_of, make_sizes

H100 = Hardware(
    load_bandwidth=55e9,
    store_bandwidth=55e9,
    duplex_share=0.8,
    gemm_rate=650e12,
    memory_bandwidth=2.9e12,
    launch_time=4e-4,
    prompt_launch_time=9e-4,
    boundary_time=1e-3,
    request_time=40e-6,
)
RTX_4090 = Hardware(load_bandwidth=25e9, store_bandwidth=25e9, gemm_rate=140e12, memory_bandwidth=0.9e12)
OPT = {
    "1.3b": make_sizes(num_layers=24, hidden=2048, heads=32, ffn=8192, vocab=50272),
    "6.7b": make_sizes(num_layers=32, hidden=4096, heads=32, ffn=16384, vocab=50272),
    "13b": make_sizes(num_layers=40, hidden=5120, heads=40, ffn=20480, vocab=50272),
    "30b": make_sizes(num_layers=48, hidden=7168, heads=56, ffn=28672, vocab=50272),
}
CONTEXT, OUTPUT, BLOCK, LONGEST = 576, 128, 16, 2048
TRAFFIC = Traffic(context=CONTEXT, prompt=512, output=OUTPUT, longest=LONGEST)
HOST = 100 * GIB


def plan_for(sizes: ModelSizes, device: int, hardware: Hardware = H100, host: int = HOST, **settings: object) -> Plan:
    lengths = {"expected_context": CONTEXT, "expected_output": OUTPUT}
    return Planner(sizes, Budgets(device=device, host=host), hardware, EngineConfig(**(lengths | settings))).plan()


def enumerate_all(sizes: ModelSizes, device: int) -> float:
    """The highest mean throughput of a coarse grid: every batch, resident share, chunk, and kinds of both tiers."""
    kv, activation = map(sizes.max_row_bytes, BlockKind)
    axes = {
        "batch": (1, 2, 4, 8, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 160, 192, 224, 256, 384, 512),
        "resident": np.linspace(0, 1, 26),
        "device_share": (0.0, 0.5, 1.0),
        "host_share": (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
        "chunk": (256, 1024, 4096),
        "rows": (LONGEST, 128 * 2**20 // kv, 512 * 2**20 // kv),
    }
    grid = np.array(list(product(*axes.values())), dtype=np.float64).T
    batch, resident, device_share, host_share, chunk, rows = grid
    total = sizes.layers_bytes
    uses_activations = (device_share > 0) | (host_share > 0)
    staging = Staging(
        batch=batch,
        rows=rows,
        activation_rows=uses_activations * rows,
        queries=chunk + batch,
        step_tokens=np.maximum(chunk, 2048) + batch,
        graph_batch=batch,
        table=LONGEST // BLOCK,
    )
    streamed = (1 - resident) * sizes.layers[0].weight_bytes
    room = device - sum(device_bytes(sizes, staging).values()) - resident * total - BUFFERS * streamed
    host_room = HOST - streamed * sizes.num_layers
    block_bytes = sizes.num_layers * BLOCK
    device_blocks = np.maximum(0, room) // (block_bytes * ((1 - device_share) * kv + device_share * activation))
    host_blocks = np.maximum(0, host_room) // (block_bytes * ((1 - host_share) * kv + host_share * activation))
    enough = device_blocks + host_blocks >= LONGEST // BLOCK + (batch - 1) * (CONTEXT // BLOCK + 1)
    fits = (room >= 0) & (host_room >= 0) & enough
    times = StepModel(sizes, H100, TRAFFIC).predict(
        Candidates(
            batch=batch,
            streamed=streamed,
            on_device=np.minimum(1, device_blocks * BLOCK / (batch * CONTEXT)),
            on_device_at_end=np.minimum(1, device_blocks * BLOCK / (batch * (512 + OUTPUT))),
            device_share=device_share,
            host_share=host_share,
            recomputed=0.0,
            chunk=chunk,
            prompt_queries=chunk,
            rows=rows,
        )
    )
    return float((batch / times.mean_step)[fits].max())


@pytest.mark.parametrize("device", [24, 80])
@pytest.mark.parametrize("name", list(OPT))
def test_the_plan_is_near_the_best_of_an_enumeration(name: str, device: int):
    """At 24 and 80 GiB: within 2 % of the best of a coarse grid, in both budgets, with blocks for what it promises."""
    sizes = OPT[name]
    plan = plan_for(sizes, device * GIB)
    assert plan.prediction.mean_tokens_per_second >= 0.98 * enumerate_all(sizes, device * GIB)
    assert sum(plan.device_bytes.values()) <= device * GIB
    assert sum(plan.host_bytes.values()) <= HOST
    cached = plan.max_batch - plan.recompute.tokens / CONTEXT
    needed = LONGEST // BLOCK + int(cached - 1) * (CONTEXT // BLOCK + 1)
    assert sum(plan.num_blocks.values()) >= needed


@pytest.mark.parametrize("gpus", [1, 2])
def test_leaving_out_choices_costs_nothing(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most choices of resident weights are not evaluated: with all of them a plan is within half a percent as fast."""
    sizes = OPT["13b"].on_gpus(gpus)
    few = plan_for(sizes, 24 * GIB)
    monkeypatch.setattr(planner_module, "_STRIDE", 1)
    every = plan_for(sizes, 24 * GIB)
    assert few.prediction.mean_tokens_per_second >= 0.995 * every.prediction.mean_tokens_per_second


@pytest.mark.parametrize(("name", "device"), [("1.3b", 24), ("6.7b", 24), ("6.7b", 80), ("13b", 80)])
def test_what_fits_stays(name: str, device: int):
    """A model that fits keeps all weights and the batch's whole cache, as K and V, on the device."""
    plan = plan_for(OPT[name], device * GIB)
    assert plan.resident_share == 1.0
    assert plan.activation_share == 0.0
    assert plan.prediction.bus == plan.prediction.launch == 0.0
    assert blocks_of(plan, Tier.DEVICE) * BLOCK >= plan.max_batch * (512 + OUTPUT)


@pytest.mark.parametrize(("name", "at_least"), [("13b", 190), ("30b", 80)])
def test_what_does_not_fit_streams_for_many(name: str, at_least: float):
    """OPT-13B and 30B at 24 GiB: a large batch of activations shares the weights' stream, near the known limits."""
    plan = plan_for(OPT[name], 24 * GIB)
    assert plan.activation_share > 0.9
    assert 0 < plan.resident_share < 1
    assert at_least < plan.prediction.tokens_per_second < 1.2 * at_least
    assert plan.prediction.step == pytest.approx(plan.prediction.bus, rel=0.05)


def test_the_search_is_quick():
    """The largest grid, OPT-30B with room for every choice, takes one to four seconds of a core, by how busy it is."""
    start = time.process_time()
    plan_for(OPT["30b"], 80 * GIB)
    assert time.process_time() - start < 15


def test_scarce_compute_wants_a_share_inside():
    """RTX 4090, OPT-30B, 1024 tokens, all on the host: bus and GPU balance at a share inside (0, 1)."""
    lengths = {"expected_context": 1024, "expected_output": 2048, "max_batch": 96, "placement": Placement.HOST}
    plan = plan_for(OPT["30b"], 24 * GIB, RTX_4090, host=200 * GIB, **lengths)
    assert 0.6 < plan.activation_share < 0.85
    assert plan.policy is CachePolicy.HYBRID
    assert plan.prediction.gpu == pytest.approx(7 / 8 * plan.prediction.bus, rel=0.03)


def test_the_tiers_may_differ():
    """A GPU that is short of compute beside its bus keeps K and V on the device; a small host holds activations."""
    hardware = replace(H100, gemm_rate=60e12)
    plan = plan_for(OPT["13b"], 40 * GIB, hardware, host=8 * GIB, min_batch=64, max_batch=64)
    device, host = ((plan.num_blocks[p], blocks_of(plan, p.tier)) for p in (PoolId.DEVICE_KV, PoolId.HOST_ACTIVATION))
    assert device[0] > 0.9 * device[1] > 0
    assert host[0] > 0.9 * host[1] > 0


@pytest.mark.parametrize("name", ["6.7b", "30b"])
@pytest.mark.parametrize("part", [0.9, 0.75])
def test_a_bound_holds_with_a_chunk_beside(name: str, part: float):
    """`max_step_time` bounds a step with a full chunk of the longest prompt beside, and the chunk stays useful."""
    free = plan_for(OPT[name], 24 * GIB)
    bound = free.prediction.longest_step * part
    plan = plan_for(OPT[name], 24 * GIB, max_step_time=bound)
    sizes, step = OPT[name], plan.prediction
    token = (sizes.layers[0].flop(1) + sizes.layers[0].attention_flop(LONGEST)) / H100.gemm_rate * sizes.num_layers
    parts = -(-plan.max_prefill_tokens // (plan.buffers.queries - plan.max_batch))
    rest = max(0, step.mini_batches - parts)
    launches = sizes.num_layers * (rest * H100.launch_time + parts * H100.prompt_launch_time)
    with_chunk = max(step.bus, launches, step.gpu + plan.max_prefill_tokens * token) + step.boundary
    assert step.longest_step == pytest.approx(max(step.step, with_chunk))
    assert step.longest_step <= bound * (1 + 1e-9)
    assert plan.max_prefill_tokens >= 16


@pytest.mark.parametrize("device", [24, 80])
@pytest.mark.parametrize("name", list(OPT))
def test_chunks_keep_their_bounds(name: str, device: int):
    """Prompt tokens beside decoding keep up with the traffic, or hide behind weights or launches; never too many."""
    plan, layer = plan_for(OPT[name], device * GIB), OPT[name].layers[0]
    coming = plan.max_batch * 512 / OUTPUT
    hiding = max(sum(plan.streamed_bytes) / H100.load_bandwidth, OPT[name].num_layers * H100.prompt_launch_time)
    hidden = hiding / (OPT[name].num_layers * (layer.flop(1) + layer.attention_flop(256)) / H100.gemm_rate)
    backlog = 8 if sum(plan.streamed_bytes) else 2
    assert 256 <= plan.max_prefill_tokens <= min(8192, max(256, backlog * coming, hidden))
    assert plan.max_prefill_tokens <= plan.max_idle_prefill_tokens <= 16384
    assert plan.buffers.queries <= plan.max_prefill_tokens + plan.max_batch
    if plan.prediction.bus:
        delay = max(plan.prediction.step, OPT[name].num_layers * H100.prompt_launch_time)
        assert plan.prediction.longest_step <= plan.prediction.step + delay
        assert plan.max_prefill_tokens >= min(hidden, 8192) - 1
    else:
        assert plan.max_prefill_tokens >= min(max(2 * coming, hidden), 2700) - 1
        assert plan.buffers.queries == plan.max_prefill_tokens + plan.max_batch


def test_large_chunks_use_the_weights_stream():
    """With all weights on the host, a step of prompts alone computes at more than 60 % of the GEMM rate."""
    for sizes in (OPT["6.7b"], OPT["13b"], OPT["30b"]):
        plan = plan_for(sizes, 24 * GIB, placement=Placement.HOST)
        compute = plan.max_idle_prefill_tokens * sizes.layers[0].flop(1) / H100.gemm_rate
        assert compute > 0.6 * max(compute, sizes.layers[0].weight_bytes / H100.load_bandwidth)


def test_what_was_asked_for_is_both_chunks():
    """A given `max_prefill_tokens` is the most of any step."""
    plan = plan_for(OPT["30b"], 24 * GIB, max_prefill_tokens=700)
    assert plan.max_prefill_tokens == plan.max_idle_prefill_tokens == 700


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_resident_share_that_is_asked_for_is_kept(share: float):
    """As many weights stay as were asked for, to within one tensor."""
    plan = plan_for(OPT["13b"], 40 * GIB, resident_share=share)
    largest = OPT["13b"].layers[0].largest_first[0].device_bytes
    total = OPT["13b"].layers_bytes
    assert share * total - largest <= plan.device_bytes[DeviceUse.RESIDENT_WEIGHTS] <= share * total


def test_prompts_count():
    """Short outputs mean many prompts: the same model on the same machine gives fewer tokens a second, never more."""
    rates = [
        plan_for(OPT["6.7b"], 24 * GIB, expected_output=output).prediction.mean_tokens_per_second
        for output in (8, 64, 512)
    ]
    assert rates[0] < 0.5 * rates[1] < rates[1] < rates[2]


def test_a_batch_that_gains_nothing_is_not_chosen():
    """OPT-1.3B at 80 GiB: attention grows with the batch, so a larger one is faster by next to nothing."""
    plan = plan_for(OPT["1.3b"], 80 * GIB)
    larger = [plan_for(OPT["1.3b"], 80 * GIB, max_batch=int(part * plan.max_batch)) for part in (1.1, 1.25, 1.5, 2)]
    best = max(other.prediction.mean_tokens_per_second for other in larger)
    assert 1.001 < best / plan.prediction.mean_tokens_per_second < 1.015


@pytest.mark.parametrize(("name", "device"), [("6.7b", 24), ("13b", 24), ("13b", 40), ("30b", 24)])
def test_a_plan_predicts_other_lengths(name: str, device: int):
    """At the expected length the prediction is the plan's own; longer requests, and more of them, take longer."""
    plan = plan_for(OPT[name], device * GIB)
    same = predict_at(plan, OPT[name], CONTEXT)
    for part in ("bus", "forward", "regenerate", "gather", "attention", "step"):
        assert getattr(same, part) == pytest.approx(getattr(plan.prediction, part), rel=0.01, abs=1e-4)
    assert same.prefill == 0
    assert predict_at(plan, OPT[name], 2 * CONTEXT).step > same.step
    assert predict_at(plan, OPT[name], CONTEXT, plan.max_batch // 2).step < same.step


@given(
    name=st.sampled_from(["6.7b", "13b"]),
    device=st.integers(12, 60),
    host=st.integers(24, 80),
    more=st.sampled_from(["device", "host", "bus"]),
    factor=st.floats(1.01, 2),
)
@settings(max_examples=12)
def test_more_is_never_worse(name: str, device: int, host: int, more: str, factor: float):
    """More device or host memory, or a faster bus, never lowers the predicted throughput (beyond the search's 2 %)."""
    sizes = replace(OPT[name], layers=OPT[name].layers[: OPT[name].num_layers // 4])
    budgets = {"device": device * GIB // 4, "host": host * GIB // 4}
    better, hardware = dict(budgets), H100
    if more == "bus":
        hardware = replace(H100, load_bandwidth=H100.load_bandwidth * factor, store_bandwidth=55e9 * factor)
    else:
        better[more] = int(budgets[more] * factor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_module, "MAX_BATCH", 48)
        rates = [plan_for(sizes, hardware=h, **b).prediction for h, b in ((H100, budgets), (hardware, better))]
    assert rates[1].mean_tokens_per_second >= 0.98 * rates[0].mean_tokens_per_second


def test_requests_that_are_missing_leave_room_for_prompts():
    """OPT-13B at 24 GiB: half a batch, with the prompt tokens that then fit, computes for as long as a full one."""
    sizes, device = OPT["13b"], 24 * GIB
    plan = plan_for(sizes, device)
    token = sizes.num_layers * (sizes.layers[0].flop(1) + sizes.layers[0].attention_flop(LONGEST)) / H100.gemm_rate
    decoding = predict_at(plan, sizes, CONTEXT, plan.max_batch // 2).gpu
    tokens = plan.max_prefill_tokens + plan.spare_prefill_tokens * (plan.max_batch - plan.max_batch // 2)
    full = plan.prediction.gpu + plan.max_prefill_tokens * token
    assert decoding + tokens * token == pytest.approx(full, rel=0.02)
    assert plan_for(sizes, device, max_step_time=2 * plan.prediction.longest_step).spare_prefill_tokens == 0
    assert plan_for(OPT["1.3b"], device).spare_prefill_tokens == 0


@pytest.mark.parametrize(("name", "batch"), [("6.7b", 128), ("13b", 64), ("30b", 56)])
def test_a_gpu_that_would_wait_computes_anew(name: str, batch: int):
    """Everything on the host, all caches activations: some requests keep none, and a step takes 4 % less at least."""
    settings = {"max_batch": batch, "max_model_len": 640, "placement": Placement.HOST}
    plan, cached = (
        plan_for(OPT[name], 24 * GIB, host=108 * GIB, recompute_share=share, **settings) for share in (None, 0)
    )
    assert plan.recompute.tokens > 0.1 * batch * CONTEXT
    assert cached.recompute.tokens == 0
    assert plan.prediction.step < 0.96 * cached.prediction.step
    assert plan.prediction.gpu < plan.prediction.bus < cached.prediction.bus
    assert plan.buffers.queries >= 512 + OUTPUT
    assert predict_at(plan, OPT[name], CONTEXT).step == pytest.approx(plan.prediction.step, rel=0.02)


def test_a_small_chunk_of_prompts_keeps_nobody_from_being_computed_anew():
    """Tokens computed anew take the mini-batches that they need: what a step takes of prompts has no part in that."""
    settings = {"max_batch": 64, "max_model_len": 640, "placement": Placement.HOST, "max_prefill_tokens": 256}
    assert plan_for(OPT["13b"], 24 * GIB, **settings).recompute.tokens > 0
    forced = plan_for(OPT["13b"], 24 * GIB, recompute_share=0.14, **settings)
    assert forced.prediction.mini_batches <= -(-forced.recompute.tokens // CONTEXT) + 2


def scheduler_limits(plan: Plan) -> SchedulerLimits:
    """The engine's, by name."""
    names = {item.name for item in fields(SchedulerLimits)} & {item.name for item in fields(Plan)}
    return SchedulerLimits(**{name: getattr(plan, name) for name in names})


def test_what_is_computed_anew_takes_less_time_to_launch_than_the_bus_takes():
    """Shorter requests than expected, and so more of them: their mini-batches hold several each."""
    settings = {"max_batch": 64, "max_model_len": 640, "placement": Placement.HOST, "max_prefill_tokens": 512}
    plan = plan_for(OPT["13b"], 24 * GIB, **settings)
    scheduler = Scheduler(BlockManager(plan.num_blocks, plan.max_batch), scheduler_limits(plan), ())
    for number in range(64):
        scheduler.add(Request(str(number), [0] * 325, SamplingParams(max_tokens=100, ignore_eos=True), number, 0.0))
    for _ in range(80):
        step = scheduler.schedule(0.0)
        assert step is not None
        scheduler.commit(step.step_id, [1] * len(step.sampling), 0.0)
    assert step.counts.requests == 64
    assert step.counts.recomputed > 0
    rows = sum(pool.num_used for pool in scheduler.blocks[0].pools.values()) * plan.block_size
    bus = plan.recompute.weights + rows * plan.costs.load_activation
    assert len(step.mini_batches) * H100.prompt_launch_time <= bus


def test_contexts_that_outgrow_a_mini_batch_are_predicted_cached():
    """A request that keeps no cache is part of one mini-batch: where none can be, none is."""
    plan = plan_for(OPT["13b"], 24 * GIB, max_batch=64, placement=Placement.HOST)
    context = plan.buffers.queries + 1
    cached = replace(plan, recompute=NO_RECOMPUTE)
    assert plan.recompute.tokens > 0
    assert predict_at(plan, OPT["13b"], context) == predict_at(cached, OPT["13b"], context)


@pytest.mark.parametrize("policy", [CachePolicy.KV, CachePolicy.ACTIVATION])
def test_a_policy_that_was_asked_for_keeps_all_caches(policy: CachePolicy):
    """Only `auto` may leave some out, or who asks for it."""
    settings = {"cache_policy": policy, "max_batch": 64, "placement": Placement.HOST}
    assert plan_for(OPT["13b"], 24 * GIB, **settings).recompute.tokens == 0
    forced = plan_for(OPT["13b"], 24 * GIB, recompute_share=0.25, **settings)
    assert forced.recompute.tokens == 64 * CONTEXT / 4
    assert forced.recompute.is_forced
