"""Replays of outputs that are known, and the prompts and tables of the measurement."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from itertools import cycle, islice

import pytest

from benchmarks import drafts_on_text, tables
from benchmarks.drafts_on_text import MAX_DRAFTED, PROMPTS, WAYS, Text, main, replay, step_seconds
from benchmarks.raw_results import Header, Record

HEADER = Header(commit="d88018c", command="a", date="2026-12-01", machine="a machine", torch="2.13")
LOOP = list(islice(cycle(range(10, 18)), 160))
PLAIN = list(range(1000, 1160))


def text(output: list[int], *, kind: str = "chat", prompt: list[int] | None = None, temperature: float = 0.0) -> Text:
    return Text(kind, temperature, prompt or [1, 2], output, "begins")


def test_there_are_six_prompts_of_each_kind():
    prompts = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]
    assert set(Counter(each["kind"] for each in prompts).values()) == {6}
    assert len({each["text"] for each in prompts}) == len(prompts) == 24


def test_loops_are_seen():
    """Few of their 4-grams are different."""
    assert text(PLAIN).distinct == 1
    assert text(LOOP).distinct == pytest.approx(8 / 157)
    assert text([5]).distinct == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_an_output_that_repeats_nothing_takes_a_step_a_token(way):
    [found] = replay(way, [text(PLAIN)], 7)
    assert (found.steps, found.drafted) == (160, 0)


def test_a_copy_takes_as_few_steps_as_drafts_allow():
    """Eight tokens a step of 7 drafted ones, as soon as two of the prompt's stand again."""
    [found] = replay(WAYS[0], [text(PLAIN, prompt=PLAIN)], 7)
    assert found.steps == 2 + 20


def test_only_requests_of_one_caller_learn_of_each_other():
    texts = [text(PLAIN, kind="chat"), text(PLAIN, kind="chat"), text(PLAIN, kind="summary")]
    alone, shared = WAYS[1:]
    assert [found.steps for found in replay(alone, texts, 7)] == [160] * 3
    first, second, other = (found.steps for found in replay(shared, texts, 7))
    assert first == other == 160
    assert second < 40


def test_temperatures_do_not_learn_of_each_other():
    """Outputs of the same prompt would be much alike."""
    texts = [text(PLAIN), text(PLAIN, temperature=0.8)]
    assert [found.steps for found in replay(WAYS[2], texts, 7)] == [160] * 2


def test_recorded_outputs_are_measured_without_the_model(tmp_path, monkeypatch, capsys):
    """And the tables are made of what is saved."""
    monkeypatch.setattr(drafts_on_text, "step_seconds", lambda *_, **__: 0.002)
    recorded, saved = tmp_path / "recorded.json", tmp_path / "drafts.json"
    recorded.write_text(json.dumps([text(LOOP), text(PLAIN), text(PLAIN, kind="summary", temperature=0.8)]))
    main(["--recorded", str(recorded), "--json", str(saved)])
    assert "2.0 ms" in capsys.readouterr().out
    record = Record("drafts/smollm2", HEADER, json.loads(saved.read_text())["result"])
    chat, summary = tables.drafts([record])
    assert chat[:4] == ("chat", "greedy", "320", "0.05 / 0.53 / 1.00")
    assert summary == ("summary", "0.8", "160", "1.00 / 1.00 / 1.00", *["1.00, 1.00, 1.00"] * 3)
    costs = list(tables.draft_costs([record]))
    assert len(costs) == len(WAYS) * len(MAX_DRAFTED)
    assert costs[0][0] == "n-gram"
    assert all(float(row[2]) > 1 and float(row[3]) <= float(row[2]) for row in costs)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_drafting_is_timed(way):
    assert step_seconds(way, [text(LOOP)], max_drafted=3, num_requests=2, length=100, steps=3) > 0
