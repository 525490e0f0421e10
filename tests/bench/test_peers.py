"""Measuring the peers: runs in processes of their own, the search for FlexGen's best, and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

from benchmarks.peers.__main__ import main
from benchmarks.peers.cases import GIB, Budgets, Case, Setup, System
from benchmarks.peers.cells import estimated_seconds
from benchmarks.peers.drive import Driver, reason, run_child
from benchmarks.peers.generation import empty_model, generate, random_weights
from benchmarks.peers.one import peer_outcome
from benchmarks.peers.record import Outcome, PeerRun, Record, Timing, Traffic, add_record, read_records
from benchmarks.peers.report import best_entries, print_report, ratios
from benchmarks.peers.run_accelerate import WARM_UP
from hsrpc.plan.hardware import Hardware

BUDGETS = Budgets()


def setup(system: System = System.FLEXGEN, **more) -> Setup:
    settings = {"case": Case.BUDGET, "model": "opt-6.7b", "system": system, "budgets": BUDGETS, "batch": 16}
    if system is System.FLEXGEN:
        settings["percent"] = (100, 0, 100, 0, 100, 0)
    return Setup(**(settings | more))


def outcome(total: float = 10.0, *, projected: bool = False, decode: float | None = None) -> Outcome:
    """A run of 1000 new tokens at `total` tokens/s."""
    return Outcome(
        device="device",
        batch=16,
        prefill_seconds=1.0,
        step_seconds=0.1,
        decode_seconds=900 / (decode or total),
        total_seconds=1000 / total,
        decode_tokens=900,
        total_tokens=1000,
        projected=projected,
        limit_step_seconds=0.05,
        efficiency=0.5,
        peak_device_bytes=GIB,
        host_bytes=2 * GIB,
        load_seconds=3.0,
        load_bandwidth=5e10,
    )


def _record(wanted: Setup, found: Outcome | str) -> Record:
    if isinstance(found, str):
        return Record(setup=wanted, outcome=None, error=found)
    return Record(setup=wanted, outcome=found)


def driver(file: Path, rate: Callable[[Setup], Outcome | str], seconds: float = 1e6) -> tuple[Driver, list[Setup]]:
    """One whose measurements are made up, and what it measured."""
    measured: list[Setup] = []

    def measure(setups: Sequence[Setup], limit: float) -> list[Record]:
        measured.extend(setups)
        return [_record(wanted, rate(wanted)) for wanted in setups]

    made = Driver(file=file, measure=measure, say=lambda _: None, deadline=time.monotonic() + seconds)
    return made, measured


def test_the_best_is_tried_shortly_and_measured_in_full(tmp_path):
    """Every setup is tried; the best one grows while that helps, and is measured without a cut."""
    peak = 27

    def rate(wanted: Setup) -> Outcome:
        return outcome(100 - abs(wanted.batch - peak), projected=wanted.steps is not None)

    made, measured = driver(tmp_path / "file.json", rate)
    best = made.run_best([setup(batch=8), setup(batch=24)], 6, None)
    assert [(s.batch, s.steps) for s in measured] == [(8, 6), (24, 6), (27, 6), (30, 6), (27, None)]
    assert best.setup == setup(batch=27)
    assert read_records(tmp_path / "file.json")[-1] == best


def test_what_does_not_fit_is_tried_smaller(tmp_path):
    """Twice at most; each failure is kept, and the others are measured all the same."""

    def rate(wanted: Setup) -> Outcome | str:
        return "out of memory on the device" if wanted.batch > 28 else outcome(wanted.batch)

    made, _ = driver(tmp_path / "file.json", rate)
    best = made.run_best([setup(batch=64), setup(batch=32)], 6, None)
    assert best.setup.batch == 28
    batches = [(r.setup.batch, r.error is None) for r in read_records(tmp_path / "file.json")]
    assert batches == [(64, False), (56, False), (49, False), (32, False), (28, True), (28, True)]


def test_what_takes_more_memory_than_it_may_is_kept_but_never_the_best(tmp_path, capsys):
    """Nothing that was measured is thrown away; the report says by how much it was too much."""

    def rate(wanted: Setup) -> Outcome:
        return replace(outcome(wanted.batch), host_bytes=wanted.batch * 4 * GIB)

    made, _ = driver(tmp_path / "file.json", rate)
    best = made.run_best([setup(batch=8), setup(batch=32)], 6, None)
    assert best.setup.batch == 27
    records = read_records(tmp_path / "file.json")
    assert [(r.setup.batch, r.excess is None) for r in records] == [
        (8, True),
        (32, False),
        (28, False),
        (24, True),
        (27, True),
        (30, False),
        (27, True),
    ]
    only = Record(setup=setup(batch=32), outcome=rate(setup(batch=32)))
    assert best_entries([best, only])[0].setup == best.setup
    print_report([only])
    told = " ".join(capsys.readouterr().out.split())
    assert "beyond its budget: budget opt-6.7b flexgen, batch 32" in told
    assert told.endswith("128.0 GiB of 108.0 GiB host memory")


def test_the_equal_batch_stays_equal(tmp_path):
    """In the host case neither a failure nor a success changes the batch."""
    made, measured = driver(
        tmp_path / "file.json", lambda s: outcome() if s.num_batches == 4 else "out of memory on the device"
    )
    best = made.run_best([setup(case=Case.HOST, num_batches=n) for n in (1, 4)], 6, None)
    assert {s.batch for s in measured} == {16}
    assert best.setup.num_batches == 4


def test_a_run_goes_on_where_it_ended(tmp_path):
    """What the file has is not measured again, and nothing is begun that the time does not suffice for."""
    first, _ = driver(tmp_path / "file.json", lambda _: outcome())
    first.run(setup())
    again, measured = driver(tmp_path / "file.json", lambda _: outcome(), seconds=5.0)
    assert again.run(setup()).outcome == outcome()
    assert again.run(setup(batch=8)) is None
    assert measured == []


def test_what_the_time_did_not_suffice_for_is_no_failure(tmp_path):
    """A setup that was stopped because the whole run was over is measured by the next run; a failure is not."""
    made, measured = driver(tmp_path / "file.json", lambda _: "took longer than 0 s")
    made.run(setup())
    late, _ = driver(tmp_path / "late.json", lambda _: "took longer than 0 s", seconds=estimated_seconds(setup()) + 0.1)
    original = late.measure

    def slow(wanted: Setup, limit: float) -> Record:
        late.deadline = time.monotonic() - 1
        return original(wanted, limit)

    late.measure = slow
    assert late.run(setup()) is None
    assert [len(read_records(tmp_path / name)) for name in ("file.json", "late.json")] == [1, 0]
    made.run(setup())
    assert len(measured) == 1


def test_a_report_of_nothing_says_so(tmp_path):
    """Names of files are mistyped; and failures alone are no plot."""
    with pytest.raises(SystemExit, match=r"typo\.json"):
        main(["report", str(tmp_path / "typo.json")])
    add_record(tmp_path / "failed.json", Record(setup=setup(), outcome=None, error="no"))
    main(["report", str(tmp_path / "failed.json"), "--plot", str(tmp_path / "plot.png")])
    assert not (tmp_path / "plot.png").exists()


def test_if_nothing_works_there_is_no_best(tmp_path):
    """All failures are recorded."""
    made, _ = driver(tmp_path / "file.json", lambda _: "exit status 1: no")
    assert made.run_best([setup(), setup(batch=8)], 6, None) is None
    assert len(read_records(tmp_path / "file.json")) == 2


def test_reasons_are_one_line():
    """Why a child failed: lack of memory, a kill, or its last words."""
    assert (
        reason(1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n\n") == "out of memory on the device"
    )
    assert "host memory" in reason(-9, "")
    assert reason(1, "Traceback\nValueError: bad\n\n") == "exit status 1: ValueError: bad"
    assert reason(3, "") == "exit status 3: no message"


def test_a_record_survives_the_file(tmp_path):
    """Nothing is lost or changed between measuring and reporting."""
    records = [
        Record(setup=setup(steps=6, num_batches=2), outcome=outcome(projected=True)),
        Record(setup=setup(System.HSRPC, batch=None), outcome=None, error="why"),
    ]
    for record in records:
        add_record(tmp_path / "file.json", record)
    assert read_records(tmp_path / "file.json") == records
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_missing_steps_last_as_long_as_the_settled_ones():
    """The first two steps count as they were, and stand for no other."""
    timing = Timing(prefill=1.0, steps=[5.0, 4.0, 1.0, 2.0])
    assert timing.decode_seconds(5) == 12.0
    assert timing.decode_seconds(11) == pytest.approx(12.0 + 6 * 1.5)


def test_a_peers_outcome_beside_its_limit():
    """Throughputs count new tokens, from the first request to the last token."""
    wanted = setup(batch=10, output=5)
    hardware = Hardware(load_bandwidth=1e9, store_bandwidth=1e9, gemm_rate=1e15, memory_bandwidth=1e15)
    run = PeerRun(
        timing=Timing(prefill=2.0, steps=[2.0] * 4),
        traffic=Traffic(batch=10, context=512, weights=10**9, cache=0),
        peak_device_bytes=1,
        host_bytes=1,
        load_seconds=1.0,
    )
    found = peer_outcome(wanted, run, hardware, "device")
    assert found.total_throughput == pytest.approx(10 * 5 / 10.0)
    assert found.decode_throughput == pytest.approx(10 * 4 / 8.0)
    assert found.efficiency == pytest.approx(0.5)
    assert not found.projected
    assert peer_outcome(replace(wanted, output=6), run, hardware, "device").projected
    assert found.excess(BUDGETS) is None
    larger = peer_outcome(wanted, replace(run, host_bytes=2 * BUDGETS.host), hardware, "device")
    assert larger.excess(BUDGETS) == "216.0 GiB of 108.0 GiB host memory"


def test_the_best_of_full_measurements_is_reported():
    """A projection counts only where nothing was measured in full; of repeats the median counts."""
    records = [
        Record(setup=setup(steps=6), outcome=outcome(99.0, projected=True)),
        *(Record(setup=setup(), outcome=outcome(rate)) for rate in (10.0, 50.0, 12.0)),
        Record(setup=setup(batch=8), outcome=outcome(11.0)),
        Record(setup=setup(model="opt-13b", steps=6), outcome=outcome(3.0, projected=True)),
    ]
    found = [(entry.setup.model, entry.outcome.total_throughput) for entry in best_entries(records)]
    assert found == [("opt-6.7b", pytest.approx(12.0)), ("opt-13b", pytest.approx(3.0))]


def test_ratios_are_geometric_means_over_common_models():
    """Models that one of the two lacks are left out, and the cases are kept apart."""
    rates = {"opt-6.7b": (10.0, 5.0), "opt-13b": (80.0, 10.0)}
    records = [
        Record(setup=setup(system, model=model), outcome=outcome(rate))
        for model, pair in rates.items()
        for system, rate in zip((System.HSRPC, System.FLEXGEN), pair, strict=True)
    ]
    records.append(Record(setup=setup(System.HSRPC, model="opt-30b"), outcome=outcome(7.0)))
    records.append(Record(setup=setup(System.FLEXGEN, case=Case.HOST), outcome=outcome(7.0)))
    [ratio] = ratios(best_entries(records))
    assert (ratio.case, ratio.peer, ratio.models) == (Case.BUDGET, System.FLEXGEN, ("opt-6.7b", "opt-13b"))
    assert ratio.total == pytest.approx(4.0)


def test_report_prints_saves_and_draws(tmp_path, capsys):
    """From several files: tables with ratios and failures, JSON and a PNG."""
    for case, rate in ((Case.HOST, 2.0), (Case.BUDGET, 3.0)):
        add_record(tmp_path / f"{case}.json", Record(setup=setup(System.HSRPC, case=case), outcome=outcome(6.0)))
        add_record(tmp_path / f"{case}.json", Record(setup=setup(case=case), outcome=outcome(rate)))
    add_record(tmp_path / "host.json", Record(setup=setup(batch=99), outcome=None, error="too much"))
    files = [str(tmp_path / f"{case}.json") for case in Case]
    main(["report", *files, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    printed = capsys.readouterr().out
    assert "host: 3.00 times" in printed
    assert "budget: 2.00 times" in printed
    assert "too much" in printed
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_estimate_lists_every_setup(capsys):
    """With the final run among FlexGen's."""
    main(["estimate", "--case", "host", "--model", "opt-6.7b", "--system", "flexgen", "--candidates", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "of 128 tokens" in lines[1]
    assert "of 128 tokens" not in lines[3]


def test_hsrpc_is_measured_in_a_process_of_its_own():
    """By the same driver, here on the CPU with a small shape."""
    small = Setup(
        case=Case.HOST,
        model="opt-125m",
        system=System.HSRPC,
        budgets=Budgets(device=GIB, host=2 * GIB),
        batch=2,
        prompt=8,
        output=8,
    )
    [record] = run_child([small], 120)
    assert record.error is None
    assert (record.outcome.batch, record.outcome.total_tokens) == (2, 16)
    assert record.outcome.prefill_seconds + record.outcome.decode_seconds == pytest.approx(record.outcome.total_seconds)
    assert asdict(record.outcome)["decode_tokens"] == 14
    assert record.outcome.software == f"torch {torch.__version__}"


def test_a_failure_in_the_process_is_a_record():
    """A model that there is no shape of: the last words are kept."""
    [record] = run_child([setup(System.HSRPC, model="opt-1t")], 120)
    assert record.outcome is None
    assert "opt-1t" in record.error


def test_a_process_that_takes_too_long_is_ended():
    """And that is what the record says."""
    [record] = run_child([setup(System.HSRPC)], 0.2)
    assert record.outcome is None
    assert "longer" in record.error


def test_accelerate_generates_from_offloaded_weights(tiny_shape):
    """Every token of every request is timed; no parameter stays on the device."""
    cpu, model = torch.device("cpu"), empty_model(tiny_shape)
    weights = random_weights(model, lambda shape, mean, deviation: torch.empty(shape).normal_(mean, deviation).half())
    model = cpu_offload(model, cpu, state_dict=weights)
    wanted = setup(System.ACCELERATE, model=tiny_shape, batch=3, prompt=40, output=20, steps=4)
    timing = generate(model, wanted, cpu, lambda: None, warm_up=WARM_UP, cache_implementation="dynamic")
    assert len(timing.steps) == 3
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_flexgen_setup_can_be_given(capsys):
    """Its percentages and batch stand in place of the search."""
    cell = ["--case", "budget", "--model", "opt-13b", "--system", "flexgen"]
    main(["estimate", *cell, "--percent", "50", "50", "100", "0", "100", "0", "--batch", "16", "--num-batches", "2"])
    [_, line] = capsys.readouterr().out.splitlines()
    assert line.endswith("batch 16, 2 GPU batches, percent 50 50 100 0 100 0")
    with pytest.raises(SystemExit, match="multiple"):
        main(
            ["estimate", *cell, "--percent", "50", "50", "100", "0", "100", "0", "--batch", "15", "--num-batches", "2"]
        )


def test_one_setup_alone_is_measured_at_once(tmp_path):
    """There is nothing to choose from, hence nothing to try."""
    made, measured = driver(tmp_path / "file.json", lambda _: outcome())
    made.run_best([setup()], 6, None)
    assert measured == [setup()]
