"""Memory: what a device hands out is what the plan says, line by line, and steps stay within the lines for the rest."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from threading import RLock
from weakref import finalize

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hsrpc import Engine, SamplingParams
from hsrpc.device.device import CpuDevice, Stream
from hsrpc.device.uploads import Uploads
from hsrpc.draft.replay import ReplayDrafter
from hsrpc.engine import startup
from hsrpc.model.attention import Attention
from hsrpc.model.formats.rows import CodedRows
from hsrpc.plan.fitted import GRAPH_BYTES
from hsrpc.plan.graph_sizes import num_segment_graphs
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Plan
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference
from tests.engine.support import collect, config_for, greedy, parts, tight
from tests.engine.test_coded_weights import config_for as config_of_shape

BOUNDS = {DeviceUse.HIDDEN_STATES, DeviceUse.WORKSPACE, DeviceUse.GRAPHS, DeviceUse.RUNTIME}
"""Lines for what torch's own operations and libraries allocate."""
EXACT = (set(DeviceUse) | set(HostUse)) - BOUNDS - {DeviceUse.MEASUREMENT, HostUse.MEASUREMENT}
RESIDENT = {"gpu_memory": "1GiB", "host_memory": "64MiB", "resident_share": 1.0}
STREAMED = {"gpu_memory": "1GiB", "host_memory": "64MiB", "placement": "host"}
POLICIES = [
    {"cache_policy": "kv", "activation_share": None},
    {"cache_policy": "activation", "activation_share": None},
    {"cache_policy": "hybrid", "activation_share": 0.5},
    {"cache_policy": "auto", "activation_share": None},
    {"cache_policy": "recompute", "activation_share": None},
]
DEMAND = [
    STREAMED | {"experts": "demand"},
    {"gpu_memory": "1GiB", "host_memory": "64MiB", "experts": "demand", "resident_share": 0.6},
    None,
]
"""No slots, some, and budgets as small as can be."""
MANY = {"name": "many", "cache_policy": "hybrid", "max_batch": 16, "expected_context": 100}
"""A step has several mini-batches where buffers are small."""
ANEW = {"name": "anew", "cache_policy": "hybrid", "expected_context": 90, "recompute_share": 0.5}
PLACEMENTS = [
    STREAMED,
    RESIDENT,
    {"gpu_memory": "1GiB", "host_memory": "64MiB", "resident_share": 0.45},
]


class PeakDevice(CpuDevice):
    """Remembers the most that was held for each use."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[DeviceUse | HostUse, int] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, use: DeviceUse) -> torch.Tensor:
        found = super().empty(shape, dtype, use)
        self.most[use] = max(self.most.get(use, 0), self.allocated[use])
        return found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PeakDevice:
    """The engine's; the machine that the tests run on decides nothing."""
    device = PeakDevice()
    monkeypatch.setattr(startup, "open_device", lambda _: device)
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)
    return device


