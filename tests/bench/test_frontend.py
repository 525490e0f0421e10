"""What the server can send, measured with an engine that costs nothing."""

from __future__ import annotations

import json

import pytest

from hsrpc.bench import frontend
from hsrpc.bench.frontend import measure_frontend, plot_frontend, print_frontend, save_frontend
from hsrpc.bench.stub_engine import StubEngine
from hsrpc.request import FinishReason, SamplingParams


async def test_the_stub_keeps_its_rate():
    """A request gets its tokens one a delta, its length and no more, not before they are due."""
    async with StubEngine(rate=1000.0) as engine:
        generation = await engine.submit([1], SamplingParams(max_tokens=100, ignore_eos=True))
        deltas = [delta async for delta in generation]
    assert sum(len(delta.token_ids) for delta in deltas) == 100
    finish = deltas[-1].finish
    assert (finish.reason, finish.usage.completion_tokens) == (FinishReason.MAX_TOKENS, 100)
    assert finish.timings.decode >= 0.1
    assert engine.stats().running == 0


async def test_the_stub_forgets_what_is_aborted():
    """An abort ends the request with what there is; another finds nothing."""
    async with StubEngine(rate=1.0) as engine:
        generation = await engine.submit([1], SamplingParams(), request_id="a")
        assert engine.abort("a")
        assert not engine.abort("a")
        assert [delta.finish.reason async for delta in generation] == [FinishReason.ABORTED]


@pytest.mark.timeout(60)
async def test_modes_differ_in_messages(tmp_path, monkeypatch, capsys):
    """Every token is received in both; merged, in fewer messages. The report has a row for each."""
    monkeypatch.setattr(frontend, "MAX_LAG", 60.0)
    monkeypatch.setattr(frontend, "_SLOWEST", 100.0)
    seen = []
    monkeypatch.setattr(frontend._Bench, "highest", lambda bench, mode, n: bench._try(mode, n, 2000.0))
    trials = await measure_frontend([2], 0.5, seen.append)
    assert seen == trials
    single, _, gathered = trials
    assert single.messages_per_second >= 0.99 * single.tokens_per_second
    assert gathered.messages_per_second < 0.5 * gathered.tokens_per_second
    assert all(trial.kept and trial.tokens_per_core > 0 for trial in trials)
    print_frontend(trials)
    assert "gathered" in capsys.readouterr().out
    save_frontend(trials, tmp_path / "f.json")
    plot_frontend(trials, tmp_path / "f.png")
    assert [row["mode"] for row in json.loads((tmp_path / "f.json").read_text())] == list(frontend.MODES)
    assert (tmp_path / "f.png").stat().st_size > 1000
