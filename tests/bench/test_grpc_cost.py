"""What streaming through gRPC costs, measured with a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest

from benchmarks.grpc_cost import main, make_parser
from hsrpc.bench.frontend_client import ClientProcessError, Job, ask
from hsrpc.bench.grpc_cost import Cost, Load, Sample, Way
from tests.bench.test_run import SHAPE

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
    return Sample(
        way=way, tokens_per_second=rate, step_seconds=0.1, loop_lag_p99=0.001, cores=1.0, loop_cores=0.5, messages=80
    )


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
    rates = {sample["way"]: sample["tokens_per_second"] for sample in found["samples"]}
    assert found["ratio"] == pytest.approx(rates["grpc"] / rates["embedded"])
    assert f"cost of gRPC: {1 - found['ratio']:.1%} of the embedded throughput" in capsys.readouterr().out


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
    ],
)
def test_wrong_use_is_told_apart(arguments, message, capsys):
    """Exit code 2, with the value and the remedy."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_examples_that_parse():
    """As they stand there, without their comments."""
    lines = [line.split("  ")[1].split() for line in (make_parser().epilog or "").splitlines()[1:]]
    assert len(lines) == 3
    for words in lines:
        assert words[:2] == ["python", "benchmarks/grpc_cost.py"]
        make_parser().parse_args(words[2:])


def test_the_cost_is_of_medians():
    """One slow run of three changes nothing."""
    rates = {Way.EMBEDDED: (100.0, 10.0, 110.0), Way.GRPC: (90.0, 99.0, 1000.0)}
    samples = [sample(way, rate) for way, those in rates.items() for rate in those]
    assert Cost(model="m", device="d", load=LOAD, samples=samples).ratio == pytest.approx(0.99)


def test_a_client_process_that_is_gone_is_an_error():
    """Nobody waits for it."""
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(ClientProcessError, match="has ended"):
        ask(ours, Job(1, 1, {}))
