"""The planner: never over budget, never a promise that it cannot keep, and the best of what there is."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.config import CachePolicy, EngineConfig, Placement, ResidentWeights, parse_bytes
from hsrpc.errors import ConfigError
from hsrpc.plan.default_context import planner_with_context
from hsrpc.plan.device_memory import device_bytes
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.placement import even_resident
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.search import Point
from hsrpc.plan.sizes import CacheRow, LayerSizes, ModelSizes, TensorSizes, align
from hsrpc.schedule.blocks import BlockKind, BlockManager, BlockTable, PoolId, Tier
from hsrpc.schedule.sweep import BUFFERS

MIB, GIB = 2**20, 2**30
PCIE5_H100 = Hardware(load_bandwidth=55e9, store_bandwidth=55e9, gemm_rate=650e12, memory_bandwidth=2.6e12)
PCIE4_4090 = Hardware(load_bandwidth=25e9, store_bandwidth=25e9, gemm_rate=140e12, memory_bandwidth=0.9e12)
SLOW_GPU = replace(PCIE4_4090, gemm_rate=25e12)


def make_layer(
    hidden: int, kv: int, ffn: int, compute_bytes: int, coded: tuple[float, float] | None = None
) -> LayerSizes:
    """A layer with five tensors; `coded`: their bytes in a format that is decoded, as expected and at most."""
    tensors = {"qkv": hidden * (hidden + 2 * kv), "o": hidden * hidden, "up": hidden * ffn, "down": ffn * hidden}
    return LayerSizes(
        tensors=tuple(
            make_tensor(name, size, compute_bytes, coded) for name, size in {**tensors, "norm": hidden}.items()
        ),
        hidden_size=hidden,
        query_size=hidden,
        key_size=kv,
        value_size=kv,
        ffn_size=ffn,
        kv=CacheRow(2 * kv, 2 * kv * compute_bytes),
        activation=CacheRow(hidden, hidden * compute_bytes),
        compute_bytes=compute_bytes,
    )


def make_tensor(name: str, num_elements: int, compute_bytes: int, coded: tuple[float, float] | None) -> TensorSizes:
    size = align(num_elements * compute_bytes)
    expected, bound = coded or (1.0, 1.0)
    return TensorSizes(
        name=name,
        num_elements=num_elements,
        resident_bytes=num_elements * compute_bytes,
        device_bytes=size,
        buffer_bytes=size,
        bus_bytes=size * expected,
        host_bytes=size * bound,
        decoded_bytes=size if coded else 0,
        decode_traffic=size * (1 + expected) if coded else 0.0,
    )


def make_sizes(
    num_layers: int = 4,
    hidden: int = 512,
    heads: int = 8,
    kv_heads: int | None = None,
    ffn: int = 2048,
    odd_ffn: int | None = None,
    vocab: int = 1000,
    context_length: int = 2048,
    compute_bytes: int = 2,
    coded: tuple[float, float] | None = None,
    window: int | None = None,
) -> ModelSizes:
    """A model of such layers, of which the odd ones may have another MLP."""
    kv = (kv_heads or heads) * (hidden // heads)
    ffns = [(odd_ffn or ffn) if number % 2 else ffn for number in range(num_layers)]
    layers = (make_layer(hidden, kv, each, compute_bytes, coded) for each in ffns)
    return ModelSizes(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=hidden // heads,
        ffn_size=ffn,
        vocab_size=vocab,
        context_length=context_length,
        compute_bytes=compute_bytes,
        layers=tuple(replace(layer, sliding_window=window) for layer in layers),
        fixed_bytes=vocab * hidden * compute_bytes,
    )


OPT_30B = make_sizes(num_layers=48, hidden=7168, heads=56, ffn=28672, vocab=50272)
OPT_6_7B = make_sizes(num_layers=32, hidden=4096, heads=32, ffn=16384, vocab=50272)
LLAMA_8B = make_sizes(num_layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
SMALL = make_sizes()


def make_plan(
    sizes: ModelSizes = SMALL,
    device: int = 24 * GIB,
    host: int = 200 * GIB,
    hardware: Hardware = PCIE4_4090,
    **settings: object,
) -> Plan:
    return Planner(sizes, Budgets(device=device, host=host), hardware, EngineConfig(**settings)).plan()


def blocks_of(plan: Plan, tier: Tier) -> int:
    return sum(count for pool, count in plan.num_blocks.items() if pool.tier is tier)


def decode_rate(sizes: ModelSizes, hardware: Hardware, plan: Plan) -> float:
    """Tokens per second of a plan that keeps its cache, by the formulas of the method alone, from its blocks."""
    batch, context, counts = plan.max_batch, plan.prediction.context, plan.num_blocks
    tokens = batch * context
    on_device = min(1.0, blocks_of(plan, Tier.DEVICE) / (batch * -(-context // plan.block_size)))
    device_share = counts[PoolId.DEVICE_ACTIVATION] / max(1, blocks_of(plan, Tier.DEVICE))
    host_share = counts[PoolId.HOST_ACTIVATION] / max(1, blocks_of(plan, Tier.HOST))
    device, host = tokens * on_device, tokens * (1 - on_device)
    layer = sizes.layers[0]  # all are alike
    cached = (1 - host_share) * layer.kv.num_bytes + host_share * layer.activation.num_bytes
    bus = (sum(plan.streamed_bytes) / sizes.num_layers + host * cached) / hardware.load_bandwidth
    compute, read = batch * layer.flop(1) / hardware.gemm_rate, layer.weight_bytes / hardware.memory_bandwidth
    forward = (compute**2.75 + read**2.75) ** (1 / 2.75)  # as fitted to products of few to many rows
    regenerated = device * device_share + host * host_share
    regenerate = regenerated * 4 * layer.hidden_size * layer.key_size / hardware.gemm_rate
    copies = device * device_share * 2 * layer.activation.num_bytes / hardware.memory_bandwidth
    attention = max(
        tokens * layer.kv.num_bytes / hardware.memory_bandwidth,
        batch * layer.attention_flop(context) / hardware.gemm_rate,
    )
    weights = sizes.vocab_size * sizes.hidden_size
    head = max(2 * batch * weights / hardware.gemm_rate, weights * sizes.compute_bytes / hardware.memory_bandwidth)
    head += 8 * batch * sizes.vocab_size / hardware.memory_bandwidth
    gpu = sizes.num_layers * (forward + regenerate + copies + attention) + head
    return batch / ((sizes.num_layers * bus) ** 8 + gpu**8) ** (
        1 / 8
    )  # their longer one, and a little where both count


def random_sizes(random: Random) -> ModelSizes:
    """Layers alike or not, coded or not."""
    heads = random.choice((1, 2, 4, 6))
    return make_sizes(
        num_layers=random.randint(1, 7),
        hidden=heads * random.choice((8, 24, 64)),
        heads=heads,
        kv_heads=random.choice([heads] * 3 + [n for n in (1, 2, 3) if heads % n == 0]),
        ffn=random.choice((16, 100, 1024)),
        odd_ffn=random.choice((None, 60)),
        vocab=random.randint(2, 1000),
        context_length=random.choice((8, 64, 500)),
        compute_bytes=random.choice((2, 4)),
        coded=random.choice((*[None] * 4, (0.7, 0.76), (0.25, 0.25))),
    )


def random_config(random: Random) -> EngineConfig:
    policy = random.choice((*CachePolicy, CachePolicy.HYBRID, CachePolicy.HYBRID))
    return EngineConfig(
        cache_policy=policy,
        activation_share=random.choice((None, random.random())) if policy is CachePolicy.HYBRID else None,
        placement=random.choice(list(Placement)),
        resident_weights=random.choice(list(ResidentWeights)),
        block_size=random.randint(1, 24),
        max_batch=random.choice((None, random.randint(1, 40))),
        max_model_len=random.choice((None, None, 1, 5, 8)),
        max_prefill_tokens=random.choice((None, 1, 16, 100, 100)),
        expected_context=random.choice((None, random.randint(1, 600))),
        max_step_time=random.choice((None, None, None, 1e-5, 1e-3)),
    )


def random_planner(random: Random) -> Planner:
    """With budgets from a little too small to those that hold everything: most are in between."""
    sizes, config = random_sizes(random), random_config(random)
    hardware = Hardware(
        load_bandwidth=10 ** random.uniform(8, 11),
        store_bandwidth=1e9,
        gemm_rate=10 ** random.uniform(9, 15),
        memory_bandwidth=10 ** random.uniform(9, 12),
    )
    guess = Planner(sizes, Budgets(device=16 * MIB, host=0), hardware, config)
    count = random.choice((1, 4, 30))
    rows = int(guess._rows(count, guess._row_choices(guess.budgets)[0], 0))
    point = Point(count, 0, 1.0, kv_only=False, rows=rows, recompute=0)
    staging = guess._evaluators(guess.budgets)[0].staging(point.as_grid(), 100, 100)
    fixed = int(sum(device_bytes(sizes, staging).values()))
    weights, largest = sizes.layers_bytes, max(layer.weight_bytes for layer in sizes.layers)
    request = guess.max_model_len * sizes.token_bytes(BlockKind.KV)
    device = fixed + 2 * largest + int(weights * random.uniform(-0.2, 1.1))
    host = int(weights * random.uniform(0.1, 1.2) + request * random.choice((1, 3, 30)) * random.random())
    device += int(request * random.random() * random.choice((0, 0, 3, 30)))
    return Planner(sizes, Budgets(device=max(1, device), host=max(1, host)), hardware, config)


PLANNERS = st.randoms(use_true_random=True).map(random_planner)


def in_windows(planner: Planner, window: int | None) -> Planner:
    """The same, where all layers have this window."""
    layers = tuple(replace(layer, sliding_window=window) for layer in planner.sizes.layers)
    return Planner(replace(planner.sizes, layers=layers), planner.budgets, planner.hardware, planner.config)


IN_WINDOWS = st.builds(in_windows, PLANNERS, st.sampled_from((None, None, 1, 7, 40)))


def refused_field(planner: Planner) -> str | None:
    """The setting that keeps it from a plan; None: there is one."""
    try:
        planner.plan()
    except ConfigError as error:
        return error.field
    return None


def check_error(error: ConfigError, planner: Planner) -> None:
    """Names a setting, its value, and what to do; a budget that is raised as it says is large enough."""
    assert error.field in ("gpu_memory", "host_memory", "max_step_time")
    assert str(error).startswith(f"{error.field}={error.value!r}: ")
    assert any(word in str(error).rsplit(";", 1)[1] for word in ("raise", "lower"))
    if named := re.search(r"smallest plan (?:takes )?([\d.]+ \w+); raise it to that", str(error)):
        budget = {error.field.replace("gpu", "device").replace("_memory", ""): parse_bytes(named[1], error.field)}
        raised = Planner(planner.sizes, replace(planner.budgets, **budget), planner.hardware, planner.config)
        assert refused_field(raised) != error.field
    else:
        assert error.field == "max_step_time"


@given(planner=IN_WINDOWS)
@settings(max_examples=200)
def test_a_plan_stays_within_the_budgets(planner: Planner):
    """Device and host bytes sum to no more than the budgets and are those of what the plan places there."""
    try:
        plan = planner.plan()
    except ConfigError as error:
        check_error(error, planner)
        return
    sizes, budgets = planner.sizes, planner.budgets
    assert sum(plan.device_bytes.values()) <= budgets.device
    assert sum(plan.host_bytes.values()) <= budgets.host
    assert min(*plan.device_bytes.values(), *plan.host_bytes.values()) >= 0
    tokens = {pool: count * plan.block_size for pool, count in plan.num_blocks.items()}
    cached = {pool: tokens[pool] * sum(layer.row(pool.kind).num_bytes for layer in sizes.layers) for pool in PoolId}
    spare = sum(sizes.token_bytes(kind) for kind in BlockKind)
    assert plan.device_bytes[DeviceUse.CACHE_BLOCKS] == spare + sum(cached[p] for p in PoolId if p.tier is Tier.DEVICE)
    assert plan.host_bytes[HostUse.CACHE_BLOCKS] == sum(cached[pool] for pool in PoolId if pool.tier is Tier.HOST)
    streamed = [
        [tensor for tensor in layer.tensors if tensor.name not in stays.names]
        for layer, stays in zip(sizes.layers, plan.resident, strict=True)
    ]
    assert plan.streamed_bytes == tuple(sum(tensor.device_bytes for tensor in tensors) for tensors in streamed)
    ready, packed = (
        [
            [tensor for tensor in layer.tensors if tensor.name in getattr(stays, how)]
            for layer, stays in zip(sizes.layers, plan.resident, strict=True)
        ]
        for how in ("ready", "packed")
    )
    own = sum(tensor.resident_bytes for tensors in ready for tensor in tensors)
    own += sum(tensor.host_bytes for tensors in packed for tensor in tensors)
    assert plan.device_bytes[DeviceUse.RESIDENT_WEIGHTS] == math.ceil(round(own, 3))
    assert all(tensor.is_coded for tensors in packed for tensor in tensors)
    on_host = sum(tensor.host_bytes for tensors in streamed for tensor in tensors)
    assert plan.host_bytes[HostUse.STREAMED_WEIGHTS] == math.ceil(round(on_host, 3))
    on_bus = max(sum(tensor.buffer_bytes for tensor in tensors) for tensors in streamed)
    coded = [[*streams, *stays] for streams, stays in zip(streamed, packed, strict=True)]
    decoded = max(sum(tensor.decoded_bytes for tensor in tensors) for tensors in coded)
    assert (plan.weight_buffer_bytes, plan.decode_buffer_bytes) == (on_bus, decoded)
    assert plan.device_bytes[DeviceUse.WEIGHT_BUFFERS] == BUFFERS * on_bus + decoded


@given(planner=IN_WINDOWS)
@settings(max_examples=200)
def test_a_plan_keeps_its_promises(planner: Planner):
    """One request at full length and the others at the expected one fit, and their rows and queries fit the buffers."""
    try:
        plan = planner.plan()
    except ConfigError as error:
        check_error(error, planner)
        return
    config = planner.config
    block, batch = plan.block_size, plan.max_batch
    assert batch <= (config.max_batch or 512)
    assert plan.prediction.batch == batch
    assert config.max_step_time is None or plan.prediction.longest_step <= config.max_step_time * (1 + 1e-9)
    whole = plan.recompute.tokens > 0 or plan.policy is CachePolicy.RECOMPUTE
    chunk = min(plan.buffers.queries, plan.max_idle_prefill_tokens)
    shown = min(plan.max_model_len, (planner.sizes.sliding_window or plan.max_model_len) - 1 + chunk)
    assert plan.buffers.rows >= (plan.max_model_len if whole else shown)
    if plan.policy is CachePolicy.RECOMPUTE:
        assert not plan.keeps_cache
        assert sum(plan.num_blocks.values()) == 0
        assert plan.max_prefill_tokens == batch * plan.max_model_len
        assert plan.buffers.queries >= plan.max_model_len
        return
    streams = sum(plan.streamed_bytes) > 0
    assert plan.buffers.queries >= min(plan.max_prefill_tokens, 256 if streams else math.inf) + batch
    assert plan.buffers.activation_rows in (0, plan.buffers.rows)
    has_activations = plan.num_blocks[PoolId.DEVICE_ACTIVATION] + plan.num_blocks[PoolId.HOST_ACTIVATION] > 0
    assert (plan.buffers.activation_rows > 0) == has_activations
    cached = int(batch - plan.recompute.tokens / plan.prediction.context)
    others = max(0, cached - 1) * (most_held(planner.sizes, plan.prediction.context, 1, block) + 1)
    longest = most_held(planner.sizes, plan.max_model_len, chunk, block)
    assert sum(plan.num_blocks.values()) >= longest + others
    assert plan.max_idle_prefill_tokens >= plan.max_prefill_tokens >= 1
    manager, table = BlockManager(plan.num_blocks), BlockTable()
    assert manager.grow(table, longest)
    if config.placement is Placement.HOST:
        assert plan.device_bytes[DeviceUse.RESIDENT_WEIGHTS] == 0
        assert blocks_of(plan, Tier.DEVICE) == 0


def most_held(sizes: ModelSizes, num_tokens: int, chunk: int, block: int) -> int:
    """Blocks that a request of so many tokens holds at once, by trying all that a chunk may begin with."""
    window = sizes.sliding_window
    if window is None:
        return -(-num_tokens // block)
    steps = ((max(0, context - window + 1), min(num_tokens, context + chunk)) for context in range(num_tokens))
    return max(-(-end // block) - first // block for first, end in steps)


def with_all_heads(layer: LayerSizes) -> LayerSizes:
    """As wide keys and values as queries: activations take half the bytes."""
    width = layer.query_size
    kv = CacheRow(2 * width, 2 * width * layer.compute_bytes)
    return replace(layer, key_size=width, value_size=width, kv=kv)


@given(planner=PLANNERS, share=st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0)), batch=st.sampled_from((1, 3, 8, 32)))
@settings(max_examples=100, derandomize=True)
def test_no_other_choice_is_faster(planner: Planner, share: float, batch: int):
    """The plan's throughput is within a tenth of the highest that is predicted for a batch and share that fit.

    Nearly always within 3 %; of thousands of these random models, of microseconds a step, a few are up to 20 % off,
    because the host's share is balanced without the wait of prompts for their chunks: the same models at each run.
    """
    config = replace(planner.config, cache_policy=CachePolicy.HYBRID, activation_share=None, max_batch=None)
    sizes = replace(planner.sizes, layers=tuple(map(with_all_heads, planner.sizes.layers)))
    planner = Planner(
        sizes, planner.budgets, planner.hardware, replace(config, activation_share=share, max_batch=batch)
    )
    try:
        forced = planner.plan()
    except ConfigError as error:
        check_error(error, planner)
        return
    best = Planner(sizes, planner.budgets, planner.hardware, config).plan()
    assert best.prediction.mean_tokens_per_second >= forced.prediction.mean_tokens_per_second * 0.9


@pytest.fixture
def closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are told by what candidates are compared by, not by their lists' time."""
    monkeypatch.setattr("hsrpc.plan.build.simulated", lambda plan, sizes, closed, **_: closed)


