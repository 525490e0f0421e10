"""hsrpc bench on the CPU: what is measured, what is profiled after it, and what the profiler's events come to."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from torch.autograd import DeviceType

from hsrpc.bench.profile import PROFILED_STEPS, StepProfile, StepProfiler, device_times, range_times
from hsrpc.bench.report import print_results
from hsrpc.bench.run import WARM_UP_STEPS, observe_run, summarise
from hsrpc.bench.workload import Lengths, Workload, make_workload
from hsrpc.config import EngineConfig
from hsrpc.engine.engine import Engine
from hsrpc.plan.roofline import StepRecord
from hsrpc.schedule.sweep import OpKind

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
}
RECORD = StepRecord(
    seconds=0.25,
    num_requests=4,
    decode_tokens=4,
    prefill_tokens=0,
    context_tokens=64,
    weight_bytes=0,
    cache_bytes=0,
    regenerated_tokens=0,
)
RANGES = {kind.value for kind in (OpKind.PROJECT, OpKind.REBUILD, OpKind.ATTEND, OpKind.FINISH)}


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    """A model of two layers from a configuration file, everything on the host."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPE))
    memory = {"gpu_memory": "64MiB", "host_memory": "64MiB", "placement": "host"}
    return EngineConfig(
        model=f"random:{file}", device="cpu", cache_policy="activation", max_batch=4, max_model_len=64, **memory
    )


def full_decode(record: StepRecord) -> bool:
    return record.prefill_tokens == 0 and record.num_requests == 4


workload = partial(make_workload, Lengths.UNIFORM, count=4, prompt=8)


def nine_tokens(engine: Engine) -> Workload:
    return workload(output=9, vocab_size=engine.spec.vocab_size)


async def test_steps_after_the_measured_ones_are_profiled(config):
    """The requests go on for them; none of them counts as measured, and the executor's ranges are all there."""
    wanted = WARM_UP_STEPS + 5
    seen: list[StepRecord] = []

    def is_enough(record: StepRecord) -> bool:
        seen.append(record)
        return sum(map(full_decode, seen)) == wanted

    run = await observe_run(
        config,
        lambda engine: workload(output=50, vocab_size=engine.spec.vocab_size),
        lambda records: list(filter(full_decode, records)),
        is_enough=is_enough,
        with_ranges=True,
    )
    assert len(run.chosen) == 5
    assert list(run.records) == seen
    assert run.profile is not None
    assert set(run.profile.parts) >= RANGES
    assert all(0 < seconds < run.profile.step for name, seconds in run.profile.parts.items() if name in RANGES)
    result = summarise(run, config)
    assert result.device_busy_share is None  # there is no GPU
    assert result.sustained_bandwidth > 0
    assert result.sustained_efficiency > 0


async def test_hits_of_experts_are_those_of_the_measured_steps(config, tmp_path, capsys):
    """Each is told beside what the plan expects; where none come on demand, that is said."""
    mixture = {"architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8}
    mixture |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "model_type": "qwen3_moe"}
    (tmp_path / "mixture.json").write_text(json.dumps(SHAPE | mixture))
    on_demand = replace(
        config, model=f"random:{tmp_path / 'mixture.json'}", experts="demand", placement="auto", resident_share=0.6
    )
    run = await observe_run(on_demand, nine_tokens, list)
    result = summarise(run, on_demand)
    assert run.plan.demand is not None
    assert result.expert_hits == sum(step.expert_hits for step in run.chosen) > 0
    assert result.expert_loads == sum(step.expert_loads for step in run.chosen) > 0
    assert result.expert_loaded_bytes == result.expert_loads * run.plan.demand.expert_bytes
    assert result.expert_loaded_bytes <= sum(step.weight_bytes for step in run.chosen)
    assert result.expert_hit_rate == result.expert_hits / (result.expert_hits + result.expert_loads)
    assert result.expected_hit_rate == run.plan.demand.hit_rate
    print_results([result])
    told = capsys.readouterr().out
    assert f"{result.expert_hit_rate:.0%} (the plan assumes {result.expected_hit_rate:.0%})" in told
    assert "at the hits measured" in told
    lead = result.predicted_step_seconds - result.predicted_at_hits_seconds
    assert (lead > 0) == (result.expert_hit_rate > result.expected_hit_rate)
    without = summarise(await observe_run(config, nine_tokens, list), config)
    assert (without.expert_hit_rate, without.expert_loaded_bytes) == (None, 0)
    assert without.predicted_at_hits_seconds is None
    print_results([without])
    assert "none come so" in capsys.readouterr().out


