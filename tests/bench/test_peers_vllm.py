"""vLLM beside hsrpc, without vLLM: the arithmetic of its memory, its settings, the timing of its steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.peers.__main__ import main
from benchmarks.peers.cases import GIB, LLAMA, SHARED_PREFIX, Budgets, Case, Setup, System, random_prompts, sizes_of
from benchmarks.peers.cells import engines, estimated_seconds
from benchmarks.peers.one import peer_outcome, run_one
from benchmarks.peers.record import PeerRun, Record, Traffic, record_from
from benchmarks.peers.run_hsrpc import engine_config
from benchmarks.peers.run_vllm import engine_arguments, require_offloader, timed
from benchmarks.peers.vllm_plan import cache_bytes, num_offloaded, room, streamed_bytes, vllm_setups
from hsrpc.plan.hardware import Hardware


def vllm(**more) -> Setup:
    settings = {"case": Case.BUDGET, "model": LLAMA, "system": System.VLLM, "budgets": Budgets(), "batch": 16}
    return Setup(**(settings | {"output": 64, "offload": (4, 3, 2)} | more))


class Engine:
    """Stands for vLLM's: each step has its duration and the requests that get a number of tokens."""

    def __init__(self, steps: Sequence[tuple[float, dict[str, int]]]) -> None:
        self.steps, self.now = list(steps), 0.0

    def clock(self) -> float:
        return self.now

    def has_unfinished_requests(self) -> bool:
        return bool(self.steps)

    def step(self) -> list[SimpleNamespace]:
        seconds, made = self.steps.pop(0)
        self.now += seconds
        return [
            SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=list(range(count)))])
            for name, count in made.items()
        ]


def test_layers_go_to_the_host_by_groups():
    """The last ones of each group, as many bytes a step as they have."""
    layer = sizes_of(LLAMA).layers[0].weight_bytes
    for offload, count in (((1, 1, 2), 40), ((4, 3, 2), 30), ((2, 1, 1), 20), ((8, 3, 1), 15)):
        assert num_offloaded(vllm(offload=offload)) == count
        assert streamed_bytes(vllm(offload=offload)) == count * layer


def test_the_cache_has_what_weights_leave():
    """More layers on the host, more requests; what all share is there once."""
    rooms = [room(vllm(offload=offload)) for offload in ((1, 1, 2), (4, 3, 2), (2, 1, 1))]
    assert rooms == [45, 32, 20]
    assert room(vllm(shared=SHARED_PREFIX)) > 3 * room(vllm())
    kept = 10 * sizes_of(LLAMA).layers[0].weight_bytes + sizes_of(LLAMA).fixed_bytes
    assert cache_bytes(vllm()) < 24 * GIB - kept
    assert cache_bytes(vllm()) - cache_bytes(vllm(workspace=3 * GIB)) == GIB
    with pytest.raises(ValueError, match="--offload 20/1/1 leaves no room"):
        cache_bytes(vllm(offload=(20, 1, 1)))


def test_one_engine_runs_both_cases(capsys):
    """Without and with a prefix, and all multiples of what fits; starting it counts once."""
    setups = vllm_setups(vllm(), [(1, 1, 2), (4, 3, 2)], [0.5, 1.0])
    shared = vllm_setups(vllm(case=Case.SHARED, shared=SHARED_PREFIX), [(1, 1, 2)], [1.0])
    groups = engines([*setups, *shared])
    assert [[each.batch for each in group] for group in groups] == [[22, 45, 148], [16, 32]]
    assert estimated_seconds(*groups[0]) < sum(map(estimated_seconds, groups[0])) - 100
    with pytest.raises(SystemExit):
        main(["estimate", "--offload", "4/0/2"])
    assert "'4/0/2' is not like 4/3/2" in capsys.readouterr().err


def test_its_settings_fit_the_setups():
    """Room for the largest batch and the longest request; drafts only where they are asked for."""
    found = engine_arguments([vllm(batch=8), vllm(batch=24)], Path("folder"))
    assert found["max_num_seqs"] == 24
    assert found["max_model_len"] >= 512 + 64
    assert (found["offload_group_size"], found["offload_num_in_group"], found["offload_prefetch_step"]) == (4, 3, 2)
    assert found["speculative_config"] is None
    assert engine_arguments([vllm(drafts=3)], Path("folder"))["speculative_config"]["num_speculative_tokens"] == 3


def test_an_offloader_that_is_off_is_no_measurement():
    """vLLM says nothing where another runner ignores it."""
    require_offloader(["[PrefetchOffloader] Initialized 30 modules. Total GPU memory saved: 19 GB"])
    with pytest.raises(ValueError, match="not offloaded"):
        require_offloader(["something else"])


def test_steps_with_prompts_are_told_from_others():
    """A step that gives a first token has a prompt, one that gives none is on its way; drafts give more than one."""
    engine = Engine([(1.0, {}), (2.0, {"a": 1}), (3.0, {"a": 1, "b": 1}), (0.5, {"a": 2, "b": 1}), (0.25, {"b": 2})])
    timing = timed(engine, 4, engine.clock)
    assert (timing.prefill, list(timing.steps), timing.tokens) == (6.0, [0.5, 0.25], 5)
    engine = Engine([(1.0, {"a": 1}), (1.0, {"a": 1})])
    with pytest.raises(ValueError, match="where 3 were asked for"):
        timed(engine, 3, engine.clock)


def test_its_outcome_counts_what_its_steps_gave():
    """Not one token of each request in each step; nothing is projected."""
    hardware = Hardware(load_bandwidth=5e10, store_bandwidth=5e10, gemm_rate=5e14, memory_bandwidth=3e12)
    engine = Engine([(2.0, {"a": 1, "b": 2}), (0.5, {"a": 1, "b": 1}), (0.5, {"a": 1})])
    timing = timed(engine, 3, engine.clock)
    run = PeerRun(
        timing=timing,
        traffic=Traffic(batch=2, context=544, weights=streamed_bytes(vllm()), cache=0),
        peak_device_bytes=GIB,
        host_bytes=GIB,
        load_seconds=1.0,
    )
    outcome = peer_outcome(vllm(batch=2, output=3), run, hardware, "device")
    assert (outcome.decode_tokens, outcome.decode_seconds, outcome.total_seconds) == (3, 1.0, 3.0)
    assert not outcome.projected
    assert outcome.efficiency == pytest.approx(2 * outcome.limit_step_seconds)


def test_all_systems_share_the_prefix():
    """The same first tokens in all prompts, and hsrpc is told of them."""
    setup = vllm(case=Case.SHARED, shared=SHARED_PREFIX, batch=3)
    prompts = random_prompts(setup)
    assert len({tuple(prompt[:SHARED_PREFIX]) for prompt in prompts}) == 1
    assert len({tuple(prompt[: SHARED_PREFIX + 1]) for prompt in prompts}) == 3
    assert engine_config(replace(setup, system=System.HSRPC)).expected_shared_prefix == SHARED_PREFIX
    record = Record(setup=setup, outcome=None, error="none")
    assert record_from(json.loads(json.dumps(asdict(record)))) == record


def test_a_peer_that_is_not_installed_is_named(tmp_path):
    """With what to install."""
    with pytest.raises(ValueError, match=r"vllm is not installed; pip install vllm==0\.23\.0"):
        run_one(json.dumps([asdict(vllm())]), tmp_path / "file.json")