@pytest.mark.usefixtures("closed_form")
@pytest.mark.parametrize("hardware", [PCIE5_H100, PCIE4_4090, SLOW_GPU], ids=["h100", "4090", "slow"])
@pytest.mark.parametrize("sizes", [OPT_30B, OPT_6_7B, LLAMA_8B], ids=["opt-30b", "opt-6.7b", "llama-8b"])
def test_the_prediction_is_that_of_the_formulas(sizes: ModelSizes, hardware: Hardware):
    """What a plan predicts follows from its blocks and streamed bytes; on a coarse grid nothing beats it."""
    best = make_plan(sizes, hardware=hardware, expected_context=576)
    shares = [None] if sizes.activation_ratio <= 1 else [0.0, 0.3, 0.6, 1.0]
    for share in shares:
        for batch in (1, 16, 64, 256):
            settings = {"cache_policy": CachePolicy.HYBRID, "activation_share": share, "max_batch": batch}
            plan = make_plan(sizes, hardware=hardware, expected_context=576, **settings)
            computed = decode_rate(sizes, hardware, plan)
            assert plan.prediction.tokens_per_second == pytest.approx(computed, rel=0.02)
            assert plan.prediction.mean_tokens_per_second <= best.prediction.mean_tokens_per_second * 1.02


