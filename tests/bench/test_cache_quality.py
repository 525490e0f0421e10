"""What rounding does to outputs, on tiny random models, and the table of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import cache_quality, tables
from benchmarks.cache_quality import MODES, PLAIN, Mode, agreement, compare, main, rounding, run
from benchmarks.raw_results import Header, Record
from hsrpc.engine import startup
from hsrpc.model.formats.rows import Codes
from tests.engine.conftest import HARDWARE
from tests.engine.reference import decoder, opt, save_tokenizer, spread_norms

WINDOW = 48


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that the tests run on decides nothing; texts are short."""
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)
    monkeypatch.setattr(cache_quality, "WINDOW", WINDOW)
    monkeypatch.setattr(cache_quality, "GREEDY_TOKENS", 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(3)
    model = decoder("llama", num_hidden_layers=2, num_key_value_heads=2).eval()
    spread_norms(model)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def test_errors_are_of_what_is_rounded(checkpoint):
    """Nothing where nothing is; whole numbers are nearer than float8 to normally distributed K and V, inputs alike."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    windows, targets = torch.arange(64).view(2, 32), torch.arange(64)
    plain = run(model, windows, PLAIN)
    found = {mode.name: compare(plain, run(model, windows, mode), targets) for mode in (PLAIN, *MODES)}
    assert found["nothing"]["logit_error"] == found["nothing"]["divergence"] == 0
    assert found["nothing"]["same_best"] == 1
    for error in ("key_error", "value_error", "logit_error", "divergence"):
        assert 0 < found["K and V int8"][error] < found["K and V fp8"][error]
        assert 0 < found["activations int8"][error] < found["activations fp8"][error]
        assert found["activations fp8"][error] < found["activations and weights fp8"][error]
    assert 0.02 < found["K and V fp8"]["key_error"] < 0.08


def test_a_model_is_as_it_was_afterwards(checkpoint):
    """Hooks are gone, and weights are those that it had."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    windows = torch.arange(32).view(1, 32)
    before = run(model, windows, PLAIN)
    with rounding(model, Mode("all", activation=Codes.FP8, weight=Codes.INT8)):
        pass
    assert torch.equal(run(model, windows, PLAIN).logits, before.logits)


def test_tokens_count_up_to_the_first_difference():
    """On average over the outputs."""
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 2


def test_what_is_saved_is_in_the_table(checkpoint, tmp_path, monkeypatch, capsys):
    """Rows of a model with weights, of one in the bundled one's place, and of random ones."""
    monkeypatch.setattr(cache_quality, "BUNDLED_MODEL", str(checkpoint))
    monkeypatch.setattr(cache_quality, "MODES", MODES[2:4])  # one that is served, and one that is not
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    monkeypatch.setattr(cache_quality, "random_models", lambda: {"random": opt(**sizes, ffn_dim=32, vocab_size=4096)})
    page, file = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("A horse could pull on rails more than on a road. " * 2)
    words = ["--directory", str(checkpoint), "--page", str(page), "--tokens", "48", "--json", str(file)]
    assert main(words) == 0
    content = json.loads(file.read_text())
    assert content["header"]["command"].startswith("python -m benchmarks.cache_quality --directory")
    header = Header(commit="d88018c", command="a", date="2026-11-30", machine="a machine", torch="2.11")
    rows = list(tables.cache_quality([Record("cache-quality/current", header, content["result"])]))
    assert [row[0] for row in rows if row[0]] == [f"{checkpoint.name}, its own", "random, random"]
    assert [row[1] for row in rows] == 2 * ["nothing", "activations fp8", "activations int8"]
    assert [row[-1][-5:] for row in rows[:3]] == ["", " of 4", ""]
    assert "activations int8" in capsys.readouterr().out


def test_too_few_tokens_are_refused(capsys):
    """With what to give."""
    with pytest.raises(SystemExit):
        main(["--tokens", "3"])
    assert f"--tokens 3: less than a window; give {WINDOW} or more" in " ".join(capsys.readouterr().err.split())
