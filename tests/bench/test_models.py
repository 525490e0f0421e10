"""Sizes and plans of all well-known shapes: the file that docs/models.md is made of, and its tables."""

from __future__ import annotations

import json
from functools import partial

import pytest

from benchmarks import models, raw_results, tables
from benchmarks.raw_results import Header, Record
from hsrpc.config import EngineConfig
from hsrpc.model.shapes import SHAPES
from hsrpc.model.spec import DTYPES, named_spec

MIB = 2**20
HEADER = Header(commit="d88018c", command="a", date="2026-11-30", machine="a machine", torch="2.11")
PLAN = {
    "policy": "kv",
    "activation_share": 0.0,
    "recomputed_share": 0.0,
    "resident_share": 1.0,
    "batch": 60,
    "mean_tokens_per_second": 1978.6,
}
MODEL = {
    "name": "opt-13b",
    "family": "opt",
    "parameters": 12_853_473_280,
    "weight_bytes": 25_706_946_560,
    "context": 2048,
    "window": None,
    "kv_bytes": 819_200,
    "activation_ratio": 2.0,
    "plans": [],
}


def record(*entries: dict[str, object]) -> Record:
    return Record("models/current", HEADER, {"models": [MODEL | each for each in entries]})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates; all weights stream."""
    monkeypatch.setattr(models, "EngineConfig", partial(EngineConfig, max_batch=4, resident_share=0.0))


def test_the_file_has_every_shape_as_it_is():
    """A new shape, or one whose sizes changed, is planned for again: run `python -m benchmarks.models`."""
    written = {each.pop("name"): each for each in raw_results.read("models/current").result["models"]}
    assert list(written) == list(SHAPES)
    for name, entry in written.items():
        entry.pop("plans")
        assert entry == models.sizes_of(named_spec(name, DTYPES[models.DTYPE])), name


def test_a_shape_is_planned_for_on_the_measured_machine(quick, tmp_path, monkeypatch, capsys):
    """Within each budget, weights coded where that is faster, though no GPU is there; one that is too small is told."""
    monkeypatch.setattr(models, "GPU_MEMORY", (MIB, 1024 * MIB))
    file = tmp_path / "models.json"
    assert models.main(["--shape", "opt-1.3b", "--json", str(file), "--commit", "d88018c"]) == 0
    written = json.loads(file.read_text())
    assert written["header"]["commit"] == "d88018c"
    assert written["machine"]["rates"]["load_bandwidth"] == models.measured_hardware().load_bandwidth
    [entry] = written["models"]
    too_small, enough = entry["plans"]
    assert too_small["refused"].startswith("gpu_memory='1.0 MiB'")
    assert (enough["plan"]["batch"], enough["plan"]["codes_weights"]) == (4, True)
    assert "1 of 1: opt-1.3b" in (out := capsys.readouterr().out)
    assert "does not fit" in out


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (2.0, "activations: half of K and V"),
        (8 / 3, "activations: 0.38 of K and V"),
        (1.0, "K and V: as wide, and ready"),
        (0.25, "K and V: queries are grouped"),
    ],
)
def test_what_takes_less_is_said(ratio, words):
    """By the ratio alone; the other cells are the model's."""
    [row] = tables.model_sizes([record({"activation_ratio": ratio, "window": 4096})])
    sizes = ("opt-13b", "`opt`", "12.9 B", "23.9 GiB", "2,048 (4,096)", "800.0 KiB")
    assert row == (*sizes, f"{ratio:.2f}", words)


def test_plans_are_told_in_a_line():
    """Four cells for each size of GPU memory."""
    mixed = PLAN | {"policy": "hybrid", "activation_share": 0.4, "recomputed_share": 0.07, "resident_share": 0.256}
    activations = PLAN | {"policy": "activation"}
    entries = (
        {"plans": [{"plan": mixed}, {"plan": PLAN}]},
        {"plans": [{"refused": "host_memory: too small"}, {"plan": activations}]},
    )
    assert list(tables.model_plans([record(*entries)])) == [
        ("opt-13b", "1,979", "60", "activations 40 % + 7 %", "26 %", "1,979", "60", "K and V", "100 %"),
        ("opt-13b", "does not fit", "", "", "", "1,979", "60", "activations", "100 %"),
    ]