def test_a_slow_gpu_wants_some_activations():
    """Where compute is scarce beside the bus, the best share lies inside (0, 1)."""
    plan = make_plan(OPT_30B, hardware=PCIE4_4090, expected_context=1024)
    assert 0.5 < plan.activation_share < 0.95
    assert plan.policy is CachePolicy.HYBRID
    assert plan.prediction.gpu == pytest.approx(7 / 8 * plan.prediction.bus, rel=0.05)
    slower = make_plan(OPT_30B, hardware=SLOW_GPU, expected_context=1024)
    assert 0 < slower.activation_share < plan.activation_share


def test_a_fast_gpu_wants_all_activations():
    """Where compute is plentiful, a multi-head model that streams its cache caches activations on the host."""
    plan = make_plan(OPT_30B, hardware=PCIE5_H100, expected_context=1024, max_batch=64)
    assert plan.num_blocks[PoolId.HOST_KV] == 0
    assert plan.activation_share > 0.99


@pytest.mark.parametrize("policy", [CachePolicy.AUTO, CachePolicy.HYBRID])
def test_grouped_queries_want_no_activations(policy: CachePolicy):
    """An activation of a grouped-query model is larger than its K and V: the share is 0, and the plan says why."""
    plan = make_plan(LLAMA_8B, hardware=PCIE5_H100, cache_policy=policy)
    assert plan.activation_share == 0.0
    assert "2.00 times the bytes" in plan.reason
    assert "grouped-query" in plan.reason
    assert plan.buffers.activation_rows == 0


