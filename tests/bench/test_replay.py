"""Drafts by replay on the CPU: what is recorded, how much of it is drafted, and what is told beside the formula."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import drafts, tables
from benchmarks.raw_results import Header, Record
from hsrpc.bench.replay import replay
from hsrpc.bench.report import print_replay
from hsrpc.bench.run import BenchError
from hsrpc.config import EngineConfig
from hsrpc.plan.drafting import Drafting
from hsrpc.plan.roofline import roofline
from tests.bench.test_run import RECORD, SHAPE
from tests.plan.test_step_time import EVEN, SIZES

LENGTHS = {"prompt": 8, "output": 34, "steps": 3}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A model of two layers."""
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(SHAPE))
    return file


@pytest.fixture
def config(shape: Path) -> EngineConfig:
    """Everything on the host, and room for 7 drafted tokens of each of 3 requests."""
    memory = {"gpu_memory": "64MiB", "host_memory": "64MiB", "placement": "host"}
    batch = {"min_batch": 3, "max_batch": 3, "max_draft_tokens": 7, "max_model_len": 64}
    return EngineConfig(model=f"random:{shape}", device="cpu", **batch, **memory)


async def test_steps_with_drafts_are_told_beside_the_formula(config, capsys):
    """All right gives each request all of a draft and one more; all wrong one alone; shorter drafts are not others."""
    settings = [Drafting(7, 1.0), Drafting(3, 1.0), Drafting(7, 0.0)]
    result = await replay(config, settings, **LENGTHS)
    assert (result.batch, result.max_draft_tokens) == (3, 7)
    assert [(each.drafts, each.tokens_per_request) for each in result.settings] == [(0, 1), (7, 8), (3, 4), (7, 1)]
    for each in result.settings:
        assert each.num_steps >= 3
        assert each.num_steps == len(each.step_times)
        assert each.predicted_tokens_per_request == each.tokens_per_request
        assert each.limit_tokens_per_second == pytest.approx(3 * each.tokens_per_request / each.limit_seconds)
        assert each.tokens_per_second == pytest.approx(
            3 * each.tokens_per_request * each.num_steps / sum(each.step_times)
        )
    print_replay(result)
    out = capsys.readouterr().out
    assert "3 requests of 25 tokens" in out
    assert "drafts: up to 7 tokens a request, as asked" in " ".join(out.split())


async def test_drafts_longer_than_there_is_room_for_are_not_measured(config):
    with pytest.raises(BenchError, match="3 requests draft 9 tokens each"):
        await replay(config, [Drafting(9, 1.0)], **LENGTHS)


def test_the_limit_counts_what_is_drafted() -> None:
    """Rows of forward, as those of requests are; no byte of the bus."""
    alone, found = (roofline(each, SIZES, EVEN) for each in (RECORD, replace(RECORD, drafted_tokens=4000)))
    assert found.bus == alone.bus
    flop = sum(layer.flop(4004) for layer in SIZES.layers)
    assert found.forward == pytest.approx(flop / EVEN.gemm_rate)
    assert found.forward > alone.forward


def test_a_sweep_is_a_file_a_case_and_lines_of_a_table(shape, tmp_path):
    """One engine for all its settings; a model and its batch are named once."""
    words = [
        f"--shape={shape}",
        "--batch=2",
        "--prompt=8",
        "--drafts",
        "1",
        "--acceptance",
        "0.5",
        "1",
        f"--folder={tmp_path}",
    ]
    words += ["--drafts", "1", "--acceptance", "0.5", "1"]
    memory = ["--gpu-memory=64MiB", "--host-memory=64MiB", "--commit=abcdef0"]
    assert drafts.main([*words, *memory]) == 0
    content = json.loads((tmp_path / "tiny-2.json").read_text())
    record = Record("drafts-replay/tiny-2", Header(**content["header"]), content["result"])
    rows = list(tables.drafts_replay([record]))
    assert [row[1] for row in rows] == ["none", "1, 50%", "1, 100%"]
    assert [bool(row[0]) for row in rows] == [True, False, False]
    assert rows[0][-1] == "1.00"
