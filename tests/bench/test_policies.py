"""Policies of other papers, emulated: their rules, their tokens, the bytes they move, the memory they take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.policies.__main__ import main
from benchmarks.policies.emulate import Policy
from benchmarks.policies.kvpr import ByPosition
from benchmarks.policies.rules import hcache_layers, kvpr_blocks
from hsrpc import Engine, EngineConfig
from hsrpc.engine import startup
from hsrpc.engine.startup import ChoosePlan
from hsrpc.errors import ConfigError
from hsrpc.model.spec import load_spec
from hsrpc.plan.memory_use import HostUse
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.roofline import StepRecord
from hsrpc.schedule.assemble import Assembler, batch_shapes
from hsrpc.schedule.blocks import BlockKind, BlockManager, BlockTable, PoolId, Tier
from hsrpc.schedule.step import RowCosts, Scheduled, Step
from hsrpc.schedule.sweep import Carried, OpKind, OpList, sweep
from tests.bench.conftest import TINY
from tests.engine.conftest import HARDWARE, smallest
from tests.engine.reference import Reference, make_reference
from tests.engine.support import collect, greedy, parts

BALANCED = replace(HARDWARE, gemm_rate=3e11)
"""KVPR's rule gives 12 of 24 tokens of the model `opt`, HCache's 3 of 4 layers."""
NUM_LAYERS, BLOCK_SIZE, MAX_TOKENS = 4, 4, 40
GREEDY = greedy(MAX_TOKENS)
Make = Callable[[str], Reference]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Make:
    torch.set_num_threads(1)
    return cache(lambda name: make_reference(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that the tests run on decides nothing."""
    monkeypatch.setattr(startup, "calibrate", lambda *_: BALANCED)


def config_for(made: Reference, **settings: object) -> EngineConfig:
    """Prompts are computed in chunks of 24 tokens; weights stream, and all of the cache is on the host."""
    base = {"max_batch": 6, "max_model_len": 128, "max_prefill_tokens": 24, "expected_context": 24, "device": "cpu"}
    base |= {"placement": "host", "block_size": BLOCK_SIZE, "gpu_memory": "64MiB", "host_memory": "64MiB"}
    config = EngineConfig(model=str(made.directory), **(base | settings))
    return replace(config, min_batch=config.max_batch)


def follow(name: str) -> ChoosePlan:
    """`hcache 1` is HCache's split with 1 layer of hidden states; without a number its rule decides."""
    policy, _, layers = name.partition(" ")
    return Policy(policy).choose_plan(int(layers) if layers else None)


def plan_of(name: str, made: Reference, config: EngineConfig) -> Plan:
    """As an engine plans it."""
    sizes = load_spec(made.directory, torch.float32).sizes
    budgets = Budgets(device=int(config.gpu_memory), host=int(config.host_memory))
    return follow(name)(Planner(sizes, budgets, BALANCED, config))


def tightest(name: str, made: Reference, config: EngineConfig) -> EngineConfig:
    """The smallest device budget, then the smallest host budget, with which the whole batch runs."""

    def enough(budget: str) -> Callable[[int], bool]:
        return lambda size: runs(name, made, replace(config, **{budget: size}))

    config = replace(config, gpu_memory=smallest(enough("gpu_memory")))
    return replace(config, host_memory=smallest(enough("host_memory")))


def runs(name: str, made: Reference, config: EngineConfig) -> bool:
    try:
        return plan_of(name, made, config).max_batch == config.max_batch
    except ConfigError:
        return False


async def outputs(engine: Engine, prompts: Sequence[list[int]]) -> list[list[int]]:
    async def one(prompt: list[int]) -> list[int]:
        return [token async for delta in engine.generate(prompt, GREEDY) for token in delta.token_ids]

    return await asyncio.gather(*map(one, prompts))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("kvpr", "opt"),
        ("kvpr", "llama"),
        ("hcache", "opt"),
        ("hcache 4", "opt"),
        ("hcache 1", "llama"),
        ("hcache 2", "mistral-window"),
    ],
)
async def test_tokens_equal_the_reference(name: str, model: str, reference: Make) -> None:
    """Every token is the reference's: prompts in chunks, several mini-batches, so few blocks that requests give way."""
    made = reference(model)
    config = tightest(name, made, config_for(made))
    async with Engine(config, choose_plan=follow(name)) as engine:
        assert await outputs(engine, made.prompts) == [tokens[:MAX_TOKENS] for tokens in made.outputs]
        stats = engine.stats()
        assert stats.preemptions > 0 or model == "mistral-window"  # behind a window blocks come free
        assert engine.plan.buffers.rows < 6 * 64
        assert stats.regenerated_tokens > 0
        assert sum(stats.used_blocks.values()) == 0


