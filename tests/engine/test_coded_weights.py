"""Coded weights: fewer bytes on the bus, and the same tokens and log probabilities to the bit."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from hsrpc import Engine, EngineConfig
from hsrpc.device.device import CpuDevice
from hsrpc.engine import startup
from hsrpc.engine.loading import load_weights
from hsrpc.errors import ConfigError, EngineUnavailableError
from hsrpc.model.checkpoint import RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats.lossless import Lossless
from hsrpc.model.formats.plain import Plain
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.request import Delta
from hsrpc.schedule.sweep import BUFFERS
from tests.engine.conftest import HARDWARE
from tests.engine.support import PATIENCE, collect, greedy, idle, parts

_SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}
CONFIGS = {
    "opt": {
        **_SIZES,
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "ffn_dim": 512,
        "max_position_embeddings": 160,
        "word_embed_proj_dim": 128,
    },
    "llama": {
        **_SIZES,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 384,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-5,
    },
    "qwen3-moe": {
        **_SIZES,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": 384,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-6,
    },
}
PROMPTS = [[(7 * i + j) % 290 + 5 for j in range(3 + 9 * i)] for i in range(5)]
SHARES = {"float16": 0.86, "bfloat16": 0.67}


def config_for(directory: Path, model: str, **settings: object) -> EngineConfig:
    """Everything on the host, prompts in chunks."""
    file = directory / f"{model}.json"
    file.write_text(json.dumps(CONFIGS[model]))
    base = {"max_batch": 4, "max_model_len": 128, "max_prefill_tokens": 24, "expected_context": 64, "device": "cpu"}
    base |= {"gpu_memory": "64MiB", "host_memory": "64MiB", "placement": "host", "seed": 1}
    config = EngineConfig(model=f"random:{file}", **(base | settings))
    return replace(config, min_batch=config.max_batch)


async def run(config: EngineConfig) -> tuple[list[list[Delta]], float]:
    """What the requests get, and the weight bytes that crossed the bus in a step."""
    weights = []
    async with Engine(config, observe=lambda step: weights.append(step.weight_bytes)) as engine:
        requests = (collect(engine.generate(prompt, greedy(20, logprobs=3))) for prompt in PROMPTS)
        found = await asyncio.gather(*requests)
        await idle(engine)
        assert (engine.plan.decode_buffer_bytes > 0) == (config.weight_coding == "lossless")
    return found, median(weights)


def told(deltas: list[Delta]) -> list[tuple[object, ...]]:
    """All tokens and log probabilities, however they were cut into deltas."""
    return [
        (token, logprob) for delta in deltas for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True)
    ]


@pytest.mark.parametrize("resident", [0.0, 0.4])
@pytest.mark.parametrize("policy", ["kv", "activation", "recompute"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("model", list(CONFIGS))
async def test_tokens_are_the_same_to_the_bit(
    model: str, dtype: str, policy: str, resident: float, tmp_path: Path
) -> None:
    """With all weights streamed, and with a part of them on the device."""
    placement = {"placement": "auto", "resident_share": resident} if resident else {}
    config = config_for(tmp_path, model, dtype=dtype, cache_policy=policy, **placement)
    plain, plain_bytes = await run(config)
    coded, coded_bytes = await run(replace(config, weight_coding="lossless"))
    assert [told(each) for each in coded] == [told(each) for each in plain]
    assert coded_bytes < SHARES[dtype] * plain_bytes * 1.02  # biases and norms are not coded


@pytest.mark.parametrize("resident", [0.4, 1.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("model", list(CONFIGS))
async def test_tokens_are_the_same_where_coded_weights_stay(
    model: str, dtype: str, resident: float, tmp_path: Path
) -> None:
    """Coded on the device, which takes no more than was planned, and decoded there in every step."""
    settings = {"placement": "auto", "resident_share": resident, "cache_policy": "kv", "dtype": dtype}
    config = config_for(tmp_path, model, **settings)
    plain, _ = await run(config)
    async with Engine(replace(config, weight_coding="lossless", resident_weights="packed")) as engine:
        coded = await asyncio.gather(*(collect(engine.generate(each, greedy(20, logprobs=3))) for each in PROMPTS))
        await idle(engine)
        opened, plan = parts(engine), engine.plan
        allocated = opened.device.allocated[DeviceUse.RESIDENT_WEIGHTS]
    assert [told(each) for each in coded] == [told(each) for each in plain]
    assert plan.kept_bytes
    assert allocated <= plan.device_bytes[DeviceUse.RESIDENT_WEIGHTS]
    assert allocated < SHARES[dtype] * 1.05 * sum(layer.ready_bytes for layer in plan.placed)
    assert plan.decode_buffer_bytes


async def test_what_stays_coded_is_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before more device memory is taken than was planned."""
    monkeypatch.setattr(RandomWeights, "read", noise)
    config = config_for(tmp_path, "opt", dtype="bfloat16", weight_coding="lossless", placement="auto")
    with pytest.raises(ConfigError, match=r"weight_coding='lossless': .* more than .* planned; use weight_coding=none"):
        await Engine(replace(config, resident_weights="packed")).__aenter__()


