"""A weight format and a family that the package does not know: planned, loaded, streamed, computed and accounted for.

The format has 8 bits for each weight and one scale for each row. The family's layers differ: odd ones have another MLP,
and every third one a sliding window.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc import Engine, EngineConfig
from hsrpc.config import ResidentWeights, WeightCoding
from hsrpc.device.device import CpuDevice
from hsrpc.engine import startup
from hsrpc.engine.loading import load_weights
from hsrpc.engine.weights import LayerWeights, arrange
from hsrpc.model.checkpoint import RandomWeights
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.families.decoder import DOWN, GATE_UP, Decoder
from hsrpc.model.families.readers import DECODERS
from hsrpc.model.families.registry import create_family, register_family
from hsrpc.model.families.settings import DecoderSettings
from hsrpc.model.family import Family
from hsrpc.model.formats.format import CacheFormat, Encoded, Formats, FromValues, Packing, moved
from hsrpc.model.formats.lossless import WORD, Lossless
from hsrpc.model.formats.plain import Plain
from hsrpc.model.layers import linear_tensors
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.plan import Budgets
from hsrpc.plan.planner import Planner
from hsrpc.plan.sizes import LayerSizes, Stays, TensorSizes, align
from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.sweep import BUFFERS
from tests.engine.conftest import HARDWARE
from tests.engine.support import collect, greedy, idle, ids, parts

NUM_LAYERS, WINDOW, NUM_TOKENS = 5, 6, 24
CONFIG = {
    "architectures": ["PatchworkForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 120,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
PROMPTS = [[(7 * i + 3 * j) % 110 + 5 for j in range(2 + 9 * i)] for i in range(5)]


@dataclass(frozen=True)
class BytesPacking(Packing):
    """Scales of the rows, float32, then the weights, int8."""

    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * (4 + self.shape[1])

    @property
    def decoded_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def open(self, data: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target.view(torch.float32).view(self.shape)

    @classmethod
    def decoding(cls, tensors: Sequence[Encoded[Self]], moves: torch.Tensor | None = None) -> Callable[[], None]:
        def decode() -> None:
            for packing, data, operand, _ in moved(tensors, moves):
                scales = data[: 4 * packing.shape[0]].view(torch.float32)
                weights = data[4 * packing.shape[0] :].view(torch.int8).view(packing.shape)
                torch.mul(weights, scales[:, None], out=operand)

        return decode


@dataclass(frozen=True)
class Bytes(FromValues):
    """float32 matrices in a quarter of their bytes."""

    def sizes(self, tensor: TensorSpec) -> TensorSizes:
        own, packed = align(4 * tensor.numel), align(BytesPacking(tensor.shape).num_bytes)
        return TensorSizes(
            name=tensor.name,
            num_elements=tensor.numel,
            resident_bytes=4 * tensor.numel,
            device_bytes=own,
            buffer_bytes=packed,
            bus_bytes=packed,
            host_bytes=packed,
            decoded_bytes=own,
            decode_traffic=own + packed,
        )

    def pack(self, values: torch.Tensor) -> tuple[Packing, torch.Tensor]:
        scales = values.abs().amax(1) / 127
        weights = (values / scales[:, None]).round().to(torch.int8)
        data = torch.cat([scales.view(torch.uint8), weights.view(-1).view(torch.uint8)])
        return BytesPacking(tuple(values.shape)), data

    def place(self, values: torch.Tensor) -> torch.Tensor:
        packing, data = self.pack(values)
        packing.decoding([Encoded(packing, data, values)])()
        return values

    def compile(self, device: torch.device) -> None:
        compiled.append(device)


compiled: list[torch.device] = []
"""Where the format was made ready."""


class Patchwork(Decoder):
    """Layers that differ in their MLP and in what they see."""

    @staticmethod
    def read_settings(config: ConfigFile) -> DecoderSettings:
        return DECODERS["llama"].read(config)

    def ffn_size(self, layer: int) -> int:
        return 40 if layer % 2 else self.sizes.ffn_size

    def layer_tensors(self, layer: int) -> tuple[TensorSpec, ...]:
        kept = [tensor for tensor in super().layer_tensors(layer) if tensor.name not in (GATE_UP.weight, DOWN.weight)]
        prefix, ffn = f"model.layers.{layer}.mlp", self.ffn_size(layer)
        gate_up = linear_tensors(
            GATE_UP, (f"{prefix}.gate_proj", f"{prefix}.up_proj"), (ffn, ffn), self.sizes.hidden_size, bias=False
        )
        down = linear_tensors(DOWN, (f"{prefix}.down_proj",), (self.sizes.hidden_size,), ffn, bias=False)
        return (*kept, *gate_up, *down)

    def layer_sizes(self, layer: int) -> LayerSizes:
        window = WINDOW if layer % 3 == 1 else None
        return replace(super().layer_sizes(layer), ffn_size=self.ffn_size(layer), sliding_window=window)

    def format_choices(self, coding: WeightCoding, device: torch.device) -> Sequence[Formats]:
        cache = CacheFormat(self.spec.dtype)
        return [Formats(lambda tensor: Bytes() if len(tensor.shape) == 2 else Plain(self.spec.dtype), cache, cache)]


register_family("patchwork", Patchwork, architectures=("PatchworkForCausalLM",), model_types=())


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that the tests run on decides nothing."""
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)
    compiled.clear()


