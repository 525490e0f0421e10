"""Experts on demand in the planner: what they take, when they are chosen, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hsrpc.config import DeviceKind, EngineConfig, ExpertLoading
from hsrpc.errors import ConfigError
from hsrpc.model.formats.choice import uniform
from hsrpc.model.formats.lossless import Lossless
from hsrpc.model.spec import ModelSpec, in_formats, named_spec
from hsrpc.plan.advice import _with_weight_bits
from hsrpc.plan.demand import demand_of
from hsrpc.plan.device_memory import query_bytes
from hsrpc.plan.expert_outlook import expert_outlook
from hsrpc.plan.fitted import CHOICE_SECONDS, GRAPH_BYTES
from hsrpc.plan.layer_times import LayerTimes
from hsrpc.plan.machine import Machine
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.placement import demand_choices
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.question import Question
from hsrpc.plan.roofline import Roofline, StepRecord, roofline
from hsrpc.plan.simulated_step import placements, simulated_step
from hsrpc.plan.sizes import ModelSizes, Stays
from hsrpc.schedule.blocks import PoolId
from tests.plan.plans import GIB, HARDWARE

COUNT, K, NUM_LAYERS = 64, 4, 6
SHAPE = {
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 3072,
    "moe_intermediate_size": 768,
    "num_experts": COUNT,
    "num_experts_per_tok": K,
    "mlp_only_layers": [0],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
"""A dense layer, and five with experts: 4.5 MiB each."""
EXPERT_BYTES = 3 * 1024 * 768 * 2
DEVICE, HOST = 1.2, 8
"""GiB: most experts have no room."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    file = tmp_path_factory.mktemp("shape") / "config.json"
    file.write_text(json.dumps(SHAPE))
    return named_spec(str(file), None)


@pytest.fixture(scope="module")
def sizes(spec: ModelSpec) -> ModelSizes:
    return spec.sizes


def make(sizes: ModelSizes, device: float = DEVICE, **settings: object) -> Plan:
    budgets = Budgets(device=int(device * GIB), host=HOST * GIB, runtime=2**26)
    return Planner(sizes, budgets, HARDWARE, EngineConfig(max_prefill_tokens=512, **settings)).plan()


def test_slots_follow_the_other_weights(sizes: ModelSizes) -> None:
    """The shares of all weights are spent on what every step needs, then on slots, each layer alike."""
    others, slots_bytes = sizes.without_experts.layers_bytes, (NUM_LAYERS - 1) * EXPERT_BYTES
    assert others + COUNT * slots_bytes == sizes.layers_bytes
    shares = [0.0, (others - 1) / sizes.layers_bytes, (others + 5.5 * slots_bytes) / sizes.layers_bytes, 1.0]
    found = demand_choices(sizes, shares)
    assert [choice.demand.slots for choice in found] == [0, 0, 5, COUNT]
    names = [layer.names for layer in sizes.without_experts.layers]
    assert [sum(len(stays.ready) for stays in choice.resident) for choice in found[::3]] == [0, sum(map(len, names))]
    assert all(choice.resident == tuple(map(Stays, names)) for choice in found[2:])
    assert not any("expert_" in name for layer in names for name in layer)


@pytest.mark.parametrize("slots", [0, 1, 17, COUNT])
def test_rows_are_slots_and_room_for_all_others(sizes: ModelSizes, slots: int) -> None:
    """A layer without experts has none; the shared area is behind the last slot."""
    demand = demand_of(sizes, slots * (NUM_LAYERS - 1) * EXPERT_BYTES)
    assert demand is not None
    assert (demand.slots, demand.expert_bytes, demand.counts) == (slots, EXPERT_BYTES, (0, *[COUNT] * 5))
    assert demand.first_rows == (0, *(number * slots for number in range(6)))
    assert demand.num_rows == 5 * slots + COUNT - slots
    assert demand.hit_rate == pytest.approx(slots / COUNT)
    assert demand.table_bytes == 5 * COUNT * 2 * 8


def test_the_planner_takes_what_is_faster(sizes: ModelSizes) -> None:
    """One request: what it touches is a small part. Many: they touch nearly all, which stream beside the compute."""
    few, many = make(sizes, max_batch=1), make(sizes, min_batch=400, max_batch=400)
    assert few.demand is not None
    assert many.demand is None
    for plan in (few, many):
        batch = plan.max_batch
        rates = [
            make(sizes, min_batch=batch, max_batch=batch, experts=each).prediction.mean_tokens_per_second
            for each in ("stream", "demand")
        ]
        assert plan.prediction.mean_tokens_per_second == pytest.approx(max(rates))
        assert max(rates) > 1.02 * min(rates)