async def test_requests_that_ended_run_once_more_for_the_profile(config):
    """Where no step is left after the measured ones; the measured figures are those of the first time."""
    run = await observe_run(config, nine_tokens, list, with_ranges=True)
    assert run.profile is not None
    assert run.stats.generated_tokens == 4 * 9
    assert len(run.chosen) == len(run.records) - WARM_UP_STEPS == run.stats.steps - WARM_UP_STEPS


async def test_the_profiled_steps_can_be_looked_at(config, tmp_path):
    """The trace has the executor's ranges, of just those steps."""
    file = tmp_path / "trace.json.gz"
    await observe_run(config, nine_tokens, list, with_ranges=True, trace=file)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name.removeprefix("hsrpc.") for name in names} >= RANGES
    assert names.count("hsrpc.finish") == 2 * PROFILED_STEPS  # layers


async def test_without_a_gpu_nothing_is_profiled_unless_wanted(config):
    """It takes time that nobody asked for."""
    run = await observe_run(config, nine_tokens, list, with_busy=True)
    assert run.profile is None


async def test_a_gpus_time_is_measured_only_where_it_is_wanted(config, monkeypatch):
    """Requests that have ended are not run once more for nobody."""
    monkeypatch.setattr("hsrpc.bench.run.has_gpu", lambda _: True)
    run = await observe_run(config, nine_tokens, list)
    assert run.profile is None


def test_too_few_steps_leave_no_profile():
    """One step is passed over, and two are needed; the profiler is stopped all the same."""
    profiler = StepProfiler(full_decode, on_cuda=False, ranges=True)
    for record in (replace(RECORD, prefill_tokens=3), RECORD, RECORD, RECORD):
        profiler(record)
    assert not profiler.is_done
    assert profiler.result() is None
    again = StepProfiler(full_decode, on_cuda=False, ranges=True)
    for _ in range(5):
        again(RECORD)
    assert again.is_done
    assert again.result() == StepProfile(step=0.25, busy=None, copies=None, copy_rate=None, parts={}, launching=None)


@dataclass
class Kernel:
    """As the profiler's raw events answer."""

    text: str
    stream: int = 7
    nanoseconds: int = 1000
    device: DeviceType = DeviceType.CUDA
    annotation: bool = False
    start: int = 0

    def name(self) -> str:
        return self.text

    def device_type(self) -> DeviceType:
        return self.device

    def device_resource_id(self) -> int:
        return self.stream

    def duration_ns(self) -> int:
        return self.nanoseconds

    def start_ns(self) -> int:
        return self.start

    def is_user_annotation(self) -> bool:
        return self.annotation


def test_busy_time_is_of_the_stream_with_the_most_kernels():
    """Kernels of other streams, copies, annotations and the host's calls are no busy time; copies are counted apart."""
    events = [
        Kernel("gemm", nanoseconds=4_000_000),
        Kernel("attention", nanoseconds=2_000_000, start=6_000_000),
        Kernel("copy_rows", stream=9, nanoseconds=5_000_000),
        Kernel("Memcpy HtoD (Pinned -> Device)", stream=8, nanoseconds=7_000_000),
        Kernel("Memcpy HtoD (Pinned -> Device)", stream=10, nanoseconds=1_000_000),
        Kernel("Memcpy DtoH (Device -> Pinned)", nanoseconds=9_000_000),
        Kernel("Memset (Device)", nanoseconds=9_000_000),
        Kernel("hsrpc.attend", nanoseconds=9_000_000),
        Kernel("ProfilerStep#2", nanoseconds=90_000_000, annotation=True),
        Kernel("cudaLaunchKernel", nanoseconds=90_000_000, device=DeviceType.CPU),
    ]
    assert device_times(events) == (pytest.approx(0.75), pytest.approx(0.004))  # 4 + 2 of 8 ms
    assert device_times([]) == (0, 0)