def config_for(directory: Path, **settings: object) -> EngineConfig:
    """Everything on the host, prompts in chunks."""
    file = directory / "patchwork.json"
    file.write_text(json.dumps(CONFIG))
    base = {"max_batch": 4, "max_model_len": 96, "max_prefill_tokens": 16, "expected_context": 48, "device": "cpu"}
    base |= {"gpu_memory": "16MiB", "host_memory": "16MiB", "placement": "host", "block_size": 4}
    config = EngineConfig(model=f"random:{file}", **(base | settings))
    return replace(config, min_batch=config.max_batch)


def rounded(tensor: TensorSpec) -> torch.Tensor:
    """A weight as the format keeps it, by a formula of its own."""
    values = torch.empty(tensor.shape)
    RandomWeights(0).read(tensor, values)
    if values.dim() == 1:
        return values
    step = values.abs().max(dim=1, keepdim=True).values / 127
    return torch.round(values / step).clamp(-127, 127) * step


def attend(family: Family, q: torch.Tensor, kv: torch.Tensor, window: int | None) -> torch.Tensor:
    """Dense attention of one request: q [n, q], kv [n, 2*kv] to [n, q]."""
    count, heads = len(q), (-1, family.sizes.head_dim)
    k, v = kv.unflatten(1, (2, *heads)).unbind(1)
    distance = torch.arange(count)[:, None] - torch.arange(count)[None, :]
    hidden = (distance < 0) | (distance >= (window or count))
    scores = torch.einsum("qhd,khd->hqk", q.unflatten(1, heads), k) * family.attention_scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def continued(family: Family, prompt: list[int]) -> list[int]:
    """The greedy tokens of a plain forward pass over all tokens, again for each one."""
    fixed = {}
    for tensor in family.fixed_tensors():
        fixed[tensor.name] = torch.empty(tensor.shape)
        RandomWeights(0).read(tensor, fixed[tensor.name])
    layers = [{each.name: rounded(each) for each in family.layer_tensors(i)} for i in range(NUM_LAYERS)]
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        positions = torch.arange(len(tokens))
        hidden = family.embed(fixed, torch.tensor(tokens), positions)
        for layer, w in enumerate(layers):
            _, q, kv = family.project(w, layer, hidden, family.rotation(positions))
            attended = attend(family, q, kv, WINDOW if layer in (1, 4) else None)
            hidden = family.finish_layer(w, layer, hidden, attended)
        tokens.append(int(family.logits(fixed, hidden[-1:]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("residence", [ResidentWeights.DECODED, ResidentWeights.PACKED])
@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("policy", ["kv", "activation", "hybrid", "recompute"])
async def test_tokens_are_those_of_a_plain_forward_pass(
    policy: str, resident: float, residence: ResidentWeights, tmp_path: Path
) -> None:
    """With all weights streamed, with a part of them on the device, and with all; and the bytes are those planned."""
    share = {"activation_share": 0.5} if policy == "hybrid" else {}
    placement = {"placement": "auto", "resident_share": resident} if resident else {}
    config = config_for(tmp_path, cache_policy=policy, resident_weights=residence, **share, **placement)
    moved: list[int] = []
    async with Engine(config, observe=lambda step: moved.append(step.weight_bytes)) as engine:
        found = await asyncio.gather(*(collect(engine.generate(prompt, greedy(NUM_TOKENS))) for prompt in PROMPTS))
        await idle(engine)
        plan, family = engine.plan, create_family(engine.spec)
        layers = parts(engine).prefetcher._layers
    with torch.inference_mode():
        assert [ids(each) for each in found] == [continued(family, prompt) for prompt in PROMPTS]
    packed = [0 if layer.packed is None else len(layer.packed) for layer in layers]
    assert packed == [placed.host_bytes for placed in plan.placed]
    assert sum(packed) == plan.host_bytes[HostUse.STREAMED_WEIGHTS]
    assert median(moved) == pytest.approx(sum(packed))
    assert (len(compiled) > 0) == (resident < 1 or residence is ResidentWeights.PACKED)
    ready = sum(tensor.nbytes for layer in layers for tensor in layer.resident.values())
    kept = sum(each.memory.nbytes for layer in layers for each in layer.kept)
    assert (ready + kept, kept) == (plan.device_bytes[DeviceUse.RESIDENT_WEIGHTS], plan.kept_bytes)
    assert (kept > 0) == (resident > 0 and residence is ResidentWeights.PACKED)


def test_tensors_packed_in_one_way_are_decoded_together() -> None:
    """Whatever lies between them: a call for each way, for all that do not lie ready."""
    formats = [Bytes(), Lossless(torch.bfloat16), Bytes(), Lossless(torch.bfloat16)]
    values = [
        torch.randn(3, WORD).to(torch.bfloat16 if isinstance(each, Lossless) else torch.float32) for each in formats
    ]
    packed = [each.pack(value) for each, value in zip(formats, values, strict=True)]
    plain = torch.randn(3, WORD)
    packed.insert(1, (Plain(torch.float32).packing(TensorSpec("w", (3, WORD), ())), plain.view(-1).view(torch.uint8)))
    parts, size = arrange((f"tensor {i}", packing) for i, (packing, _) in enumerate(packed))
    buffer, decoded = torch.zeros(size, dtype=torch.uint8), torch.zeros(4 * size, dtype=torch.uint8)
    for part, (_, data) in zip(parts, packed, strict=True):
        part.data(buffer).copy_(data)
    opened = LayerWeights({}, buffer, parts).open(buffer, decoded)
    assert len(opened.decodings) == 2
    for decode in opened.decodings:
        decode()
    found = list(opened.tensors.values())
    assert torch.equal(found.pop(1), plain)
    for kind, value, each in zip(formats, values, found, strict=True):
        assert torch.equal(each, kind.place(value))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> startup.Planned:
    """With room for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "calibrate", lambda *_: HARDWARE)
        return startup.make_plan(config_for(tmp_path_factory.mktemp("planned"), placement="auto"))


@given(data=st.data())
@settings(max_examples=15)
def test_what_stays_takes_what_was_planned(planned: startup.Planned, data: st.DataObject) -> None:
    """Whatever stays, ready or packed: bytes of each layer, and operands of all that is decoded, apart from another."""
    family, layers = create_family(planned.spec), planned.spec.sizes.layers
    resident = []
    for layer in layers:
        places = {name: data.draw(st.sampled_from(["ready", "packed", "streams"])) for name in sorted(layer.names)}
        packed = {name for name, place in places.items() if place == "packed"} & layer.coded
        ready = {name for name, place in places.items() if place != "streams"} - packed
        resident.append(Stays(frozenset(ready), frozenset(packed)))
    placed = tuple(layer.placed(stays) for layer, stays in zip(layers, resident, strict=True))
    lines = {DeviceUse.RESIDENT_WEIGHTS: int(sum(each.resident_bytes for each in placed))}
    on_host = {HostUse.STREAMED_WEIGHTS: int(sum(each.host_bytes for each in placed))}
    plan = replace(planned.plan, resident=tuple(resident), placed=placed, device_bytes=lines, host_bytes=on_host)
    device = CpuDevice()
    weights = load_weights(family, RandomWeights(0), plan, device, threading.Event())
    assert dict(device.allocated).items() >= {use: size for use, size in (lines | on_host).items() if size}.items()
    decoded = torch.empty(plan.decode_buffer_bytes, dtype=torch.uint8)
    for number, layer in enumerate(weights.layers):
        assert layer.bus_bytes == placed[number].bus_bytes
        opened = layer.open(decoded if layer.packed is None else layer.packed, decoded)
        for decode in opened.decodings:
            decode()
        wanted = {tensor.name: rounded(tensor) for tensor in family.layer_tensors(number)}
        assert set(opened.tensors) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(opened.tensors[name], value)


def test_the_plan_counts_each_layer(tmp_path: Path) -> None:
    """By hand: bytes on host, bus and device, FLOP, windows, and the time that decoding takes."""
    config = config_for(tmp_path, cache_policy="kv")
    planned = startup.make_plan(config)
    layers, plan = planned.spec.sizes.layers, planned.plan
    matrices = [[(96, 32), (32, 32), (2 * ffn, 32), (32, ffn)] for ffn in (96, 40, 96, 40, 96)]
    for layer, shapes in zip(layers, matrices, strict=True):
        packed = sum(-(-rows * (columns + 4) // 256) * 256 for rows, columns in shapes)
        own = sum(4 * rows * columns for rows, columns in shapes)
        streamed = layer.placed(Stays())
        assert streamed.bus_bytes == streamed.host_bytes == streamed.buffer_bytes == packed + 2 * 256
        assert (streamed.streamed_bytes, streamed.decoded_bytes) == (own + 2 * 256, own)
        assert streamed.decode_traffic == own + packed
        assert layer.flop(3) == 3 * 2 * (own // 4 + 2 * 32)
    assert [layer.sliding_window for layer in layers] == [None, WINDOW, None, None, WINDOW]
    assert [count for _, count in planned.spec.sizes.distinct] == [2, 1, 1, 1]
    assert plan.placed == tuple(layer.placed(Stays()) for layer in layers)
    assert plan.weight_buffer_bytes == max(layer.placed(Stays()).buffer_bytes for layer in layers)
    assert plan.device_bytes[DeviceUse.WEIGHT_BUFFERS] == BUFFERS * plan.weight_buffer_bytes + plan.decode_buffer_bytes
    undecoded = [replace(each, tensors=tuple(replace(t, decode_traffic=0.0) for t in each.tensors)) for each in layers]
    without = Planner(
        replace(planned.spec.sizes, layers=tuple(undecoded)), plan.budgets, HARDWARE, planned.planner.config
    ).plan()
    decoding = sum(layer.placed(Stays()).decode_traffic for layer in layers) / HARDWARE.memory_bandwidth
    assert plan.prediction.forward - without.prediction.forward == pytest.approx(decoding)


def test_a_narrow_window_reads_less(tmp_path: Path) -> None:
    """Attention and loads are counted for what each layer sees."""
    config = config_for(tmp_path, cache_policy="kv")
    sizes = startup.make_plan(config).spec.sizes
    wide = replace(sizes, layers=tuple(replace(layer, sliding_window=None) for layer in sizes.layers))
    narrow = replace(sizes, layers=tuple(replace(layer, sliding_window=WINDOW) for layer in sizes.layers))
    budgets = Budgets(device=2**24, host=2**24)
    plans = [Planner(each, budgets, HARDWARE, config).plan() for each in (wide, sizes, narrow)]
    attention = [plan.prediction.attention for plan in plans]
    context = plans[0].prediction.context
    assert attention[1] == pytest.approx(attention[0] * (3 + 2 * WINDOW / context) / NUM_LAYERS)
    assert attention[2] == pytest.approx(attention[0] * WINDOW / context)
    bus = [plan.prediction.bus for plan in plans]
    assert bus[0] - bus[1] == pytest.approx((bus[0] - bus[2]) * 2 / NUM_LAYERS)
    assert bus[0] > bus[1]
    assert [each.sliding_window for each in (wide, sizes, narrow)] == [None, None, WINDOW]
    assert plans[0].num_blocks[PoolId.HOST_KV] > 0