async def test_the_host_holds_what_is_coded(tmp_path: Path) -> None:
    """The plan counts fewer bytes in host memory and on the bus, and one buffer more on the device."""
    config = config_for(tmp_path, "opt", dtype="bfloat16", cache_policy="kv")
    plans = {}
    for coded, name in enumerate(("none", "lossless")):
        async with Engine(replace(config, weight_coding=name)) as engine:
            packed = [layer.bus_bytes for layer in parts(engine).prefetcher.places]
            plans[coded] = plan = engine.plan
            assert sum(packed) <= plan.host_bytes[HostUse.STREAMED_WEIGHTS]
            assert max(packed) <= plan.weight_buffer_bytes
            buffers = (BUFFERS + coded) * plan.weight_buffer_bytes
            assert plan.device_bytes[DeviceUse.WEIGHT_BUFFERS] == buffers
    streamed = {coded: plan.host_bytes[HostUse.STREAMED_WEIGHTS] for coded, plan in plans.items()}
    assert streamed[True] < 0.77 * streamed[False]
    assert plans[True].prediction.bus < plans[False].prediction.bus


async def test_what_cannot_be_coded_is_refused(tmp_path: Path) -> None:
    """float32, by name."""
    with pytest.raises(ConfigError, match=r"weight_coding='lossless': .*float32.*use dtype=float16 or bfloat16"):
        await Engine(config_for(tmp_path, "opt", weight_coding="lossless")).__aenter__()


def noise(_: RandomWeights, tensor: TensorSpec, out: torch.Tensor) -> None:
    """Weights whose exponents are all equally frequent."""
    out.copy_(torch.randn(tensor.shape) * 2.0 ** torch.randint(-60, 60, tensor.shape))


async def test_weights_that_hardly_get_smaller_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before more host memory is taken than was planned."""
    monkeypatch.setattr(RandomWeights, "read", noise)
    config = config_for(tmp_path, "opt", dtype="bfloat16", weight_coding="lossless")
    with pytest.raises(ConfigError, match=r"weight_coding='lossless': .* more than .* planned; use weight_coding=none"):
        await Engine(config).__aenter__()


@pytest.mark.parametrize(("read", "is_coded"), [(RandomWeights.read, True), (noise, False)])
async def test_auto_codes_what_gets_smaller(
    read: object, is_coded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a device that is fast beside the bus; other weights are loaded as they are, and the log says so."""
    monkeypatch.setattr(RandomWeights, "read", read)
    monkeypatch.setattr(Lossless, "pays_on", lambda _: True)
    async with Engine(config_for(tmp_path, "opt", dtype="bfloat16")) as engine:
        assert not engine.plan.decode_buffer_bytes  # decoding would take longer than it saves
    monkeypatch.setattr(startup, "calibrate", lambda *_: replace(HARDWARE, load_bandwidth=1e8))
    async with Engine(config_for(tmp_path, "opt", dtype="bfloat16")) as engine:
        assert (engine.plan.decode_buffer_bytes > 0) == is_coded
    assert ("loading them as they are" in caplog.text) != is_coded
    async with Engine(config_for(tmp_path, "opt", dtype="float32")) as engine:
        assert not engine.plan.decode_buffer_bytes