async def decodes_of(name: str, made: Reference) -> tuple[Plan, list[StepRecord]]:
    """The plan, and the steps in which all of three requests, with prompts of 20 tokens, decode."""
    records: list[StepRecord] = []
    prompts = [list(range(first, first + 20)) for first in (3, 50, 100)]
    config = config_for(made, max_prefill_tokens=60)
    async with Engine(config, observe=records.append, choose_plan=follow(name)) as engine:
        await asyncio.gather(*(collect(engine.generate(prompt, GREEDY)) for prompt in prompts))
        return engine.plan, [record for record in records if record.decode_tokens == 3]


@pytest.mark.parametrize(("name", "hidden_layers"), [("kvpr", None), ("hcache", 3), ("hcache 1", 1), ("hcache 4", 4)])
async def test_bytes_and_rebuilt_rows_are_counted_as_they_are_moved(
    name: str, hidden_layers: int | None, reference: Make
) -> None:
    """In each step: what the contexts' tokens take, in each layer, by the kind that they have there."""
    made = reference("opt")
    plan, records = await decodes_of(name, made)
    sizes = load_spec(made.directory, torch.float32).sizes
    assert plan.kv_layers == frozenset(range(hidden_layers or NUM_LAYERS, NUM_LAYERS))
    assert len(records) > MAX_TOKENS // 2
    for record in records:
        rebuilt = 3 * 12 * NUM_LAYERS if hidden_layers is None else record.context_tokens * hidden_layers
        loaded = record.context_tokens * NUM_LAYERS - rebuilt
        assert record.regenerated_tokens == rebuilt
        assert record.cache_bytes == rebuilt * sizes.max_row_bytes(BlockKind.ACTIVATION) + loaded * sizes.max_row_bytes(
            BlockKind.KV
        )


class Recording:
    """An assembler that keeps the steps that it makes, each with what was carried into it."""

    def __init__(self, assembler: Assembler) -> None:
        self.assembler = assembler
        self.made: list[tuple[Step, Carried]] = []

    def assemble(self, scheduled: Scheduled, carried: Carried) -> Step:
        step = self.assembler.assemble(scheduled, carried)
        self.made.append((step, carried))
        return step


@pytest.mark.parametrize(("name", "hidden_layers"), [("hcache", 3), ("hcache 1", 1), ("hcache 4", 4), ("kvpr", 4)])
async def test_a_step_is_our_own_list_less_what_is_not_rebuilt(name: str, hidden_layers: int, reference: Make) -> None:
    """K and V are rebuilt in exactly the layers of hidden states; all else is as in a list that rebuilds in all."""
    made = reference("opt")
    async with Engine(config_for(made), choose_plan=follow(name)) as engine:
        executor = parts(engine).executor
        executor._assembler = recording = Recording(executor._assembler)
        await outputs(engine, made.prompts)
    assembler = recording.assembler
    rebuilding = tuple(place._replace(rebuilds=True) for place in assembler.layers)
    num_rebuilding = 0
    for step, carried in recording.made:
        shapes = batch_shapes(step.mini_batches, assembler.max_queries)
        layers = set(range(hidden_layers)) if any(shape.rebuilds for shape in shapes) else set()
        assert {op.layer for op in step.ops.ops if op.kind is OpKind.REBUILD} == layers
        assert step.ops == without_rebuilding(sweep(rebuilding, shapes, carried), set(range(NUM_LAYERS)) - layers)
        num_rebuilding += bool(layers)
    assert num_rebuilding >= MAX_TOKENS


def without_rebuilding(whole: OpList, layers: set[int]) -> OpList:
    """The list with nothing rebuilt in these layers, numbered anew."""
    kept = [i for i, op in enumerate(whole.ops) if op.kind is not OpKind.REBUILD or op.layer not in layers]
    numbers = {old: new for new, old in enumerate(kept)}
    ops = [whole.ops[i]._replace(after=tuple(numbers[n] if n >= 0 else n for n in whole.ops[i].after)) for i in kept]
    loaded = tuple(numbers[len(whole) + n] - len(kept) for n in whole.carries.loaded)
    return OpList(tuple(ops), whole.carries._replace(loaded=loaded))


