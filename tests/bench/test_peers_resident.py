"""The case with everything on the device: hsrpc beside transformers with a static cache, here on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Cache, CompileConfig, StaticCache

from benchmarks.peers import run_hsrpc
from benchmarks.peers.__main__ import main
from benchmarks.peers.cases import GIB, RESIDENT_BATCH, RESIDENT_MODEL, Budgets, Case, Setup, System, sizes_of
from benchmarks.peers.cells import Cell, all_cells, estimated_seconds, setups_of
from benchmarks.peers.one import peer_outcome
from benchmarks.peers.record import Outcome, PeerRun, Record, Timing, Traffic, add_record
from benchmarks.peers.run_transformers import generate_resident, resident_model
from hsrpc.config import Placement
from hsrpc.plan.hardware import Hardware
from hsrpc.schedule.blocks import BlockKind

CPU = torch.device("cpu")
BUDGETS = Budgets()


def setup(system: System, model: str = RESIDENT_MODEL, **more) -> Setup:
    settings = {"case": Case.RESIDENT, "budgets": BUDGETS, "batch": 3, "prompt": 40, "output": 8}
    return Setup(model=model, system=system, **(settings | more))


def make(shape: torch.Size, mean: float, deviation: float) -> torch.Tensor:
    return torch.empty(shape).normal_(mean, deviation).half()


def on_the_cpu() -> CompileConfig:
    """Graphs are traced and run as they are: what the compiler makes of them is not this test's."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return config


def test_two_systems_are_compared_for_one_model():
    """The other peers have no part in it, nor transformers in the other cases."""
    cells = all_cells(list(Case), (RESIDENT_MODEL, "opt-6.7b"), list(System))
    chosen = [cell for cell in cells if cell.case is Case.RESIDENT or cell.system is System.TRANSFORMERS]
    assert chosen == [Cell(Case.RESIDENT, RESIDENT_MODEL, system) for system in (System.HSRPC, System.TRANSFORMERS)]
    assert {cell.model for cell in cells if cell.case is not Case.RESIDENT} == {"opt-6.7b"}


def test_the_batch_is_equal_and_transformers_is_tried_both_ways():
    """Decode as it is, and compiled; each says which in its name."""
    ours, theirs = (
        setups_of(Cell(Case.RESIDENT, RESIDENT_MODEL, s), BUDGETS, 4) for s in (System.HSRPC, System.TRANSFORMERS)
    )
    assert {each.batch for each in ours + theirs} == {RESIDENT_BATCH}
    assert {(each.prompt, each.output, each.steps) for each in ours + theirs} == {(512, 128, None)}
    assert [each.compiled for each in theirs] == [False, True]
    assert [each.key for each in theirs] == ["batch 64, not compiled", "batch 64, compiled decode"]
    assert estimated_seconds(theirs[1]) > estimated_seconds(theirs[0])


def test_a_model_is_made_of_the_weights_on_the_device(tiny_shape):
    """In float16, with torch's attention; the head is the embeddings."""
    made: list[torch.Tensor] = []

    def keep(shape: torch.Size, mean: float, deviation: float) -> torch.Tensor:
        made.append(make(shape, mean, deviation))
        return made[-1]

    model = resident_model(tiny_shape, keep)
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert places == {tensor.data_ptr() for tensor in made}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.config._attn_implementation == "sdpa"


def test_transformers_generates_with_a_static_cache(tiny_shape):
    """Every token of every request is timed; nothing is compiled unless asked for."""
    model, caches = resident_model(tiny_shape, make), []

    def note(_: object, args: tuple[object, ...], more: dict[str, object]) -> None:
        """Versions of transformers differ in what they call it."""
        caches.extend(value for value in more.values() if isinstance(value, Cache))

    model.register_forward_pre_hook(note, with_kwargs=True)
    wanted = setup(System.TRANSFORMERS, tiny_shape)
    timing = generate_resident(model, wanted, CPU, lambda: None, compile_config=on_the_cpu())
    assert len(timing.steps) == 7
    assert {type(cache) for cache in caches} == {StaticCache}