def test_a_model_that_fits_stays(sizes: ModelSizes) -> None:
    """All experts on the device: no choice is waited for, and graphs run the steps."""
    plan = make(sizes, device=8)
    assert plan.demand is None
    assert plan.resident_share == 1
    assert plan.device_bytes[DeviceUse.GRAPHS] > 0


def test_lines_of_a_plan(sizes: ModelSizes) -> None:
    """Within the budgets; experts' rows are a line, and graphs are one behind each choice, for two sizes."""
    plan = make(sizes, max_batch=2, experts="demand")
    demand = plan.demand
    assert demand is not None
    assert 0 < demand.slots < COUNT
    assert plan.device_bytes[DeviceUse.EXPERTS] == demand.num_rows * EXPERT_BYTES
    assert demand.num_segments == 6
    logits = 2 * 4 * sizes.vocab_size
    assert plan.device_bytes[DeviceUse.GRAPHS] == query_bytes(sizes, 2) + logits + 2 * 6 * GRAPH_BYTES
    assert plan.host_bytes[HostUse.STREAMED_WEIGHTS] == demand.host_bytes + sum(plan.streamed_bytes)
    assert sum(plan.device_bytes.values()) <= plan.budgets.device
    assert sum(plan.host_bytes.values()) <= plan.budgets.host
    assert [place.on_demand for place in placements(plan, sizes)] == [False, *[True] * 5]
    share = (plan.device_bytes[DeviceUse.RESIDENT_WEIGHTS] + 5 * demand.slots * EXPERT_BYTES) / sizes.layers_bytes
    assert plan.resident_share == pytest.approx(share, rel=1e-3)
    assert DeviceUse.EXPERTS not in make(sizes, max_batch=2, experts="stream").device_bytes


def test_seconds_of_what_is_missed(sizes: ModelSizes) -> None:
    """Bytes of the experts that a batch touches, less those in slots, and a wait; a step takes that beside all else.

    Graphs run it where all its cache is K and V on the device.
    """
    times, demand = LayerTimes(sizes, HARDWARE), demand_of(sizes, 16 * 5 * EXPERT_BYTES)
    assert demand is not None
    for tokens, groups in ((1, 1), (7, 1), (8, 2)):
        touched = groups * COUNT * (1 - (1 - K / COUNT) ** (tokens / groups))
        bus = touched * 0.75 * EXPERT_BYTES / HARDWARE.load_bandwidth
        assert times.on_demand(tokens, demand.missed, groups) == pytest.approx((bus + groups * CHOICE_SECONDS) * 5 / 6)
    plan = make(sizes, max_batch=1, experts="demand")
    step = predict_at(plan, sizes, 100)
    assert step.bus == 0
    assert step.experts == pytest.approx(6 * times.on_demand(1, plan.demand.missed))
    at_hits = predict_at(plan, sizes, 100, hit_rate=1.0)
    assert at_hits.experts == pytest.approx(5 * CHOICE_SECONDS)  # they are waited for all the same
    assert step.step - at_hits.step == pytest.approx(step.experts - at_hits.experts)
    assert step.launch == 0
    assert step.boundary == pytest.approx(HARDWARE.boundary_time + HARDWARE.request_time)
    assert step.step == pytest.approx(step.gpu + step.experts + step.boundary)
    activations = {pool: 100 * (pool is PoolId.DEVICE_ACTIVATION) for pool in PoolId}
    launched = predict_at(replace(plan, num_blocks=activations), sizes, 100)
    assert launched.launch == pytest.approx(6 * HARDWARE.launch_time)
    assert launched.launch > launched.gpu
    assert launched.step == pytest.approx(launched.launch + launched.experts + launched.boundary)
    assert plan.prediction.longest_step > plan.prediction.step + 6 * times.on_demand(512, plan.demand.missed) / 2