@pytest.mark.parametrize(
    ("policy", "share", "reason"),
    [
        (CachePolicy.KV, 0.0, "KV only, as asked"),
        (CachePolicy.ACTIVATION, 1.0, "activations only, as asked"),
        (CachePolicy.RECOMPUTE, 0.0, "nothing is cached, as asked"),
    ],
)
@pytest.mark.parametrize("sizes", [OPT_6_7B, LLAMA_8B], ids=["mha", "gqa"])
def test_a_policy_that_is_asked_for_is_kept(sizes: ModelSizes, policy: CachePolicy, share: float, reason: str):
    """Policies are for honest comparison: they hold for any model, and the plan says that it was told to."""
    plan = make_plan(sizes, hardware=PCIE5_H100, cache_policy=policy, max_batch=4)
    assert (plan.policy, plan.activation_share) == (policy, share)
    assert plan.reason.startswith(reason)


@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_a_share_that_is_asked_for_is_kept(share: float):
    """The given share is planned for, in the pools of both tiers."""
    plan = make_plan(OPT_6_7B, cache_policy=CachePolicy.HYBRID, activation_share=share, max_batch=8)
    assert plan.activation_share == share
    for tier in Tier:
        counts = {pool: count for pool, count in plan.num_blocks.items() if pool.tier is tier}
        activations = sum(count for pool, count in counts.items() if pool.kind is BlockKind.ACTIVATION)
        assert activations == pytest.approx(share * sum(counts.values()), abs=1)


