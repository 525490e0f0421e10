"""What streaming through gRPC costs, measured with a tiny model."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import fields, replace
from multiprocessing import Pipe
from pathlib import Path

import pytest

from benchmarks.grpc_cost.__main__ import main, make_parser
from benchmarks.grpc_cost.measure import Cost, Load, Sample, Way, full_steps
from benchmarks.grpc_cost.pretend_engine import PretendedStep, PretendEngine
from hsrpc.bench.frontend_client import ClientProcessError, Job, ask
from hsrpc.bench.run import BenchError
from hsrpc.plan.roofline import StepRecord
from hsrpc.request import SamplingParams
from tests.bench.test_run import RECORD, SHAPE

LOAD = Load(requests=4, prompt=8, output=20, clients=1, max_message_delay=None)


@pytest.fixture
def arguments(tmp_path: Path) -> Iterator[list[str]]:
    """Four requests to a model of two layers, once each way."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPE))
    memory = ["--gpu-memory=64MiB", "--host-memory=64MiB"]
    load = ["--requests=4", "--prompt=8", "--output=20", "--repeats=1"]
    interval = sys.getswitchinterval()
    yield [f"--model=random:{file}", "--device=cpu", *memory, *load]
    sys.setswitchinterval(interval)


def sample(way: Way, rate: float) -> Sample:
    other = dict.fromkeys({field.name for field in fields(Sample)} - {"way", "tokens_per_second"}, 1)
    return Sample(way=way, tokens_per_second=rate, **other)


@pytest.mark.timeout(120)
def test_both_ways_run_by_turns(arguments, tmp_path, capsys):
    """Each way hands out all tokens, to two client processes too; the file has every sample, the report the cost."""
    assert main([*arguments, "--clients=2", f"--json={tmp_path / 'cost.json'}"]) == 0
    found = json.loads((tmp_path / "cost.json").read_text())
    assert [sample["way"] for sample in found["samples"]] == ["embedded", "grpc"]
    for sample in found["samples"]:
        assert sample["messages"] >= 4
        assert 0 < sample["loop_cores"] <= sample["cores"] * 1.1
        assert sample["step_seconds"] < 4 * 20 / sample["tokens_per_second"]
    embedded, grpc = found["samples"]
    for name in ("tokens_per_second", "full_tokens_per_second"):
        assert found[f"{name}_ratio"] == pytest.approx(grpc[name] / embedded[name])
    assert f"gRPC costs {1 - found['tokens_per_second_ratio']:.1%} of the embedded tokens/s" in capsys.readouterr().out


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--max-model-len=26", "72 tokens came in place of 80"),
        ("--max-message-delay=99", "INVALID_ARGUMENT: output.max_message_delay: 99.0 s is outside"),
        ("--output=1", "in no step did 4 requests decode at once; give a larger --output"),
    ],
)
def test_a_run_that_means_something_else_is_an_error(flag, message, arguments, capsys):
    """Missing tokens, streams that fail and steps that never came are said in one line, with exit code 1."""
    assert main([*arguments, flag]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests=2", "--clients=3"], "--clients 3: more than --requests 2; give each a request"),
        (["--output=0"], "argument --output: '0' does not do; give 1 or more"),
        (["--pretend", "0.004", "-1"], "argument --pretend: '-1' is not a time; give seconds, 0 or more"),
    ],
)
def test_wrong_use_is_told_apart(arguments, message, capfd):
    """Exit code 2, with the value and the remedy."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_an_engine_can_be_pretended(capsys):
    """No model is read; the steps take the time that they are to take, at the least."""
    assert main(["--pretend", "0.01", "0.004", "--requests=4", "--prompt=8", "--output=20", "--repeats=1"]) == 0
    out = capsys.readouterr().out
    assert "steps of 10 ms with 4 ms of host work" in out
    assert "gRPC costs" in out


@pytest.mark.parametrize("step", [PretendedStep(0.02, 0.0), PretendedStep(0.0, 0.02)], ids=["device", "host"])
async def test_a_pretended_step_takes_its_time(step):
    """Each request gets a token in each step, and no step is over before device and host have worked as long."""
    steps: list[StepRecord] = []
    async with PretendEngine(step, 2, steps.append) as engine:

        async def take() -> list[int]:
            return [len(delta.token_ids) async for delta in engine.generate([1], SamplingParams(max_tokens=10))]

        outputs = await asyncio.gather(take(), take())
    assert [sum(sizes) for sizes in outputs] == [10, 10]
    assert [step.decode_tokens for step in steps] == [2] * 10
    assert sorted(step.seconds for step in steps)[5] >= 0.015


async def test_a_pretended_request_that_is_left_ends():
    """The generator closes its request amid a step, and the engine goes on for the others."""
    steps: list[StepRecord] = []
    async with PretendEngine(PretendedStep(0.001, 0.0), 2, steps.append) as engine:
        async with aclosing(engine.generate([1], SamplingParams(max_tokens=2))) as deltas:
            await anext(deltas)
        assert not engine.live
        assert [delta async for delta in engine.generate([1], SamplingParams(max_tokens=1))]


def test_help_has_examples_that_parse():
    """As they stand there, without their comments."""
    lines = [line.split("  ")[1].split() for line in (make_parser().epilog or "").splitlines()[1:]]
    assert len(lines) == 4
    for words in lines:
        assert words[:3] == ["python", "-m", "benchmarks.grpc_cost"]
        make_parser().parse_args(words[3:])


def test_the_cost_is_of_medians():
    """One slow run of three changes nothing."""
    rates = {Way.EMBEDDED: (100.0, 10.0, 110.0), Way.GRPC: (90.0, 99.0, 1000.0)}
    samples = [sample(way, rate) for way, those in rates.items() for rate in those]
    assert Cost(model="m", device="d", load=LOAD, samples=samples).ratio("tokens_per_second") == pytest.approx(0.99)


def test_full_steps_are_those_without_beginners():
    """Neither fewer requests than there are, nor a prompt beside."""
    tokens = ((3, 8), (4, 8), (4, 0))
    steps = [replace(RECORD, decode_tokens=decode, prefill_tokens=prefill) for decode, prefill in tokens]
    assert full_steps(steps, 4) == steps[2:]
    with pytest.raises(BenchError, match="in no step did 5 requests"):
        full_steps(steps, 5)


def test_a_client_process_that_is_gone_is_an_error():
    """Nobody waits for it."""
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(ClientProcessError, match="has ended"):
        ask(ours, Job(1, 1, {}))