def test_where_other_weights_stream_the_list_has_the_waits(sizes: ModelSizes) -> None:
    """The step's time is that of its list."""
    plan = make(sizes, max_batch=2, experts="demand", resident_share=0.0)
    assert any(plan.streamed_bytes)
    plan = replace(plan, hardware=replace(HARDWARE, launch_time=0, hop_time=0))  # the bus binds
    step = predict_at(plan, sizes, 100)
    weights = sum(layer.bus_bytes for layer in plan.placed) / HARDWARE.load_bandwidth
    assert step.step - step.boundary >= 0.99 * (weights + step.experts)
    assert simulated_step(plan, sizes, replace(step, experts=0), recomputes=False) < step.step - step.experts


@pytest.mark.parametrize("batch", [32, 64, 256])
def test_the_search_knows_that_cached_tokens_wait_for_experts(
    sizes: ModelSizes, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it compares agrees with the list, where caches cross the bus beside experts on demand, and products take
    about as long.
    """
    hardware = replace(HARDWARE, memory_bandwidth=5e10, launch_time=0.0, hop_time=0.0)
    settings = {"max_batch": batch, "min_batch": batch, "max_model_len": 1024, "expected_context": 700}
    settings |= {"placement": "host", "cache_policy": "kv", "experts": "demand", "max_prefill_tokens": 512}
    budgets = Budgets(device=int(DEVICE * GIB), host=HOST * GIB, runtime=2**26)
    planner = Planner(sizes, budgets, hardware, EngineConfig(**settings))
    by_list = planner.plan().prediction
    monkeypatch.setattr("hsrpc.plan.build.simulated", lambda plan, sizes, closed, recomputes: closed)
    closed = planner.plan().prediction
    assert min(by_list.bus, by_list.experts, by_list.forward) > 0.05 * by_list.step
    assert closed.step == pytest.approx(by_list.step, rel=0.03)  # six layers: the first and the last are not as others


def test_the_limit_of_a_step_lets_experts_and_what_waits_take_turns(sizes: ModelSizes) -> None:
    """Their own products may be computed beside; they are those that the step took, whatever was to be expected."""
    plain = StepRecord(
        seconds=1.0,
        num_requests=4,
        decode_tokens=4,
        prefill_tokens=0,
        context_tokens=400,
        weight_bytes=0,
        cache_bytes=0,
        regenerated_tokens=0,
    )
    experts = sizes.commonest.experts
    assert experts is not None
    all_taken = 5 * experts.touched(4)

    def limit(taken: float, loads: int = 0) -> Roofline:
        counts = {"expert_hits": taken - loads, "expert_loads": loads, "weight_bytes": loads * EXPERT_BYTES}
        return roofline(replace(plain, **counts), sizes, HARDWARE)

    whole, hits = roofline(plain, sizes, HARDWARE), limit(all_taken)
    assert hits.forward == pytest.approx(whole.forward)
    assert (whole.in_turn, whole.seconds) == (0, whole.gpu)
    assert limit(20).seconds < hits.seconds == hits.gpu  # the router prefers some; nothing but the GPU works
    products = all_taken * EXPERT_BYTES / HARDWARE.memory_bandwidth
    assert hits.in_turn == pytest.approx(hits.gpu - products)
    for loads in (1, 30):
        found, bus = limit(all_taken, loads), loads * EXPERT_BYTES / HARDWARE.load_bandwidth
        assert (found.bus, found.in_turn) == pytest.approx((bus, bus + hits.in_turn))
        assert found.seconds == max(hits.gpu, found.in_turn) > bus


def question(spec: ModelSpec, *, coded: bool = False, **settings: object) -> Question:
    formats = [spec, in_formats(spec, uniform(Lossless(spec.dtype), spec.dtype))]
    machine = Machine(
        name="GPU",
        kind=DeviceKind.CUDA,
        device_memory=int(DEVICE / 0.9 * GIB),
        host_memory=2 * HOST * GIB,
        dtype="bfloat16",
        hardware=HARDWARE,
    )
    config = EngineConfig(max_prefill_tokens=512, **settings)
    choices = tuple(each.sizes.on_gpus(config.num_gpus) for each in (formats[1:] if coded else formats))
    return Question(choices=choices, machine=machine, config=config)


def test_experts_that_are_coded_cannot_come_on_demand(spec: ModelSpec) -> None:
    """The one of two choices of formats that can is taken; where there is no such, the setting is refused."""
    _, plan = question(spec, experts="demand", max_batch=1).answer()
    assert plan.demand is not None
    with pytest.raises(ConfigError, match=r"experts='demand'.*use experts=auto, or weight_coding=none"):
        question(spec, coded=True, experts="demand").answer()
    assert question(spec, coded=True, max_batch=1).answer()[1].demand is None


def test_a_model_without_experts_has_none_on_demand() -> None:
    """Nothing is said of them, and the setting is refused."""
    sizes = named_spec("opt-125m", torch.float16).sizes
    with pytest.raises(ConfigError, match="no experts"):
        make(sizes, experts="demand")
    asked = replace(question_of(sizes), choices=(sizes,))
    assert expert_outlook(asked, sizes, asked.answer()[1]) is None


def question_of(sizes: ModelSizes) -> Question:
    machine = Machine(
        name="GPU", kind=DeviceKind.CUDA, device_memory=GIB, host_memory=GIB, dtype="float16", hardware=HARDWARE
    )
    return Question(choices=(sizes,), machine=machine, config=EngineConfig())


@pytest.mark.parametrize("given", list(ExpertLoading))
def test_the_outlook_names_the_batch_from_which_streaming_is_as_fast(spec: ModelSpec, given: ExpertLoading) -> None:
    """Whichever way was planned; on both sides of it the predictions say so."""
    asked = question(spec, experts=given, max_batch=4)
    planner, plan = asked.answer()
    found = expert_outlook(asked, planner.sizes, plan)
    assert found is not None
    assert (found.loading is ExpertLoading.DEMAND) == (plan.demand is not None)
    assert found.loading is given or given is ExpertLoading.AUTO
    assert (found.count, found.slots) == (COUNT, plan.demand.slots if plan.demand else 0)
    assert found.streaming_from is not None
    assert found.streaming_from > 1
    other = "stream" if plan.demand else "demand"
    others, other_plan = question(spec, experts=other, max_batch=4, max_model_len=plan.max_model_len).answer()
    both = [(plan, planner.sizes), (other_plan, others.sizes)]
    streaming, on_demand = both if other == "demand" else both[::-1]
    for batch, is_faster in ((found.streaming_from - 1, False), (found.streaming_from, True)):
        context = plan.prediction.context
        steps = [predict_at(*each, context, batch).step for each in (streaming, on_demand)]
        assert (steps[0] <= steps[1]) == is_faster


@pytest.mark.parametrize("gpus", [2, 4])
def test_to_several_gpus_they_do_not_come_on_demand(spec: ModelSpec, gpus: int) -> None:
    """Though for few requests one GPU would choose that, and be faster: from how many on it is not is said."""
    with pytest.raises(ConfigError, match=rf"gpus={gpus}: .*experts=demand.*host memory; use experts=auto, or gpus=1"):
        EngineConfig(gpus=gpus, experts="demand")
    _, alone = question(spec, max_batch=1).answer()
    asked = question(spec, max_batch=gpus, gpus=gpus)
    planner, plan = asked.answer()
    assert alone.demand is not None
    assert plan.demand is None
    found = expert_outlook(asked, planner.sizes, plan)
    assert found is not None
    assert found.loading is ExpertLoading.STREAM
    assert found.streaming_from is not None
    assert found.streaming_from > 1
    on_demand, demanding = question(spec, experts="demand", max_batch=gpus, max_model_len=plan.max_model_len).answer()
    context = plan.prediction.context
    for requests, is_faster in ((found.streaming_from - 1, False), (found.streaming_from, True)):
        streaming = predict_at(plan, planner.sizes, context, -(-requests // gpus)).step
        assert (streaming <= predict_at(demanding, on_demand.sizes, context, requests).step) == is_faster


def test_smaller_weights_are_decoded_before_they_are_read(sizes: ModelSizes) -> None:
    """Advice on fewer bits counts them on the bus; tokens read of experts what they are decoded to."""
    smaller = _with_weight_bits(sizes, 4.25)
    before, after = sizes.layers[1], smaller.layers[1]
    on_bus = [sum(tensor.bus_bytes for tensor in layer.expert_tensors) for layer in (before, after)]
    assert on_bus[1] == pytest.approx(on_bus[0] * 4.25 / 16, rel=0.01)
    assert after.read_bytes(1) == before.read_bytes(1)
    assert all(tensor.decoded_bytes == tensor.device_bytes for tensor in after.expert_tensors)