def test_a_model_that_fits_stays_on_the_device():
    """With room for weights and cache, nothing crosses the bus and the whole cache is on the device."""
    plan = make_plan(SMALL, device=4 * GIB, host=GIB, max_batch=4)
    assert plan.streamed_bytes == (0,) * 4
    assert plan.resident_share == 1.0
    assert plan.weight_buffer_bytes == plan.device_bytes[DeviceUse.WEIGHT_BUFFERS] == 0
    assert plan.prediction.bus == 0.0
    assert all(stays.ready == SMALL.layers[0].names for stays in plan.resident)


FP8_30B = make_sizes(num_layers=48, hidden=7168, heads=56, ffn=28672, vocab=50272, coded=(0.51, 0.51))
LOSSLESS_30B = make_sizes(num_layers=48, hidden=7168, heads=56, ffn=28672, vocab=50272, coded=(0.668, 0.76))


def residences(sizes: ModelSizes, device: int) -> dict[str, Plan]:
    """Plans for four requests, by how coded weights lie that stay."""
    given = {"max_batch": 4, "min_batch": 4, "max_model_len": 512, "cache_policy": "kv", "hardware": PCIE5_H100}
    return {how: make_plan(sizes, device=device * GIB, resident_weights=how, **given) for how in ResidentWeights}


