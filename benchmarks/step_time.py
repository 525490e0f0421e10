"""Decode step time with weights and cache on the host, beside the limit of the bus, and where the time goes.

    python benchmarks/step_time.py --shape opt-6.7b --batch 64 --prompt 512 --json step.json

The limit is max(bytes moved / bandwidth, device time of all parts), with the bytes that the engine counted and the best
bandwidth measured on this machine before and after (the bus of a shared machine varies).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import DeviceKind
from hsrpc.core.plan import Hardware
from hsrpc.device.calibration import calibrate
from hsrpc.device.device import open_device
from hsrpc.engine.generation import Generation
from hsrpc.model.spec import named_spec

PARTS = ("project", "regenerate", "attend", "finish")
WARM_UP = 3


async def measure(options: argparse.Namespace, policy: str) -> dict[str, object]:
    """One policy: median step time after warm-up, the limit, and the time of each part of a step."""
    config = EngineConfig(
        model=f"random:{options.shape}",
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        cache_policy=policy,
        placement=options.placement,
        max_batch=options.batch,
        max_model_len=options.prompt + options.steps + 128,
        expected_context=options.prompt + options.steps // 2 + 20,
    )
    started = time.perf_counter()
    async with Engine(config) as engine:
        ready = time.perf_counter() - started
        generations = await submit_all(engine, options)
        last = generations[-1]
        await anext(last)
        prefill = time.perf_counter() - started - ready
        steps = [await one_step(engine, last) for _ in range(WARM_UP + options.steps)][WARM_UP:]
        parts = await profile_step(engine, last)
        plan, peak = engine.plan, engine.stats().peak_device_bytes
        for generation in generations:
            generation.close()
    seconds = [step[0] for step in steps]
    return {
        "model": options.shape,
        "policy": plan.policy,
        "activation_share": plan.activation_share,
        "resident_share": plan.resident_share,
        "batch": plan.max_batch,
        "step_s": median(seconds),
        "step_min_max_s": [min(seconds), max(seconds)],
        "bytes_moved": median(step[1] for step in steps),
        "predicted_step_s": plan.prediction.step,
        "parts_ms": parts,
        "calibrated": {
            "load_gb_per_s": plan.hardware.load_bandwidth / 1e9,
            "gemm_tflop_per_s": plan.hardware.gemm_rate / 1e12,
        },
        "peak_device_bytes": peak,
        "device_budget_bytes": plan.budgets.device,
        "pinned_bytes": sum(plan.host_bytes.values()),
        "buffers": str(plan.buffers),
        "ready_s": ready,
        "prefill_s": prefill,
    }


async def submit_all(engine: Engine, options: argparse.Namespace) -> list[Generation]:
    """Requests of random tokens that outlast the measurement."""
    params = SamplingParams(temperature=0.0, max_tokens=options.steps + 127, ignore_eos=True)
    size = (options.batch, options.prompt)
    prompts = torch.randint(4, engine.spec.vocab_size, size, generator=torch.Generator().manual_seed(5)).tolist()
    return [await engine.submit(prompt, params) for prompt in prompts]


async def one_step(engine: Engine, last: Generation) -> tuple[float, float]:
    """Seconds and bytes loaded, a step."""
    before = engine.stats()
    await anext(last)
    after = engine.stats()
    steps = max(1, after.steps - before.steps)
    moved = [s.weights_streamed_bytes + s.cache_loaded_bytes for s in (before, after)]
    return (after.step_seconds - before.step_seconds) / steps, (moved[1] - moved[0]) / steps


async def profile_step(engine: Engine, last: Generation) -> dict[str, float]:
    """Milliseconds a step on the device for each part and for copies from the host, and on the launching thread."""
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], experimental_config=everywhere) as profiler:
        before = engine.stats().steps
        while engine.stats().steps < before + 2:
            await anext(last)
        steps = engine.stats().steps - before
    found = {"copies": 0.0, "launching": 0.0} | dict.fromkeys(PARTS, 0.0)
    for item in profiler.key_averages():
        name = item.key.removeprefix("hsrpc.")
        if "Memcpy HtoD" in item.key:
            found["copies"] += item.device_time_total
        elif name in PARTS and item.device_type == DeviceType.CPU:
            found["launching"] += item.cpu_time_total
            found[name] += item.device_time_total
    return {name: value / 1e3 / steps for name, value in found.items()}


def with_limit(result: dict, bandwidth: float) -> dict:
    """The result with the limit of DESIGN section 1, in seconds, and the efficiency."""
    bus = result["bytes_moved"] / bandwidth
    device = sum(result["parts_ms"][name] for name in PARTS) / 1e3
    limit = max(bus, device)
    more = {"bandwidth_gb_per_s": bandwidth / 1e9, "bus_s": bus, "device_s": device, "limit_s": limit}
    return result | more | {"efficiency": limit / result["step_s"], "tokens_per_s": result["batch"] / result["step_s"]}


def rates(shape: str) -> Hardware:
    sizes = named_spec(shape, torch.float16).sizes
    return calibrate(open_device(DeviceKind.AUTO), sizes, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-6.7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=15, help="decode steps measured")
    parser.add_argument("--policy", action="append", help="kv, activation or auto; may be given several times")
    parser.add_argument("--placement", default="host", choices=("host", "auto"))
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--host-memory", default="90GiB")
    parser.add_argument("--json", type=Path, help="write all results here")
    options = parser.parse_args()
    bandwidths = [rates(options.shape).load_bandwidth]
    results = []
    for policy in options.policy or ["kv", "activation", "auto"]:
        results.append(asyncio.run(measure(options, policy)))
        bandwidths.append(rates(options.shape).load_bandwidth)
    results = [with_limit(result, max(bandwidths)) for result in results]
    for result in results:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in result["parts_ms"].items())
        print(
            f"{result['model']} {result['policy']}: "
            f"step {result['step_s'] * 1e3:.0f} ms, limit {result['limit_s'] * 1e3:.0f} ms, "
            f"efficiency {result['efficiency']:.3f}, {result['tokens_per_s']:.0f} tokens/s; ms a step: {parts}"
        )
    if options.json:
        options.json.write_text(
            json.dumps(
                {"bandwidths": bandwidths, "device": open_device(DeviceKind.AUTO).name, "results": results}, indent=1
            )
        )


if __name__ == "__main__":
    main()