def test_decode_is_compiled_before_it_counts(tiny_shape):
    """The run that warms up has the same shapes: in the one that counts nothing is left to compile."""
    seen: list[int] = []

    def note() -> None:
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    wanted = setup(System.TRANSFORMERS, tiny_shape, compiled=True)
    model = resident_model(tiny_shape, make)
    timing = generate_resident(model, wanted, CPU, note, compile_config=on_the_cpu())
    assert len(timing.steps) == 7
    assert len(seen) == 9
    assert len(set(seen)) == 1


def test_it_is_an_error_if_transformers_does_not_compile(tiny_shape):
    """As on a CPU, or in a version without it: what is measured is what its name says."""
    wanted = setup(System.TRANSFORMERS, tiny_shape, compiled=True)
    with pytest.raises(ValueError, match="compiled=True"):
        generate_resident(resident_model(tiny_shape, make), wanted, CPU, lambda: None)


def test_the_limit_is_the_memory_bandwidth():
    """Weights and the cache of the mean context, once a step."""
    hardware = Hardware(load_bandwidth=1e9, store_bandwidth=1e9, gemm_rate=1e18, memory_bandwidth=1e12)
    wanted = setup(System.TRANSFORMERS, batch=64, prompt=512, output=128)
    sizes = sizes_of(RESIDENT_MODEL)
    moved = sizes.layers_bytes + 64 * (512 + 64 + 1) * sizes.token_bytes(BlockKind.KV)
    run = PeerRun(
        timing=Timing(prefill=1.0, steps=[2 * moved / 1e12] * 127),
        traffic=Traffic(batch=64, context=wanted.mean_context, weights=0, cache=0),
        peak_device_bytes=GIB,
        host_bytes=0,
        load_seconds=1.0,
    )
    found = peer_outcome(wanted, run, hardware, "device")
    assert found.limit_step_seconds == pytest.approx(moved / 1e12)
    assert found.efficiency == pytest.approx(0.5)


def test_hsrpc_keeps_everything_on_the_device(tiny_shape):
    """The equal batch, and all of its tokens."""
    found = run_hsrpc.run(setup(System.HSRPC, tiny_shape, output=16))
    assert (found.batch, found.total_tokens, found.decode_tokens) == (3, 48, 45)


def test_it_is_an_error_if_hsrpc_streams(tiny_shape, monkeypatch):
    """As it would with too little device memory: that is another case."""
    wanted = setup(System.HSRPC, tiny_shape, output=16)
    streamed = replace(run_hsrpc.engine_config(wanted), placement=Placement.HOST)
    monkeypatch.setattr(run_hsrpc, "engine_config", lambda _: streamed)
    with pytest.raises(ValueError, match="--gpu-memory"):
        run_hsrpc.run(wanted)


def test_the_case_is_estimated_and_reported(tmp_path, capsys):
    """With a ratio, the versions of what was measured, and a plot; of transformers the faster way counts."""
    main(["estimate", "--case", "resident"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
        "resident opt-1.3b hsrpc",
        "resident opt-1.3b transformers",
    ]
    assert len(lines) == 5
    file = tmp_path / "peers.json"
    for wanted, rate, software in (
        (setup(System.HSRPC), 30.0, "torch 2"),
        (setup(System.TRANSFORMERS), 5.0, "transformers 5"),
        (setup(System.TRANSFORMERS, compiled=True), 10.0, "transformers 5"),
    ):
        add_record(file, Record(setup=wanted, outcome=outcome(rate, software)))
    main(["report", str(file), "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    printed = capsys.readouterr().out
    assert "resident: 3.00 times the total throughput of transformers" in printed
    assert "transformers: transformers 5" in printed
    assert "compiled decode" in printed
    assert "not compiled" not in printed
    assert len(json.loads((tmp_path / "out.json").read_text())["best"]) == 2
    assert Path(tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def outcome(rate: float, software: str) -> Outcome:
    """A run of 1000 new tokens at `rate` tokens/s."""
    made = Outcome(
        device="device",
        batch=3,
        prefill_seconds=1.0,
        step_seconds=0.1,
        decode_seconds=900 / rate,
        total_seconds=1000 / rate,
        decode_tokens=900,
        total_tokens=1000,
        projected=False,
        limit_step_seconds=0.05,
        efficiency=0.5,
        peak_device_bytes=GIB,
        host_bytes=0,
        load_seconds=3.0,
        load_bandwidth=5e10,
    )
    return replace(made, software=software)