@pytest.mark.parametrize("sizes", [FP8_30B, LOSSLESS_30B], ids=["fp8", "lossless"])
@pytest.mark.parametrize("device", [16, 24, 40, 48, 56, 60])
def test_more_weights_stay_packed(sizes: ModelSizes, device: int):
    """Where they do not all fit decoded, more of them fit packed, which is faster; where they do, that is."""
    plans = residences(sizes, device)
    decoded, packed = plans["decoded"], plans["packed"]
    rates = {how: plan.prediction.mean_tokens_per_second for how, plan in plans.items()}
    assert not decoded.kept_bytes
    assert packed.kept_bytes
    if device == 60:
        assert decoded.resident_share == 1
        assert plans["auto"] == decoded
        assert rates["decoded"] > 2 * rates["packed"]
        return
    assert packed.resident_share > decoded.resident_share
    assert rates["auto"] > 1.05 * rates["decoded"]
    assert rates["auto"] > 0.98 * rates["packed"]
    assert plans["auto"].prediction.bus < decoded.prediction.bus


def test_what_room_is_left_takes_weights_that_are_ready():
    """More than all of them take packed, and less than decoded: faster than either."""
    plans = residences(FP8_30B, 48)
    auto, packed = plans["auto"], plans["packed"]
    assert auto.resident_share == packed.resident_share == 1
    assert 0 < auto.kept_bytes < 0.5 * packed.kept_bytes
    rates = {how: plan.prediction.mean_tokens_per_second for how, plan in plans.items()}
    assert rates["auto"] > 1.5 * rates["packed"] > 2 * rates["decoded"]


def test_what_stays_packed_is_decoded_in_every_step():
    """Its traffic counts as that of weights that stream."""
    layers = (
        replace(each, tensors=tuple(replace(t, decode_traffic=0.0) for t in each.tensors)) for each in FP8_30B.layers
    )
    plans = residences(FP8_30B, 60), residences(replace(FP8_30B, layers=tuple(layers)), 60)
    kept, undecoded = (each["packed"].prediction.forward for each in plans)
    traffic = sum(tensor.decode_traffic for layer in FP8_30B.layers for tensor in layer.tensors)
    assert kept - undecoded == pytest.approx(traffic / PCIE5_H100.memory_bandwidth)


def test_a_small_batch_on_the_device_can_win():
    """OPT-6.7B fits 24 GiB: the best plan keeps all weights there, and beats streaming the same model."""
    plan = make_plan(OPT_6_7B, hardware=PCIE5_H100, expected_context=576)
    streamed = make_plan(OPT_6_7B, hardware=PCIE5_H100, expected_context=576, placement=Placement.HOST)
    assert plan.resident_share == 1.0
    assert plan.prediction.tokens_per_second > 1.5 * streamed.prediction.tokens_per_second
    assert streamed.resident_share == 0.0
    assert streamed.prediction.bus > 0


@given(sizes=st.randoms(use_true_random=True).map(random_sizes), part=st.floats(0, 1.2))
def test_resident_weights_are_spread_evenly(sizes: ModelSizes, part: float):
    """Never over budget; each layer is within its largest tensor of its part; nothing that fits is left out."""
    budget = int(part * sizes.layers_bytes)
    resident = even_resident(sizes, budget)
    sums = [
        sum(tensor.device_bytes for tensor in layer.tensors if tensor.name in stays.ready)
        for layer, stays in zip(sizes.layers, resident, strict=True)
    ]
    largest = max(layer.largest_first[0].device_bytes for layer in sizes.layers)
    assert len(resident) == sizes.num_layers
    assert sum(sums) <= budget
    for size, layer in zip(sums, sizes.layers, strict=True):
        assert abs(size - min(budget / sizes.layers_bytes, 1) * layer.weight_bytes) <= largest
    left_out = [tensor.device_bytes for tensor in sizes.layers[-1].tensors if tensor.name not in resident[-1].ready]
    assert sum(sums) + min(left_out, default=budget + 1) > budget


