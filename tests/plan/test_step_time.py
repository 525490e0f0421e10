"""Each fitted term of the step's model: what it changes by itself, and cases that were measured on a GPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hsrpc.model.formats.lossless import Lossless
from hsrpc.model.formats.plain import Plain
from hsrpc.model.spec import named_spec
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.fitted import PRODUCT_WAITING
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.layer_times import LayerTimes, beside
from hsrpc.plan.plan import REGENERATE_ROWS
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.plan.step_time import Candidates, StepModel, StepTimes, Traffic
from tests.plan.test_plan import OPT_6_7B as SIZES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
EVEN = Hardware(load_bandwidth=5e10, store_bandwidth=4e10, gemm_rate=5e14, memory_bandwidth=2e12)
"""No fitted term has an effect."""
LAYER = SIZES.layers[0]
LAYERS, BATCH, CONTEXT, PROMPT, OUTPUT = SIZES.num_layers, 64, 512, 448, 128
TRAFFIC = Traffic(context=CONTEXT, prompt=PROMPT, output=OUTPUT, longest=2048)
STREAMED = Candidates(
    batch=BATCH,
    streamed=LAYER.weight_bytes,
    on_device=0.0,
    on_device_at_end=0.0,
    device_share=0.0,
    host_share=1.0,
    recomputed=0.0,
    chunk=1024,
    prompt_queries=512,
    rows=16 * CONTEXT,
)
"""All on the host, activations: five mini-batches."""
NUM_PARTS = 5
RESIDENT = replace(STREAMED, streamed=0.0, on_device=1.0, on_device_at_end=1.0, host_share=0.0)
"""All on the device, K and V."""
CACHE_ON_HOST = replace(STREAMED, streamed=0.0)


def predict(candidate: Candidates, **terms: float) -> StepTimes:
    return StepModel(SIZES, replace(EVEN, **terms), TRAFFIC).predict(candidate)


def test_even_hardware_adds_nothing() -> None:
    """The paper's formulas alone: bytes over the bus, FLOP, bytes read."""
    times = predict(STREAMED)
    assert times.mini_batches == NUM_PARTS
    cached = BATCH * CONTEXT * LAYER.activation.num_bytes
    assert times.bus == pytest.approx(LAYERS * (LAYER.weight_bytes + cached) / EVEN.load_bandwidth)
    assert times.regenerate == pytest.approx(LAYERS * BATCH * CONTEXT * LAYER.regenerate_flop / EVEN.gemm_rate)
    assert times.launch == 0
    assert times.prefill == pytest.approx(
        LAYERS * BATCH * PROMPT / OUTPUT * (LAYER.flop(1) + LAYER.attention_flop(PROMPT // 2)) / EVEN.gemm_rate
    )


def test_each_layer_reads_what_its_window_shows() -> None:
    """Loads, rebuilding, gathering and attention; buffers have rows for the layers that see most."""
    cut = replace(LAYER, sliding_window=CONTEXT // 4)
    alike, mixed, narrow = (replace(SIZES, layers=pair * 4) for pair in ((LAYER, LAYER), (LAYER, cut), (cut, cut)))
    on_device = replace(CACHE_ON_HOST, on_device=1.0, on_device_at_end=1.0, device_share=1.0)
    for sizes, part, mini_batches in ((alike, 1.0, NUM_PARTS), (mixed, 0.625, NUM_PARTS), (narrow, 0.25, 2)):
        loading, gathering = (StepModel(sizes, EVEN, TRAFFIC).predict(c) for c in (CACHE_ON_HOST, on_device))
        read = part * 8 * BATCH * CONTEXT
        assert loading.bus == pytest.approx(read * LAYER.activation.num_bytes / EVEN.load_bandwidth)
        assert loading.regenerate == pytest.approx(read * LAYER.regenerate_flop / EVEN.gemm_rate)
        assert gathering.gather == pytest.approx(2 * read * LAYER.activation.num_bytes / EVEN.memory_bandwidth)
        assert loading.attention == pytest.approx(read * LAYER.kv.num_bytes / EVEN.memory_bandwidth)
        assert loading.mini_batches == mini_batches


def test_the_limit_counts_what_layers_see() -> None:
    """Attention of a step whose requests have 512 tokens, in layers half of which see 128 of them."""
    record = StepRecord(
        seconds=1.0,
        num_requests=4,
        decode_tokens=4,
        prefill_tokens=0,
        context_tokens=2048,
        weight_bytes=0,
        cache_bytes=0,
        regenerated_tokens=0,
    )
    layers = (LAYER, replace(LAYER, sliding_window=128))
    whole, mixed = (roofline(record, replace(SIZES, layers=each), EVEN) for each in ((LAYER, LAYER), layers))
    assert mixed.attention == pytest.approx(whole.attention * (1 + 1 / 4) / 2)


def test_gemms_slow_the_bus() -> None:
    """`contended_share`: of the time that GEMMs take, that part of the bus is left; never less all step long."""
    alone = predict(STREAMED)
    gemms = alone.forward + alone.regenerate
    assert predict(STREAMED, contended_share=0.8).bus == pytest.approx(alone.bus + 0.2 * gemms)
    slow = predict(STREAMED, contended_share=0.8, gemm_rate=EVEN.gemm_rate / 100)
    assert slow.bus == pytest.approx(alone.bus / 0.8)
    assert predict(RESIDENT, contended_share=0.8).bus == 0


def test_stores_slow_loads() -> None:
    """`duplex_share`: what goes both ways takes longer by a part of the shorter one, while requests come and go."""
    fast = {"gemm_rate": 1e18, "memory_bandwidth": 1e15}
    alone, both = (predict(STREAMED, **fast, duplex_share=share) for share in (1.0, 0.8))
    store = LAYERS * BATCH * (PROMPT / OUTPUT + 1) * LAYER.activation.num_bytes / EVEN.store_bandwidth
    assert both.mean_step - alone.mean_step == pytest.approx(store * (1 / 0.8 - 1), rel=1e-4)
    assert both.step == alone.step


def test_prompts_compute_at_a_rate_of_their_own() -> None:
    """`prompt_rate_share`: they take that much longer, and fewer are hidden; decoding does not change."""
    whole, part = (predict(STREAMED, prompt_rate_share=share) for share in (1.0, 0.5))
    assert part.prefill == pytest.approx(2 * whole.prefill)
    assert part.mean_step > whole.mean_step
    assert (part.step, part.forward) == (whole.step, whole.forward)
    models = [StepModel(SIZES, replace(EVEN, prompt_rate_share=share), TRAFFIC) for share in (1.0, 0.5)]
    assert models[1].hidden_chunk(1e9) == pytest.approx(models[0].hidden_chunk(1e9) / 2)
    assert models[1].chunk_within(9.0, whole) == pytest.approx(models[0].chunk_within(9.0, whole) / 2)


def test_a_gemm_takes_some_time_beside_its_flop() -> None:
    """`gemm_overhead`: once a layer where compute binds, and once for all the rows that one regeneration takes."""
    slow = {"gemm_rate": 1e12}
    before, after = (predict(STREAMED, **slow, gemm_overhead=seconds) for seconds in (0.0, 1e-4))
    assert after.forward - before.forward == pytest.approx(LAYERS * 1e-4, rel=1e-3)
    rows = BATCH * CONTEXT / REGENERATE_ROWS
    assert after.regenerate - before.regenerate == pytest.approx(LAYERS * rows * 1e-4)


def test_products_turn_from_reading_to_computing_by_and_by() -> None:
    """With a few hundred rows they take longer than either, as measured: the longer of both is 19 to 30 % too short."""
    large, small = json.loads((RESULTS / "products" / "h200.json").read_text())["result"]
    for model, error, without in ((large, 0.08, -0.193), (small, 0.14, -0.303)):
        lines = model["rows"]
        found = [beside(line["read"], line["compute"], PRODUCT_WAITING) / line["seconds"] - 1 for line in lines]
        assert max(map(abs, found)) <= error
        longer = [beside(line["read"], line["compute"], math.inf) / line["seconds"] - 1 for line in lines]
        assert min(longer) == pytest.approx(without, abs=0.02)


def test_few_rows_read_weights_slowly() -> None:
    """`weight_read_share`: a decode step's GEMMs, and the head, take as long as reading their weights."""
    fast = {"gemm_rate": 1e18}
    whole, part = (predict(RESIDENT, **fast, weight_read_share=share) for share in (1.0, 0.5))
    assert part.forward == pytest.approx(2 * whole.forward)
    assert part.forward == pytest.approx(LAYERS * LAYER.weight_bytes / (0.5 * EVEN.memory_bandwidth))
    weights = SIZES.vocab_size * SIZES.hidden_size * SIZES.compute_bytes
    assert part.head - whole.head == pytest.approx(weights / EVEN.memory_bandwidth)
    assert part.attention == whole.attention


def test_attention_reads_slowly() -> None:
    """`attention_read_share`: K and V of all cached tokens at that part of the memory's bandwidth."""
    whole, part = (predict(RESIDENT, attention_read_share=share) for share in (1.0, 0.5))
    assert part.attention == pytest.approx(
        LAYERS * BATCH * CONTEXT * LAYER.kv.num_bytes / (0.5 * EVEN.memory_bandwidth)
    )
    assert part.attention == pytest.approx(2 * whole.attention)
    assert part.forward == whole.forward


def test_small_kernels_take_time() -> None:
    """`small_kernel_time`: four of them in each of these layers; mini-batches go through a layer together."""
    before, after = (predict(STREAMED, small_kernel_time=seconds) for seconds in (0.0, 1e-5))
    assert after.forward - before.forward == pytest.approx(LAYERS * 4 * 1e-5)


def test_launches_bound_a_step() -> None:
    """`launch_time` and `hop_time`: for each layer of each mini-batch; a hop only where something crosses the bus."""
    calls = LAYERS * NUM_PARTS
    assert predict(STREAMED, launch_time=2e-4).launch == pytest.approx(calls * 2e-4)
    assert predict(STREAMED, launch_time=2e-4, hop_time=1e-4).launch == pytest.approx(calls * 3e-4)
    slow = predict(STREAMED, launch_time=1.0)
    assert slow.step == pytest.approx(calls * 1.0 + slow.boundary)
    assert slow.mean_step == pytest.approx(calls * 1.0 + slow.boundary, rel=1e-3)
    on_device = replace(RESIDENT, device_share=1.0)  # no graph runs that
    parts = predict(on_device).mini_batches
    assert predict(on_device, launch_time=2e-4, hop_time=1e-4).launch == pytest.approx(LAYERS * parts * 2e-4)
    assert predict(RESIDENT, launch_time=2e-4, hop_time=1e-4).launch == 0


def test_prompts_take_longer_to_launch() -> None:
    """`prompt_launch_time`: for each mini-batch of a chunk, and for all where some are computed anew."""
    terms = {"launch_time": 1.0, "prompt_launch_time": 3.0}
    times = predict(STREAMED, **terms)
    parts = STREAMED.chunk // STREAMED.prompt_queries
    launches = LAYERS * ((NUM_PARTS - parts) * 1.0 + parts * 3.0)
    assert times.longest_step == pytest.approx(launches + times.boundary)
    anew = predict(replace(STREAMED, recomputed=0.25), **terms)
    assert anew.launch == pytest.approx(LAYERS * anew.mini_batches * 3.0)
    model = StepModel(SIZES, replace(EVEN, prompt_launch_time=0.5), TRAFFIC)
    assert model.hidden_chunk(0.0) == pytest.approx(0.5 / model.prompt_token)


def test_the_bus_loses_time_with_each_mini_batch() -> None:
    """`handover_time`: where something crosses it."""
    before, after = (predict(STREAMED, handover_time=seconds) for seconds in (0.0, 1e-3))
    assert after.bus - before.bus == pytest.approx(LAYERS * NUM_PARTS * 1e-3)
    assert predict(RESIDENT, handover_time=1e-3).bus == 0


def test_a_boundary_counts_as_far_as_nothing_hides_it() -> None:
    """`boundary_time` and `request_time`: behind two layers' weights, beside a graph, or in full."""
    terms = {"boundary_time": 0.01, "request_time": 1e-3}
    whole = 0.01 + BATCH * 1e-3
    hidden = 2 * LAYER.weight_bytes / EVEN.load_bandwidth
    for candidate, added in ((STREAMED, whole - hidden), (CACHE_ON_HOST, whole), (RESIDENT, 0.0)):
        assert predict(candidate, **terms).boundary - predict(candidate).boundary == pytest.approx(added)
    slow = {name: 100 * seconds for name, seconds in terms.items()}
    assert predict(RESIDENT, **slow).step == pytest.approx(100 * whole + predict(RESIDENT).boundary)


@pytest.mark.parametrize(("ratio", "longer"), [(1.0, 2 ** (1 / 8)), (0.75, (1 + 0.75**8) ** (1 / 8)), (0.25, 1.0)])
def test_bus_and_gpu_wait_for_each_other(ratio: float, longer: float) -> None:
    """Where they take equally long by 9 %, by 1 % where one takes three quarters of the other's time."""
    found = predict(STREAMED)
    gpu = found.forward + found.regenerate + found.attention + found.head
    times = predict(STREAMED, load_bandwidth=EVEN.load_bandwidth * found.bus / gpu * ratio)
    assert times.step - times.boundary == pytest.approx(times.bus * longer, rel=1e-4)


def test_coded_weights_are_decoded_at_a_part_of_the_memory_bandwidth() -> None:
    """Coded bytes are read and the weights written, at 0.3 of it; others take nothing."""
    tensor = TensorSpec("weight", (4096, 8192), ("weight",))
    plain, coded = (kind(torch.float16).sizes(tensor) for kind in (Plain, Lossless))
    size = 2 * 4096 * 8192
    wanted = (coded.bus_bytes + size) / (0.3 * EVEN.memory_bandwidth)
    assert coded.bus_bytes == pytest.approx(0.856 * size)
    assert LayerTimes(SIZES, EVEN).decode_weights(coded.decode_traffic) == pytest.approx(wanted)
    assert LayerTimes(SIZES, EVEN).decode_weights(plain.decode_traffic) == 0
    times = [predict(replace(STREAMED, decode_traffic=each.decode_traffic)).forward for each in (plain, coded)]
    assert times[1] - times[0] == pytest.approx(LAYERS * wanted)


def test_the_gpu_is_given_seven_eighths_of_the_bus_time() -> None:
    """The share at which a step is shortest, prompts included."""
    model = StepModel(SIZES, replace(EVEN, gemm_rate=8e13), TRAFFIC)
    at_zero, at_one = (model.predict(replace(STREAMED, host_share=share)) for share in (0.0, 1.0))
    share = model.balanced_share(at_zero, at_one)
    assert 0.1 < share < 0.9
    times = model.predict(replace(STREAMED, host_share=share))
    gpu = times.forward + times.regenerate + times.attention + times.head
    assert gpu + times.prefill == pytest.approx(7 / 8 * times.bus)


def cell_of(file: str, name: str) -> dict[str, Any]:
    """A measured cell of a results file."""
    cells: list[dict[str, Any]] = json.loads((RESULTS / file).read_text())["result"]
    return next(cell for cell in cells if cell["name"] == name)


def predicted(cell: dict[str, Any], **terms: float) -> float:
    """Seconds of a step of the cell's plan, which codes no weights, at the rates of its machine but for `terms`."""
    plan, blocks = cell["plan"], cell["plan"]["num_blocks"]
    is_float = cell.get("setting", {}).get("regime") == "compute" and cell["setting"]["kind"] == "sweep"
    sizes = named_spec(cell["model"], torch.float32 if is_float else torch.float16).sizes
    context, batch = cell["context"], plan["batch"]
    device, host = (blocks[f"{tier}_kv"] + blocks[f"{tier}_activation"] for tier in ("device", "host"))
    on_device = min(1.0, device / (batch * -(-context // 16)))
    candidate = Candidates(
        batch=np.asarray(float(batch)),
        streamed=(1 - plan["resident_share"]) * sizes.layers_bytes / sizes.num_layers,
        on_device=on_device,
        on_device_at_end=on_device,
        device_share=blocks["device_activation"] / max(1, device),
        host_share=blocks["host_activation"] / max(1, host),
        recomputed=0.0,
        chunk=plan["max_prefill_tokens"],
        prompt_queries=4096,
        rows=plan["rows"],
    )
    traffic = Traffic(context=context, prompt=0, output=1, longest=640)
    return float(StepModel(sizes, replace(Hardware(**cell["hardware"]), **terms), traffic).predict(candidate).step)


@pytest.mark.parametrize(
    ("file", "name", "error", "without", "then"),
    [
        ("planner/grid-opt-6.7b-24GiB.json", "planner", 0.02, {"weight_read_share": 1.0}, -0.154),
        ("planner/grid-opt-6.7b-76GiB.json", "planner", 0.022, {"attention_read_share": 1.0}, -0.034),
        ("planner/choice-opt-1.3b-24GiB.json", "planner", 0.06, {"request_time": 0.0, "boundary_time": 0.0}, -0.071),
        (
            "planner/grid-opt-1.3b-76GiB.json",
            "planner",
            0.05,
            {"small_kernel_time": 0.0, "gemm_overhead": 0.0},
            0.005,
        ),
        ("planner/sweep-bus.json", "share 0.5", 0.005, {"load_bandwidth": 6e10}, -0.095),
        ("planner/sweep-compute.json", "share 0.0", 0.015, {"handover_time": 1e-3}, 0.112),
        ("planner/sweep-compute.json", "share 0.8", 0.011, {"gemm_rate": 1e15}, -0.134),
        ("planner/sweep-compute.json", "share 0.3", 0.01, {"contended_share": 0.8}, 0.074),
    ],
)
def test_what_was_measured_is_predicted(
    file: str, name: str, error: float, without: dict[str, float], then: float
) -> None:
    """Within the error that it had; and with the terms changed it would be off, by as much as they matter there."""
    cell = cell_of(file, name)
    measured = cell["step_seconds"]
    assert abs(predicted(cell) / measured - 1) <= error
    assert predicted(cell, **without) / measured - 1 == pytest.approx(then, abs=0.003)
