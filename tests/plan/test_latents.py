"""What is planned for models that keep latents: which way single queries attend, where their blocks lie, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsrpc.config import EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.model.spec import named_spec
from hsrpc.plan.device_memory import Staging, device_bytes
from hsrpc.plan.layer_times import LayerTimes
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Budgets, Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.roofline import StepRecord, roofline
from hsrpc.schedule.blocks import PoolId
from tests.plan.plans import GIB, HARDWARE

SIZES = named_spec("deepseek-v2-lite", None).sizes
LAYER = SIZES.layers[0]
SMALL, LARGE = 24 * GIB, 80 * GIB
"""Device memory that weights must stream past, and that all of them fit."""


def plan(device: int, **settings: object) -> Plan:
    base = {"expected_context": 1024, "max_model_len": 8192, "max_batch": 512}
    budgets = Budgets(device=device, host=200 * GIB)
    return Planner(SIZES, budgets, HARDWARE, EngineConfig(**(base | settings))).plan()


def test_widths_are_those_of_heads_and_latents() -> None:
    """16 heads, whose keys are 192 wide and values 128; a latent of 512 and a key of 64."""
    assert (LAYER.key_size, LAYER.value_size, LAYER.attended_size) == (3072, 2048, 2048)
    assert (LAYER.kv.num_bytes, LAYER.activation.num_bytes) == (10240, 1152)
    assert LAYER.rebuilt_bytes == 10240
    assert LAYER.attention_flop(100) == 2 * 16 * (192 + 128) * 100
    assert LAYER.regenerate_flop == 2 * 512 * 16 * (128 + 128)
    assert LAYER.absorbed is not None
    assert LAYER.absorbed.flop(100) - LAYER.absorbed.flop(0) == 2 * 16 * (576 + 512) * 100
    assert LAYER.absorbed.flop(0) == 2 * 512 * 16 * (128 + 128)


def test_latents_are_read_at_the_rate_of_attention() -> None:
    """Many tokens of few queries are bound by the bytes of a latent, and those of K and V take nine times as long."""
    hardware = replace(HARDWARE, gemm_overhead=0.0)
    times = LayerTimes(SIZES, hardware)
    assert times.absorbed(1e6, 1, 1) == pytest.approx(1e6 * 1152 / hardware.attention_bandwidth)
    assert times.attention(1e6, 1, 1) == pytest.approx(times.absorbed(1e6, 1, 1) * 10240 / 1152)
    assert times.absorbed(0, 8, 4096) == pytest.approx(8 * LAYER.absorbed.flop(4096) / hardware.gemm_rate)


@pytest.mark.parametrize("device", [SMALL, LARGE])
def test_latents_are_attended_to_where_that_is_faster(device: int) -> None:
    """All blocks are activations, on the device too, and the plan says why; asked for, the same plan says so."""
    chosen, asked = plan(device), plan(device, latent_attention="absorb")
    assert chosen.absorbs
    assert chosen.num_blocks[PoolId.DEVICE_KV] == chosen.num_blocks[PoolId.HOST_KV] == 0
    assert chosen.in_place is PoolId.DEVICE_ACTIVATION
    assert chosen.prediction.regenerate == chosen.prediction.gather == 0
    assert "activations only, to which single queries are predicted to attend faster" in chosen.reason
    assert "attended to as they are stored, as asked" in asked.reason
    assert replace(chosen, reason=asked.reason) == asked


def test_more_requests_fit_the_device_as_latents() -> None:
    """Where nothing streams, K and V would fill the device with a third of the requests."""
    latents, others = plan(LARGE), plan(LARGE, latent_attention="rebuild")
    assert not others.absorbs
    assert latents.max_batch > 2 * others.max_batch
    assert latents.prediction.mean_tokens_per_second > 2 * others.prediction.mean_tokens_per_second
    assert latents.prediction.launch == 0  # a graph runs it
    assert latents.device_bytes[DeviceUse.GRAPHS] > 0


@pytest.mark.parametrize("policy", ["kv", "recompute"])
def test_policies_without_activations_attend_to_keys_and_values(policy: str) -> None:
    """Where the choice is the planner's; and where latents are asked for, the remedy is named."""
    assert not plan(SMALL, cache_policy=policy).absorbs
    with pytest.raises(ConfigError, match="latent_attention='absorb': needs activations alone; use cache_policy=act"):
        plan(SMALL, cache_policy=policy, latent_attention="absorb")


def test_models_without_latents_cannot_attend_to_them() -> None:
    """Asked for, that is an error with a remedy."""
    sizes, budgets = named_spec("opt-1.3b", None).sizes, Budgets(device=SMALL, host=SMALL)
    with pytest.raises(ConfigError, match="latent_attention='absorb': the model keeps no latents; use auto"):
        Planner(sizes, budgets, HARDWARE, EngineConfig(latent_attention="absorb"))
    with pytest.raises(ConfigError, match="latent_attention='both': unknown; use one of auto, rebuild, absorb"):
        EngineConfig(latent_attention="both")


def test_predictions_and_limits_are_those_of_the_plan() -> None:
    """A step of the planned batch and context is predicted as planned; its limit is one of reading latents."""
    chosen = plan(LARGE)
    again = predict_at(chosen, SIZES, 1024)
    assert again.attention == pytest.approx(chosen.prediction.attention)
    record = StepRecord(
        seconds=1.0,
        num_requests=8,
        decode_tokens=8,
        prefill_tokens=0,
        context_tokens=8192,
        weight_bytes=0,
        cache_bytes=0,
        regenerated_tokens=0,
    )
    limits = [roofline(record, SIZES, HARDWARE, absorbs=absorbs).attention for absorbs in (True, False)]
    assert limits[0] == pytest.approx(limits[1] * 1152 / 10240)


def test_memory_of_what_attends_to_latents_is_planned() -> None:
    """Queries for them and what they gather; values are padded to the width of keys for prompts in any case."""
    staging = Staging(batch=8, rows=100, activation_rows=0, queries=20, step_tokens=30, graph_batch=8, table=1)
    plain, absorbing = (device_bytes(SIZES, replace(staging, absorbing=count)) for count in (0, 8))
    for use in (DeviceUse.WORKSPACE, DeviceUse.GRAPHS):
        assert absorbing[use] - plain[use] >= 8 * 16 * (576 + 512) * 2
    assert plain[DeviceUse.WORKSPACE] >= 100 * 3072 * 2
    assert LAYER.padded_bytes == 3072 * 2
    assert named_spec("opt-1.3b", None).sizes.layers[0].padded_bytes == 0