@pytest.mark.parametrize(("kv_heads", "share"), [(8, 0.25), (2, 0.75)], ids=["mha", "gqa"])
def test_rounding_to_whole_blocks_keeps_the_budget(kv_heads: int, share: float):
    """Two blocks' bytes at a share that is no whole number of blocks: rounded to the kind that takes less room."""
    sizes = make_sizes(kv_heads=kv_heads)
    kv, activation = map(sizes.token_bytes, BlockKind)
    host = sizes.layers_bytes + int(2 * 16 * ((1 - share) * kv + share * activation))
    settings = {"cache_policy": CachePolicy.HYBRID, "activation_share": share, "max_batch": 2}
    plan = make_plan(sizes, host=host, placement=Placement.HOST, max_model_len=16, **settings)
    assert sum(plan.num_blocks.values()) == 2
    assert sum(plan.host_bytes.values()) <= host


def make_small_plan(**settings: object) -> Plan:
    """A plan of SMALL on the host with K and V, for requests of 64 tokens: 396 blocks of the host, and a fast GPU."""
    cache = 99 * 64 * SMALL.token_bytes(BlockKind.KV)
    return make_plan(
        SMALL,
        device=256 * MIB,
        host=SMALL.layers_bytes + cache,
        cache_policy=CachePolicy.KV,
        placement=Placement.HOST,
        max_model_len=64,
        expected_context=64,
        max_prefill_tokens=64,
        **settings,
    )


@pytest.mark.parametrize(("asked", "given_batch"), [(1, 1), (5, 5), (23, 23), (100, 79)])
def test_a_batch_that_is_forced_is_had_where_it_fits(asked: int, given_batch: int):
    """The batch that was asked for, else the next smaller one of the grid: 4 + 78 * 5 of the host's 396 blocks."""
    plan = make_small_plan(min_batch=asked, max_batch=asked)
    assert plan.max_batch == given_batch
    told = f"of min_batch={asked} requests the budgets allow {given_batch} at once"
    assert (told in plan.reason) == (asked > given_batch)


def test_max_batch_is_a_bound():
    """Up to it as many run as give the highest throughput; the reason says where these are fewer."""
    rates = [make_small_plan(min_batch=n, max_batch=n).prediction.mean_tokens_per_second for n in range(1, 80)]
    for asked in (5, 23, 79):
        plan = make_small_plan(max_batch=asked)
        assert plan.prediction.mean_tokens_per_second > 0.97 * max(rates[:asked])
        told = f"of max_batch={asked} requests {plan.max_batch} run at once: more are not within the budgets, or not"
        assert (told in plan.reason) == (plan.max_batch < asked)
    assert make_small_plan(max_batch=79).max_batch < 79
    assert make_small_plan(min_batch=30, max_batch=79).max_batch >= 30
    assert make_small_plan(min_batch=30).max_batch >= 30


def test_max_step_time_bounds_the_step():
    """A bound on the step gives a smaller batch; one that nothing meets is an error that names the fastest step."""
    free = make_plan(OPT_30B, hardware=PCIE5_H100)
    bound = free.prediction.step * 0.7
    bounded = make_plan(OPT_30B, hardware=PCIE5_H100, max_step_time=bound)
    assert bounded.prediction.step <= bound
    assert bounded.max_batch < free.max_batch
    with pytest.raises(ConfigError, match=r"max_step_time=1e-05: the fastest step .* takes 0\.\d{4} s; raise it"):
        make_plan(OPT_30B, hardware=PCIE5_H100, max_step_time=1e-5)


def test_max_step_time_lowers_a_given_max_batch():
    """`max_batch` is a most: where the step of that many takes too long, fewer run."""
    whole = make_plan(OPT_30B, hardware=PCIE5_H100, max_batch=64)
    bound = whole.prediction.step * 0.9
    bounded = make_plan(OPT_30B, hardware=PCIE5_H100, max_batch=64, max_step_time=bound)
    assert 1 <= bounded.max_batch < 64
    assert bounded.prediction.step <= bound


@pytest.mark.parametrize(
    ("budgets", "field", "remedy"),
    [
        ({"device": 10 * MIB}, "gpu_memory", "raise it to that, or lower max_model_len or max_prefill_tokens"),
        ({"host": 10 * MIB}, "host_memory", "raise it to that, or raise gpu_memory, or lower max_model_len"),
    ],
)
def test_too_little_memory_is_explained(budgets: dict[str, int], field: str, remedy: str):
    """The error names the budget, its value in units people read, what takes the room, and the remedy."""
    with pytest.raises(ConfigError) as caught:
        make_plan(OPT_30B, **budgets)
    assert caught.value.field == field
    assert caught.value.value == "10.0 MiB"
    assert remedy in str(caught.value)