def fits(config: EngineConfig) -> bool:
    """Whether there is a plan."""
    try:
        startup.make_plan(config)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(("budget", "fitting"), [("gpu_memory", "none"), ("host_memory", "lossless")])
def test_auto_takes_the_coding_that_fits(
    budget: str, fitting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coded weights need a buffer more on the device, plain ones more of the host; else the faster plan counts."""
    monkeypatch.setattr(Lossless, "pays_on", lambda _: True)
    auto = config_for(tmp_path, "opt", dtype="bfloat16")
    other = {"none": "lossless", "lossless": "none"}[fitting]
    tight = next(
        config
        for size in range(2**20, 2**26, 2**14)
        if fits(config := replace(auto, **{budget: size, "weight_coding": fitting}))
    )
    assert not fits(replace(tight, weight_coding=other))
    assert not fits(replace(auto, **{budget: 2**16}))
    planned = startup.make_plan(replace(tight, weight_coding="auto"))
    assert (planned.plan.decode_buffer_bytes > 0) == (fitting == "lossless")
    weights = [planned.spec.formats.weight(tensor) for tensor in create_family(planned.spec).layer_tensors(0)]
    assert all(isinstance(each, Lossless if fitting == "lossless" else Plain) for each in weights)


def test_nothing_is_coded_where_nothing_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans are equal then."""
    monkeypatch.setattr(Lossless, "pays_on", lambda _: True)
    planned = startup.make_plan(config_for(tmp_path, "opt", dtype="bfloat16", placement="auto"))
    assert planned.plan.resident_share == 1
    assert not planned.plan.decode_buffer_bytes


async def test_once_stopped_no_further_layer_is_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are coded at once; those whose threads wait for that are left."""
    model = {**CONFIGS["opt"], "num_hidden_layers": 8}
    (tmp_path / "deep.json").write_text(json.dumps(model))
    config = replace(config_for(tmp_path, "opt", dtype="bfloat16"), model=f"random:{tmp_path / 'deep.json'}")
    planned = startup.make_plan(replace(config, weight_coding="lossless"))
    stop, layers = threading.Event(), set()

    class Source(RandomWeights):
        def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
            numbers = re.findall(r"layers\.(\d+)\.", tensor.sources[0])
            if numbers:
                layers.add(int(numbers[0]))
                time.sleep(0.05)  # by then the others wait
                stop.set()
            super().read(tensor, out)

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with pytest.raises(EngineUnavailableError, match="stopped"):
        load_weights(create_family(planned.spec), Source(0), planned.plan, CpuDevice(), stop)
    assert 1 <= len(layers) <= 2


def plan_of(directory: Path, model: str) -> startup.Planned:
    """Coded, with all weights streamed."""
    return startup.make_plan(config_for(directory, model, dtype="bfloat16", weight_coding="lossless"))


def test_tensors_of_a_layer_are_coded_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than layers are packed at once: a model of experts has hundreds a layer."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    planned, together = plan_of(tmp_path, "qwen3-moe"), threading.Barrier(4)

    class Source(RandomWeights):
        def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
            if tensor.name in ("expert_1_in", "expert_1_out") and ".2." not in tensor.sources[0]:
                together.wait(PATIENCE)  # two tensors each of two layers
            super().read(tensor, out)

    load_weights(create_family(planned.spec), Source(0), planned.plan, CpuDevice(), threading.Event())
    assert not together.broken


def test_half_of_a_layer_lies_on_the_device_to_be_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is coded already: memory is planned for the weight buffers, which come later."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], "num_hidden_layers": 1})
    planned, device, held = plan_of(tmp_path, "llama"), CpuDevice(), []

    class Source(RandomWeights):
        def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
            if tensor.sources[0].startswith("model.layers"):
                time.sleep(0.02)  # by then others read
                held.append(device.allocated[DeviceUse.WEIGHT_BUFFERS])
            super().read(tensor, out)

    load_weights(create_family(planned.spec), Source(0), planned.plan, device, threading.Event())
    norms = 4 * 128 * 2
    assert 0 < max(held) <= planned.spec.sizes.layers[0].weight_bytes / 2 + norms
