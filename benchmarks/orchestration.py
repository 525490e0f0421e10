"""What the host adds to a decode step of a model that lies on the device with all its cache.

    python -m benchmarks.orchestration --shape opt-1.3b --batch 64 --json orchestration.json

Measures the engine's last decode steps of a full batch. Then, with the engine idle, it launches a step with as many
cached tokens again and again, graph and sampling with nothing else between: what a step takes beyond that is
orchestration.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from hsrpc import Engine, EngineConfig, SamplingParams
from hsrpc.bench.run import BenchError, load_requests
from hsrpc.bench.workload import Lengths, make_workload
from hsrpc.config import CachePolicy, DeviceKind
from hsrpc.engine.gpus.one import OneGpu
from hsrpc.engine.graphs import DecodeGraphs
from hsrpc.plan.roofline import StepRecord
from hsrpc.schedule.blocks import BlockManager
from hsrpc.schedule.packing import pack
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import Chunk, MiniBatch, SamplingRow, StopFlag

LAST_STEPS = 20
REPLAYS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Seconds of a step, and of its work alone."""

    model: str
    device: str
    batch: int
    context: int
    step_seconds: float
    """Median of `step_times`."""
    alone_seconds: float
    orchestration: float
    """Part of the step beyond its work."""
    step_times: list[float]


async def measure(options: argparse.Namespace) -> Found:
    """One engine's last steps, then their work alone."""
    records: list[StepRecord] = []
    config = EngineConfig(
        model=f"random:{options.shape}",
        device=DeviceKind(options.device),
        cache_policy=CachePolicy.KV,
        min_batch=options.batch,
        max_batch=options.batch,
        max_model_len=options.prompt + options.output,
        expected_context=options.prompt + options.output,
        gpu_memory=options.gpu_memory,
    )
    async with Engine(config, observe=records.append) as engine:
        graphs = decode_graphs(engine)
        lengths = {"prompt": options.prompt, "output": options.output, "vocab_size": engine.spec.vocab_size}
        await load_requests(engine, make_workload(Lengths.UNIFORM, count=options.batch, **lengths))
        full = [each for each in records if each.decode_tokens == options.batch and not each.prefill_tokens]
        context = round(median(each.context_tokens for each in full[-LAST_STEPS:]) / options.batch)
        alone = time_alone(engine, graphs, options.batch, context)
        name, device = engine.spec.name, engine.device
    times = [each.seconds for each in full[-LAST_STEPS:]]
    step = median(times)
    return Found(
        model=name,
        device=device,
        batch=options.batch,
        context=context,
        step_seconds=step,
        alone_seconds=alone,
        orchestration=1 - alone / step,
        step_times=times,
    )


@torch.inference_mode()
def time_alone(engine: Engine, graphs: DecodeGraphs, batch: int, context: int) -> float:
    """Seconds of a decode step's graph and sampling."""
    gpu = one_gpu(engine)
    device, sampler = gpu.device, gpu.executor._sampler
    step = graphs.run(_decode_step(engine, batch, context), None, StopFlag())  # fills the input that the graph reads
    assert step is not None  # nobody stops it
    assert step.logits is not None  # of all its rows: it has no drafts
    rows = [SamplingRow(SamplingParams(temperature=0.0), num_prompt_tokens=0, num_output_tokens=0, seed=0)] * batch
    [graph] = graphs._graphs[batch]
    with device.on(device.compute):
        for repeat in range(REPLAYS + 1):
            if repeat == 1:
                device.drain()
                start = time.perf_counter()
            graph()
            sampler.launch(step.logits, rows)
        device.drain()
    return (time.perf_counter() - start) / REPLAYS


def _decode_step(engine: Engine, batch: int, context: int) -> MiniBatch:
    """Mini-batch that decodes for requests with `context` cached tokens each, in blocks of the idle engine."""
    plan, params = engine.plan, SamplingParams()
    blocks, chunks = BlockManager(plan.num_blocks, plan.max_batch, plan.kind_rule), []
    for number in range(batch):
        request = Request(str(number), [0] * (context + 1), params, number, 0.0)
        assert blocks.grow(request.blocks, -(-(context + 1) // plan.block_size))
        chunks.append(Chunk(request, context, 1, samples=True))
    return pack(chunks, plan.block_size, engine.spec.sizes.windows.distinct)


def one_gpu(engine: Engine) -> OneGpu:
    """What a running engine computes with."""
    gpu = engine._opened.gpus
    assert isinstance(gpu, OneGpu)  # benchmarks ask for no more
    return gpu


def decode_graphs(engine: Engine) -> DecodeGraphs:
    """The graphs of a running engine's decode steps.

    Raises:
        BenchError: no graph runs a whole step of the model.
    """
    graphs = one_gpu(engine).executor._graphs
    if graphs is None or graphs.waits:
        raise BenchError(f"{engine.spec.name} does not fit the device with its cache; raise --gpu-memory")
    return graphs


def main(arguments: list[str] | None = None) -> None:
    from hsrpc.cli.loop import run_loop  # here: what measures with `time_alone` needs nothing of the command line

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-1.3b", help="a name, or a config.json")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--json", type=Path, help="save the times here")
    options = parser.parse_args(arguments)
    try:
        found = run_loop(measure(options))
    except BenchError as error:
        raise SystemExit(f"--shape {options.shape}: {error}") from None
    step, alone = found.step_seconds * 1e3, found.alone_seconds * 1e3
    print(f"{found.model}, {found.batch} requests: {step:.3f} ms a step, {alone:.3f} ms its graph and sampling alone")
    print(f"orchestration {found.orchestration:.1%} of the step")
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
