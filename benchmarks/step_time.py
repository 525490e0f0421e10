"""Decode step time with weights and cache on the host, beside the limit of the bus, and where the time goes.

python benchmarks/step_time.py --shape opt-6.7b --batch 64 --prompt 512 --json step.json
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
from torch.profiler import ProfilerActivity, profile

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.config import format_bytes

PARTS = ("hsrpc.project", "hsrpc.regenerate", "hsrpc.attend", "hsrpc.finish")
WARM_UP = 3


async def measure(options: argparse.Namespace, policy: str) -> dict[str, object]:
    """One policy: median step time after warm-up, the limit, and the device time of each part of one step."""
    config = EngineConfig(
        model=f"random:{options.shape}",
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        cache_policy=policy,
        placement="host",
        max_batch=options.batch,
        max_model_len=options.prompt + options.steps + 128,
        expected_context=options.prompt + options.steps // 2,
    )
    started = time.perf_counter()
    async with Engine(config, progress=True) as engine:
        ready = time.perf_counter() - started
        params = SamplingParams(temperature=0.0, max_tokens=2 * options.prompt, ignore_eos=True)
        generator = torch.Generator().manual_seed(5)
        size = (options.batch, options.prompt)
        prompts = torch.randint(4, engine.spec.vocab_size, size, generator=generator).tolist()
        generations = [await engine.submit(prompt, params) for prompt in prompts]
        last = generations[-1]
        await anext(last)
        prefill = time.perf_counter() - started - ready
        times = [await step_time(engine, last) for _ in range(WARM_UP + options.steps)][WARM_UP:]
        parts = await profile_step(engine, last)
        for generation in generations:
            generation.close()
        return report(engine, median(times), times, parts, {"ready_s": ready, "prefill_s": prefill})


async def step_time(engine: Engine, last: object) -> float:
    before = engine.stats()
    await anext(last)
    after = engine.stats()
    return (after.step_seconds - before.step_seconds) / max(1, after.steps - before.steps)


async def profile_step(engine: Engine, last: object) -> dict[str, float]:
    """Milliseconds of device time of each part over one step, from the profiler."""
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], experimental_config=everywhere) as profiler:
        before = engine.stats().steps
        while engine.stats().steps < before + 2:
            await anext(last)
        steps = engine.stats().steps - before
    averages = {item.key: item for item in profiler.key_averages()}
    parts = {name: averages[name].device_time_total / 1e3 / steps for name in PARTS if name in averages}
    parts |= {f"{name} (host)": averages[name].cpu_time_total / 1e3 / steps for name in PARTS if name in averages}
    loads = [item for key, item in averages.items() if "Memcpy HtoD" in key]
    return parts | {"bus": sum(item.device_time_total for item in loads) / 1e3 / steps}


def report(
    engine: Engine, step: float, times: list[float], parts: dict[str, float], more: dict[str, float]
) -> dict[str, object]:
    plan, stats = engine.plan, engine.stats()
    limit = plan.prediction.bus
    result = {
        "device": engine.device,
        "model": engine.spec.name,
        "policy": plan.policy,
        "activation_share": plan.activation_share,
        "batch": plan.max_batch,
        "context": plan.prediction.context,
        "step_s": step,
        "step_min_s": min(times),
        "step_max_s": max(times),
        "tokens_per_s": plan.max_batch / step,
        "limit_s": max(limit, plan.prediction.forward + plan.prediction.regenerate + plan.prediction.attention),
        "limit_bus_s": limit,
        "load_gb_per_s": plan.hardware.load_bandwidth / 1e9,
        "gemm_tflop_per_s": plan.hardware.gemm_rate / 1e12,
        "parts_ms": parts,
        "peak_device_bytes": stats.peak_device_bytes,
        "device_budget_bytes": plan.budgets.device,
        "host_bytes": sum(plan.host_bytes.values()),
        "buffers": str(plan.buffers),
    } | more
    result["efficiency"] = result["limit_s"] / step
    print(json.dumps(result, indent=1))
    print(
        f"{plan.policy}: {step:.3f} s a step, limit {result['limit_s']:.3f} s, efficiency {result['efficiency']:.3f}, "
        f"peak {format_bytes(stats.peak_device_bytes)}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-6.7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=10, help="decode steps measured")
    parser.add_argument("--policy", action="append", help="kv, activation or auto; may be given several times")
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--host-memory", default="90GiB")
    parser.add_argument("--json", type=Path, help="write all results here")
    options = parser.parse_args()
    policies = options.policy or ["kv", "activation", "auto"]
    results = [asyncio.run(measure(options, policy)) for policy in policies]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