async def test_the_first_blocks_of_requests_that_kvpr_serves_are_activations(reference: Make) -> None:
    """At every step of each request, however prompts and outputs grow: three blocks, then K and V."""
    made, tables = reference("opt"), []

    def look(_: StepRecord) -> None:
        tables.extend(list(request.blocks.pools) for request in engine._scheduler.live())

    async with Engine(config_for(made), observe=look, choose_plan=follow("kvpr")) as engine:
        await outputs(engine, made.prompts)
    assert max(map(len, tables)) > 3 + MAX_TOKENS // BLOCK_SIZE
    for pools in tables:
        assert pools == [PoolId.HOST_ACTIVATION] * min(3, len(pools)) + [PoolId.HOST_KV] * max(0, len(pools) - 3)


@pytest.mark.parametrize("name", ["kvpr", "hcache", "hcache 1"])
async def test_host_memory_is_counted_and_within_its_budget(name: str, reference: Make) -> None:
    """What the plan says is what the pools take; the budget is kept wherever between two blocks it ends."""
    made = reference("opt")
    config = tightest(name, made, config_for(made))
    async with Engine(config, choose_plan=follow(name)) as engine:
        pools = parts(engine).cache._pools
        taken = sum(layer.nbytes for pool, layers in pools.items() if pool.tier is Tier.HOST for layer in layers)
        assert engine.plan.host_bytes[HostUse.CACHE_BLOCKS] == taken
    least = int(config.host_memory)
    block_bytes = BLOCK_SIZE * load_spec(made.directory, torch.float32).sizes.token_bytes(BlockKind.KV)
    for host in range(least, least + 5 * block_bytes, block_bytes // 7):
        plan = plan_of(name, made, replace(config, host_memory=host))
        assert host - block_bytes < sum(plan.host_bytes.values()) <= host == plan.budgets.host


@pytest.mark.parametrize(("name", "hidden_layers"), [("kvpr", None), ("hcache", 3), ("hcache 1", 1)])
def test_the_plan_predicts_the_split(name: str, hidden_layers: int | None, reference: Make) -> None:
    """Bus time and rebuilding of six requests of the expected 24 tokens; mini-batches are formed by the same costs."""
    made = reference("opt")
    plan, sizes = plan_of(name, made, config_for(made)), load_spec(made.directory, torch.float32).sizes
    rebuilt = 12 * NUM_LAYERS if hidden_layers is None else 24 * hidden_layers
    loaded = 24 * NUM_LAYERS - rebuilt
    cached = 6 * (rebuilt * sizes.layers[0].activation.num_bytes + loaded * sizes.layers[0].kv.num_bytes)
    assert plan.prediction.bus * BALANCED.load_bandwidth == pytest.approx(sum(plan.streamed_bytes) + cached)
    assert plan.prediction.regenerate * BALANCED.gemm_rate == pytest.approx(
        6 * rebuilt * sizes.layers[0].regenerate_flop
    )
    assert plan.activation_share == pytest.approx(rebuilt / (24 * NUM_LAYERS))
    if hidden_layers is not None:
        again = predict_at(plan, sizes, 24)
        assert (again.bus, again.regenerate) == pytest.approx((plan.prediction.bus, plan.prediction.regenerate))
        assert plan.costs.load_activation * BALANCED.load_bandwidth * 24 * NUM_LAYERS == pytest.approx(cached / 6)
        assert plan.costs.regenerate * BALANCED.gemm_rate * 24 * NUM_LAYERS == pytest.approx(
            rebuilt * sizes.layers[0].regenerate_flop
        )


def test_kvpr_ends_transfer_and_rebuilding_together() -> None:
    """At l * G = (context - l) * V; nothing is rebuilt where an activation saves nothing."""
    assert kvpr_blocks(RowCosts(load_kv=2, load_activation=1, regenerate=2), context=64, block_size=8) == 4
    assert kvpr_blocks(RowCosts(load_kv=3, load_activation=1, regenerate=1), context=64, block_size=8) == 6
    assert kvpr_blocks(RowCosts(load_kv=1, load_activation=1, regenerate=0), context=64, block_size=8) == 0
    assert kvpr_blocks(RowCosts(load_kv=2, load_activation=1, regenerate=0), context=60, block_size=8) == 8


def test_hcache_ends_bus_and_gpu_together() -> None:
    """At n * G = n * A + (L - n) * V; hidden states everywhere where the bus is slower even so."""
    assert hcache_layers(RowCosts(load_kv=2, load_activation=1, regenerate=2), 30) == 20
    assert hcache_layers(RowCosts(load_kv=2, load_activation=1, regenerate=1), 30) == 30
    assert hcache_layers(RowCosts(load_kv=1, load_activation=1.5, regenerate=1), 30) == 0


def test_the_first_blocks_of_each_request_are_activations() -> None:
    """However they come, in whatever turn; a kind that has run out is not replaced by the other."""
    blocks = BlockManager({PoolId.HOST_KV: 5, PoolId.HOST_ACTIVATION: 6}, max_batch=2, rule=ByPosition(3))
    one, two = BlockTable(), BlockTable()
    assert blocks.grow(one, 2)
    assert blocks.grow(two, 4)
    assert blocks.grow(one, 5)
    assert [PoolId(pool) for pool in one.pools] == [PoolId.HOST_ACTIVATION] * 3 + [PoolId.HOST_KV] * 4
    assert [PoolId(pool) for pool in two.pools] == [PoolId.HOST_ACTIVATION] * 3 + [PoolId.HOST_KV]
    blocks.free(two)
    assert not blocks.grow(two, 5)
    assert len(two) == 0
    assert blocks.num_free == 4
    assert blocks.grow(two, 4)


async def test_what_is_not_emulated_is_said(reference: Make) -> None:
    """Caches on the device, and layers that the model has not; the error names the remedy."""
    made = reference("opt")
    for name, settings, message in (
        ("kvpr", {"placement": "auto"}, "use placement=host"),
        ("hcache", {"placement": "auto"}, "use placement=host"),
        ("hcache 5", {}, "give 1 to 4"),
        ("hcache 0", {}, "measure the policy kv"),
    ):
        with pytest.raises(ConfigError, match=message):
            await Engine(config_for(made, **settings), choose_plan=follow(name)).__aenter__()


async def test_an_emulation_is_its_engine_s_alone(reference: Make) -> None:
    """An engine beside it plans for itself."""
    made = reference("opt")
    async with Engine(config_for(made), choose_plan=follow("hcache 2")) as emulating, Engine(config_for(made)) as own:
        assert emulating.plan.kv_layers == {2, 3}
        assert not own.plan.kv_layers


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Three requests to a model of two layers, from a configuration file."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    memory = ["--gpu-memory", "64MiB", "--host-memory", "64MiB", "--json", str(tmp_path / "found.json")]
    lengths = ["--batch", "3", "--prompt", "40", "--output", "32", "--steps", "6"]
    return ["--shape", str(file), "--device", "cpu", "--dtype", "float32", *lengths, *memory]


def cells_of(tmp_path: Path) -> dict[str, dict[str, object]]:
    cells = json.loads((tmp_path / "found.json").read_text())["policies"]
    by_policy = {cell["policy"]: cell for cell in cells}
    assert len(by_policy) == len(cells)
    return by_policy


def test_all_policies_are_measured_and_drawn(command, tmp_path, capsys):
    """Each with its share and the limit of the bytes that it moved; emulations are named so."""
    main([*command, "--plot", str(tmp_path / "found.png")])
    cells = cells_of(tmp_path)
    assert list(cells) == ["kv", "activation", "auto", "kvpr", "hcache"]
    assert [cells[name]["share"] for name in ("kv", "activation", "hcache")] == [0, 1, 0.5]
    assert 16 / 72 < cells["kvpr"]["share"] < 16 / 40
    for cell in cells.values():
        result = cell["result"]
        row_bytes = 4 * 64 * (2 * (1 - cell["recomputed_share"]) - cell["share"])
        assert cell["cache_bytes"] == pytest.approx(2 * cell["held_tokens"] * row_bytes)
        assert result["limit"]["bus"] * HARDWARE.load_bandwidth >= cell["cache_bytes"]
        assert cell["efficiency"] > 0
        assert result["preemptions"] == 0
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "kvpr (emulated)" in printed
    assert "hidden states in 1 of 2 layers" in printed


def test_a_file_is_continued_with_the_same_settings_only(command, tmp_path, capsys):
    """A failure is kept with its reason; what is there is not measured again."""
    main([*command, "--policy", "hcache", "--hidden-layers", "3"])
    assert "give 1 to 2" in cells_of(tmp_path)["hcache"]["failure"]
    main([*command, "--policy", "hcache", "kv", "--hidden-layers", "3"])
    assert ["failure" in cell for cell in cells_of(tmp_path).values()] == [True, False]
    with pytest.raises(SystemExit):
        main([*command, "--policy", "hcache"])
    assert "give another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--output", "3"], "raise the steps"),
        (["--host-memory", "1MiB", "--batch", "64"], "fit at once"),
        (["--seconds", "0.001"], "took more than"),
    ],
)
def test_a_run_that_is_no_measurement_is_a_failure(more, reason, command, tmp_path):
    """It names what to change."""
    main([*command, "--policy", "kvpr", *more])
    assert reason in cells_of(tmp_path)["kvpr"]["failure"]