def test_a_context_beyond_the_models_is_refused():
    """`max_model_len` may not exceed the model's positions."""
    with pytest.raises(ConfigError, match=r"max_model_len=5000: .* 2048 tokens; give at most that"):
        make_plan(SMALL, max_model_len=5000)


def test_lengths_are_bounded_by_the_model():
    """Without settings the context is the model's, at most 4096; the expected one at most 1024."""
    plan = make_plan(make_sizes(context_length=100_000))
    assert (plan.max_model_len, plan.prediction.context) == (4096, 1024)
    plan = make_plan(make_sizes(context_length=300))
    assert (plan.max_model_len, plan.prediction.context) == (300, 300)
    assert make_plan(make_sizes(context_length=300), expected_context=900).prediction.context == 300


@pytest.mark.parametrize(
    ("device", "host", "given", "expected"),
    [(24, 100, None, 131072), (12, 64, None, 16384), (24, 100, 9000, 9000), (1, 1, None, 4096)],
    ids=["room", "less room", "given", "none"],
)
def test_the_default_context_is_the_models_as_far_as_it_fits(device, host, given, expected):
    """A long one is not had by giving speed away; where nothing fits, the refusal is that of the modest one."""
    sizes = make_sizes(num_layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, context_length=131072)
    budgets, config = Budgets(device=device * GIB, host=host * GIB), EngineConfig(max_model_len=given)
    planner = planner_with_context(sizes, budgets, PCIE4_4090, config)
    assert planner.max_model_len == expected
    if host > 1:
        modest = Planner(sizes, budgets, PCIE4_4090, replace(config, max_model_len=given or 4096)).plan()
        rate = planner.plan().prediction.mean_tokens_per_second
        assert rate >= 0.95 * modest.prediction.mean_tokens_per_second


def test_windows_let_longer_contexts_in():
    """What all windows have left is neither in blocks nor in buffers: the default context is four times as long."""
    settings = {"num_layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "context_length": 131072}
    budgets, found = Budgets(device=20 * GIB, host=4 * GIB), []
    for window in (None, 4096):
        planner = planner_with_context(make_sizes(**settings, window=window), budgets, PCIE4_4090, EngineConfig())
        found.append(planner.max_model_len)
    assert found == [32768, 131072]
    plan = planner.plan()
    chunk = min(plan.buffers.queries, plan.max_idle_prefill_tokens)
    assert chunk > plan.buffers.queries - plan.max_batch
    assert 4095 + chunk <= plan.buffers.rows < 2 * 4096


def test_the_curve_is_throughput_over_share():
    """One best prediction for each share from 0 to 1; the plan's own is no worse than any of them."""
    planner = Planner(OPT_30B, Budgets(device=24 * GIB, host=200 * GIB), PCIE4_4090, EngineConfig())
    curve = planner.curve()
    assert [share for share, _ in curve] == pytest.approx([i / 20 for i in range(21)])
    rates = [prediction.mean_tokens_per_second for _, prediction in curve]
    assert 1.05 * rates[0] < max(rates) <= planner.plan().prediction.mean_tokens_per_second * 1.02


def test_the_curve_leaves_out_what_does_not_fit():
    """Where only activations are small enough for the host, the curve has the shares that fit."""
    weights, cache = SMALL.layers_bytes, 2048 * SMALL.token_bytes(BlockKind.KV)
    config = EngineConfig(placement=Placement.HOST)
    curve = Planner(SMALL, Budgets(device=256 * MIB, host=weights + cache * 3 // 4), PCIE4_4090, config).curve()
    assert curve[-1][0] == 1.0
    assert 0.4 < curve[0][0] < 0.7


@pytest.mark.usefixtures("closed_form")
def test_prediction_parts_are_seconds_of_all_layers():
    """Two models that differ in the number of layers alone, on the host: every part of the step doubles."""
    settings = {"max_batch": 8, "placement": Placement.HOST, "cache_policy": CachePolicy.ACTIVATION}
    one, two = (make_plan(make_sizes(num_layers=n), **settings).prediction for n in (3, 6))
    for part in ("bus", "forward", "regenerate", "attention", "prefill"):
        assert getattr(two, part) == pytest.approx(2 * getattr(one, part))
    assert one.step == pytest.approx(max(one.bus, one.gpu) + one.boundary)
    assert one.boundary == pytest.approx(min(one.bus, one.gpu) / (3 * one.mini_batches), rel=0.02)
    assert one.gpu == one.forward + one.regenerate + one.gather + one.attention + one.head