class _Watch(TorchDispatchMode):
    """Tells the device what memory operations make."""

    def __init__(self, device: TransientDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        given = {tensor.untyped_storage() for tensor in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            if tensor.untyped_storage() not in given:
                self._device.count(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return made


def _tensors(values: object) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class TransientDevice(CpuDevice):
    """Counts what steps and decode graphs allocate beside planned buffers, but not what only a CPU needs."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.most_of_graphs = self._now = self._before_graphs = 0
        self._lock = RLock()

    def count(self, storage: torch.UntypedStorage, size: int) -> None:
        """`size` bytes more, as long as there is `storage`."""
        finalize(storage, self._change, -size).atexit = False
        self._change(size)

    def _change(self, size: int) -> None:
        with self._lock:
            self._now += size
            self.most = max(self.most, self._now)

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return _Watch(self)

    def capture(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        """A step in one piece runs at once; one in several cannot where experts are missing, which are looked up."""

        def run(function: Callable[[], None]) -> None:
            if function is functions[0]:
                self._before_graphs = self._now
            most, self.most = self.most, 0
            with _disable_current_modes(), _Watch(self):
                function()
            self.most_of_graphs = max(self.most_of_graphs, self.most - self._before_graphs)
            self.most = most

        if len(functions) == 1:
            run(functions[0])
        return [partial(run, function) for function in functions]

    def copy_rows(self, *rows: torch.Tensor) -> None:
        with _disable_current_modes():
            super().copy_rows(*rows)


@pytest.fixture
def transient(monkeypatch: pytest.MonkeyPatch) -> TransientDevice:
    """The engine's; attention and rows of codes are a GPU's, which allocate their output alone; chunks of uploads count
    as far as used."""
    device = TransientDevice()
    monkeypatch.setattr(startup, "open_device", lambda _: device)
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)
    packed, in_place, send = Attention.packed, Attention.in_place, Uploads.send

    def as_on_a_gpu(attend: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
        def call(*args: object, **named: object) -> torch.Tensor | None:
            with _disable_current_modes():
                found = attend(*args, **named)
            return None if found is None else found.clone()

        return call

    def send_counted(uploads: Uploads) -> None:
        if uploads._used:
            device.count(uploads._device.untyped_storage(), uploads._used)
        send(uploads)

    def small_memory(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        with _disable_current_modes():
            return CpuDevice.small_memory(device, size)

    monkeypatch.setattr(Attention, "packed", as_on_a_gpu(packed))
    monkeypatch.setattr(Attention, "in_place", as_on_a_gpu(in_place))
    for name in ("encode", "encode_into", "decode", "put", "write"):
        monkeypatch.setattr(CodedRows, name, as_on_a_gpu(getattr(CodedRows, name)))
    monkeypatch.setattr(Uploads, "send", send_counted)
    monkeypatch.setattr(device, "small_memory", small_memory)
    return device


def lines(plan: Plan) -> dict[DeviceUse | HostUse, int]:
    """Both budgets' exact lines."""
    return {use: size for use, size in {**plan.device_bytes, **plan.host_bytes}.items() if use in EXACT}


def taken(device: CpuDevice) -> dict[DeviceUse | HostUse, int]:
    """What is held now on those lines."""
    gc.collect()
    return {use: size for use, size in device.allocated.items() if use in EXACT and size}


def without(plan: Mapping[DeviceUse | HostUse, int]) -> dict[DeviceUse | HostUse, int]:
    """Lines that are not 0."""
    return {use: size for use, size in plan.items() if size}


async def run(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> None:
    """All at once, to their ends."""
    await asyncio.gather(*(collect(engine.generate(prompt, params)) for prompt in prompts))


@pytest.mark.parametrize("placement", [*PLACEMENTS, None], ids=["host", "resident", "a part", "small"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["cache_policy"])
@pytest.mark.parametrize("model", ["opt-odd-heads", "mistral-window", "qwen3-moe"])
async def test_what_is_allocated_is_what_was_planned(
    model: str,
    policy: dict[str, object],
    placement: dict[str, object] | None,
    device: PeakDevice,
    reference: Callable[[str], Reference],
) -> None:
    """Every line, to the byte, before and after requests; also where the budgets are as small as can be."""
    made = reference(model)
    config = config_for(made, **policy, **placement) if placement else tight(made, **policy)
    async with Engine(config) as engine:
        assert taken(device) == without(lines(engine.plan))
        await run(engine, made.prompts[:4], greedy(12))
        assert taken(device) == without(lines(engine.plan))
        assert (DeviceUse.WEIGHT_BUFFERS in taken(device)) == (placement is not RESIDENT)


CODED = [
    {"cache_format": "fp8", "cache_policy": "kv", "activation_share": None},
    {"cache_format": "fp8", "cache_policy": "activation", "activation_share": None},
    {"cache_format": "int8", "cache_policy": "hybrid", "activation_share": 0.5},
    {"cache_format": "fp8", "cache_policy": "auto", "activation_share": None},
]
"""Kinds of blocks that are rounded, or not there."""


@pytest.mark.parametrize("placement", [STREAMED, RESIDENT], ids=["host", "resident"])
@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy["cache_policy"])
async def test_coded_caches_take_what_was_planned(
    policy: dict[str, object],
    placement: dict[str, object],
    device: PeakDevice,
    transient: TransientDevice,
    reference: Callable[[str], Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every line to the byte, with the weight that is coded in each step; and steps stay within theirs."""
    made, config = reference("opt-odd-heads"), config_for(reference("opt-odd-heads"), **policy, **placement)
    monkeypatch.setattr(startup, "open_device", lambda _: device)
    async with Engine(config) as engine:
        assert taken(device) == without(lines(engine.plan))
        await run(engine, made.prompts[:4], greedy(12))
        assert taken(device) == without(lines(engine.plan))
    monkeypatch.setattr(startup, "open_device", lambda _: transient)
    async with Engine(config) as engine:
        await run(engine, made.prompts[:8], greedy(30))
        planned = engine.plan.device_bytes
        assert 0 < transient.most <= planned[DeviceUse.WORKSPACE] + planned[DeviceUse.HIDDEN_STATES]
        assert transient.most_of_graphs <= planned[DeviceUse.GRAPHS]


@pytest.mark.parametrize("placement", DEMAND, ids=["host", "slots", "small"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["cache_policy"])
async def test_experts_on_demand_take_what_was_planned(
    policy: dict[str, object],
    placement: dict[str, object] | None,
    device: PeakDevice,
    reference: Callable[[str], Reference],
) -> None:
    """Slots, the area that the layers share, and the host's copies."""
    made = reference("qwen3-moe")
    config = config_for(made, **policy, **placement) if placement else tight(made, experts="demand", **policy)
    async with Engine(config) as engine:
        assert taken(device) == without(lines(engine.plan))
        await run(engine, made.prompts[:4], greedy(12))
        assert taken(device) == without(lines(engine.plan))
        assert taken(device)[DeviceUse.EXPERTS] == engine.plan.demand.device_bytes


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["host", "resident", "a part"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["cache_policy"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_coded_weights_take_no_more_than_was_planned(
    dtype: str, policy: dict[str, object], placement: dict[str, object], device: PeakDevice, tmp_path: Path
) -> None:
    """All lines but that of the coded weights to the byte, and while they are coded the room of their buffers does."""
    placement = {"placement": "auto"} | placement
    config = config_of_shape(tmp_path, "opt", dtype=dtype, weight_coding="lossless", **policy, **placement)
    async with Engine(config) as engine:
        planned, found = lines(engine.plan), taken(device)
        most, coded = planned.pop(HostUse.STREAMED_WEIGHTS), found.pop(HostUse.STREAMED_WEIGHTS, 0)
        assert found == without(planned)
        assert coded == sum(layer.bus_bytes for layer in parts(engine).prefetcher.places)
        assert 0.8 * most <= coded <= most
        assert device.most.get(DeviceUse.WEIGHT_BUFFERS, 0) == planned[DeviceUse.WEIGHT_BUFFERS]


@pytest.mark.parametrize("placement", [STREAMED, RESIDENT, None], ids=["host", "resident", "small"])
@pytest.mark.parametrize(
    "policy", [*POLICIES, MANY, ANEW], ids=lambda policy: policy.get("name", policy["cache_policy"])
)
@pytest.mark.parametrize("model", ["opt-odd-heads", "mistral-window", "qwen3-moe"])
async def test_steps_stay_within_their_lines(
    model: str,
    policy: dict[str, object],
    placement: dict[str, object] | None,
    transient: TransientDevice,
    reference: Callable[[str], Reference],
) -> None:
    """What operations allocate meanwhile is no more than workspace and hidden states, and for graphs their line."""
    made = reference(model)
    settings = {name: value for name, value in policy.items() if name != "name"}
    config = config_for(made, **settings, **placement) if placement else tight(made, **settings)
    async with Engine(config) as engine:
        sampled = SamplingParams(top_k=30, top_p=0.9, min_p=0.01, logprobs=3, seed=1, max_tokens=30, ignore_eos=True)
        await run(engine, made.prompts[:8], sampled)
        planned = engine.plan.device_bytes
        room = planned[DeviceUse.WORKSPACE] + planned[DeviceUse.HIDDEN_STATES]
        assert 0 < transient.most <= room
        assert transient.most_of_graphs <= planned[DeviceUse.GRAPHS]
        assert (transient.most_of_graphs > 0) == (planned[DeviceUse.GRAPHS] > 0)


@pytest.mark.parametrize(
    ("model", "policy", "placement"),
    [
        ("opt-odd-heads", POLICIES[2], STREAMED),
        ("opt-odd-heads", POLICIES[3], None),
        ("opt-odd-heads", POLICIES[4], None),
        ("mistral-window", POLICIES[0], None),
        ("mistral-window", POLICIES[1], RESIDENT),
    ],
    ids=["hybrid, host", "auto, small", "recompute, small", "kv, small", "activation, resident"],
)
async def test_steps_with_drafts_stay_within_their_lines(
    model: str,
    policy: dict[str, object],
    placement: dict[str, object] | None,
    transient: TransientDevice,
    reference: Callable[[str], Reference],
) -> None:
    """Queries, rows of buffers and logits of as many drafts as the plan has room for, of all requests at once."""
    made = reference(model)
    settings = {"max_draft_tokens": 15, **policy}
    config = config_for(made, **settings, **placement) if placement else tight(made, **settings)
    drafter = ReplayDrafter(dict(zip(map(tuple, made.prompts), made.outputs, strict=True)), 0.9)
    async with Engine(config, drafter=drafter) as engine:
        assert taken(transient) == without(lines(engine.plan))
        await run(engine, made.prompts[:8], SamplingParams(temperature=0, logprobs=3, max_tokens=30, ignore_eos=True))
        planned, stats = engine.plan.device_bytes, engine.stats()
        assert taken(transient) == without(lines(engine.plan))
        assert 0 < transient.most <= planned[DeviceUse.WORKSPACE] + planned[DeviceUse.HIDDEN_STATES]
        assert stats.accepted_tokens > 8 * 10


async def test_graphs_in_segments_stay_within_their_line(
    transient: TransientDevice, reference: Callable[[str], Reference]
) -> None:
    """From the first segment of a step to its last; so do steps with prompts, and what one graph takes is left."""
    made = reference("qwen3-moe")
    settings = {"cache_policy": "kv", "activation_share": None, "gpu_memory": "1GiB", "host_memory": "64MiB"}
    async with Engine(config_for(made, experts="demand", resident_share=0.6, **settings)) as engine:
        await run(engine, made.prompts[:8], greedy(30))
        planned, demand = engine.plan.device_bytes, engine.plan.demand
        assert demand is not None
        graphs = num_segment_graphs(engine.plan.max_batch, demand.num_segments)
        assert 0 < transient.most <= planned[DeviceUse.WORKSPACE] + planned[DeviceUse.HIDDEN_STATES]
        assert 0 < transient.most_of_graphs <= planned[DeviceUse.GRAPHS] - graphs * GRAPH_BYTES


@pytest.mark.parametrize("placement", [STREAMED, RESIDENT, None], ids=["host", "resident", "small"])
@pytest.mark.parametrize("latent_attention", ["rebuild", "absorb"])
async def test_steps_with_latents_stay_within_their_lines(
    latent_attention: str,
    placement: dict[str, object] | None,
    transient: TransientDevice,
    reference: Callable[[str], Reference],
) -> None:
    """Whether single queries attend to K and V that are rebuilt, or to latents."""
    made = reference("deepseek-v2")
    settings = {"cache_policy": "activation", "activation_share": None, "latent_attention": latent_attention}
    config = config_for(made, **settings, **placement) if placement else tight(made, **settings)
    async with Engine(config) as engine:
        await run(engine, made.prompts[:8], greedy(30))
        planned = engine.plan.device_bytes
        assert 0 < transient.most <= planned[DeviceUse.WORKSPACE] + planned[DeviceUse.HIDDEN_STATES]
        assert transient.most_of_graphs <= planned[DeviceUse.GRAPHS]
        assert (transient.most_of_graphs > 0) == (latent_attention == "absorb" and placement is RESIDENT)


def test_what_is_gone_is_not_counted() -> None:
    """Views keep memory; each use has its own bytes, those of other threads too."""
    device = CpuDevice()
    kept = device.empty((3, 5), torch.float16, DeviceUse.WORKSPACE)
    view = device.empty((8,), torch.uint8, DeviceUse.WORKSPACE)[2:4]
    pinned = device.pinned(7, HostUse.CACHE_BLOCKS).view(7, 1)
    assert device.allocated == {DeviceUse.WORKSPACE: 38, HostUse.CACHE_BLOCKS: 7}
    del view
    assert device.allocated == {DeviceUse.WORKSPACE: kept.nbytes, HostUse.CACHE_BLOCKS: pinned.nbytes}
    del kept, pinned
    assert not device.allocated