def test_ranges_add_up_over_steps():
    """Kernels' time by range a step, in order, and the host's in all; a kernel belongs to its stream's range."""
    events = [
        Kernel("hsrpc.attend", device=DeviceType.CPU, start=200, nanoseconds=100_000),
        Kernel("hsrpc.project", device=DeviceType.CPU, start=100, nanoseconds=200_000),
        Kernel("hsrpc.attend", device=DeviceType.CPU, start=300, nanoseconds=300_000),
        Kernel("aten::mm", device=DeviceType.CPU, start=0, nanoseconds=900_000),
        Kernel("hsrpc.attend", start=30_000_000, nanoseconds=20_000_000),
        Kernel("hsrpc.project", start=1_000_000, nanoseconds=9_000_000),
        Kernel("hsrpc.attend", start=10_000_000, nanoseconds=20_000_000),
        Kernel("gemm", start=2_000_000, nanoseconds=3_000_000),
        Kernel("triton", start=10_000_000, nanoseconds=4_000_000),
        Kernel("triton", start=49_000_000, nanoseconds=1_000_000),
        Kernel("between", start=60_000_000, nanoseconds=7_000_000),
        Kernel("copy_rows", start=11_000_000, nanoseconds=7_000_000, stream=9),
        Kernel("ProfilerStep#2", nanoseconds=90_000_000, annotation=True),
    ]
    parts, launching = range_times(events, on_cuda=True)
    assert list(parts.items()) == [("project", pytest.approx(0.0015)), ("attend", pytest.approx(0.0025))]
    assert launching == pytest.approx(300e-6)
    assert range_times(events[:4], on_cuda=False) == (pytest.approx({"project": 100e-6, "attend": 200e-6}), launching)


async def test_the_table_has_the_profile(config, capsys):
    """Each range has a line; what was not measured says so."""
    run = await observe_run(config, nine_tokens, list, with_ranges=True)
    result = summarise(run, config)
    print_results([result, replace(result, profile=None, device_busy_share=0.25)])
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.count("│") == 4}
    assert set(lines) >= RANGES
    assert "not measured" in lines["GPU busy"]
    assert "25%" in lines["GPU busy"]


def test_drawn_lengths_fit_the_model():
    """No request is longer than the model's context; most keep their length."""
    options = {"count": 200, "prompt": 100, "output": 20, "vocab_size": 99}
    free = make_workload(Lengths.SHAREGPT_LIKE, **options)
    cut = make_workload(Lengths.SHAREGPT_LIKE, **options, longest=256)
    assert free.longest > 256
    assert cut.longest == 256
    same = sum(len(a) == len(b) for a, b in zip(free.prompts, cut.prompts, strict=True))
    assert 100 < same < 200


def test_prompts_begin_with_what_they_share():
    """So many tokens and no more, of whatever length they are; those like them share nothing else with them."""
    made = make_workload(Lengths.SHAREGPT_LIKE, count=20, prompt=50, output=20, vocab_size=5000, shared=30)
    longest = max(made.prompts, key=len)
    for workload in (made, made.like_it()):
        assert all(prompt[:30] == longest[:30][: len(prompt)] for prompt in workload.prompts)
        assert len({tuple(prompt[30:33]) for prompt in workload.prompts if len(prompt) > 33}) > 5
    pairs = list(zip(made.prompts, made.like_it().prompts, strict=True))
    assert all(len(one) == len(other) for one, other in pairs)
    assert all(one[30:] != other[30:] for one, other in pairs if len(one) > 40)
    assert made.like_it().output_tokens == made.output_tokens
