"""What a plan makes of a batch, and of the traffic that it was made for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsrpc.batch import outlook as module
from hsrpc.batch.efficiency import Efficiency
from hsrpc.batch.outlook import Load, Outlook, outlook
from hsrpc.plan.prediction import predict_traffic
from hsrpc.plan.roofline import StepRecord, roofline
from tests.plan.test_outlook import RESIDENT, SIZES, STREAMING, ask

LOAD = Load(requests=1000, prompt_tokens=100_000, output_tokens=60_000, longest=500)


def look(settings: dict[str, object], load: Load = LOAD, *, with_advice: bool = False) -> Outlook:
    question, _, plan = ask(settings)
    return outlook(question, SIZES, plan, load, with_advice=with_advice)


def test_a_load_in_tokens():
    """On average; a request holds its prompt and half of its output while it runs."""
    assert (LOAD.prompt, LOAD.output, LOAD.context) == (100, 60, 130)


@pytest.mark.parametrize("settings", [STREAMING, RESIDENT], ids=["streaming", "resident"])
def test_the_traffic_that_a_plan_was_made_for(settings):
    """Takes the time that the plan predicts."""
    _, planner, plan = ask(settings)
    found = predict_traffic(plan, SIZES, planner.traffic)
    assert found.step == pytest.approx(plan.prediction.step, rel=0.01)
    assert found.mean_step == pytest.approx(plan.prediction.mean_step, rel=0.02)


def test_settings_for_the_load():
    """Those that nobody gave; with them it takes less time, and planning so predicts that."""
    found = look(STREAMING)
    assert found.settings == {"expected_context": 130, "expected_output": 60}
    assert found.seconds_with_settings < found.seconds
    again = look(STREAMING | found.settings)
    assert (again.settings, again.seconds) == ({}, pytest.approx(found.seconds_with_settings, rel=0.01))


def test_a_prefix_that_the_load_shares():
    """It takes less time, and less still where the planner counts on it; none where nothing is to be shared."""
    load = replace(LOAD, prompt_tokens=500_000, shared_tokens=999 * 400)
    assert load.shared == 400
    alone, found = look(STREAMING, replace(load, shared_tokens=0)), look(STREAMING, load)
    assert found.seconds < alone.seconds
    assert found.settings["expected_shared_prefix"] == 400
    assert found.seconds_with_settings < found.seconds
    assert "expected_shared_prefix" not in look(STREAMING | {"prefix_cache": False}, load).settings


def test_settings_that_hardly_matter_are_not_told():
    """A model on the device, with few requests, does as well without."""
    found = look(RESIDENT)
    assert (found.settings, found.seconds_with_settings) == ({}, found.seconds)


def test_few_requests_run_at_once():
    """No more than there are."""
    load = replace(LOAD, requests=3, prompt_tokens=300, output_tokens=180)
    assert look(STREAMING, load).batch == 3


def test_advice_goes_beyond_the_settings(monkeypatch):
    """It is asked for, or none; what it compares with is the plan for the load."""
    asked = []
    monkeypatch.setattr(module, "advise", lambda question, _, plan: asked.append((question, plan)) or [])
    assert look(STREAMING).advice is None
    found = look(STREAMING, with_advice=True)
    [(question, plan)] = asked
    assert (question.config.expected_context, question.config.expected_output) == (130, 60)
    assert (plan.prediction.context, found.advice) == (130, [])


def record(seconds: float, requests: int) -> StepRecord:
    return StepRecord(
        seconds=seconds,
        num_requests=requests,
        decode_tokens=requests,
        prefill_tokens=0,
        context_tokens=100 * requests,
        weight_bytes=10**8,
        cache_bytes=0,
        regenerated_tokens=0,
    )


def test_the_share_of_the_limit():
    """Over all steps from the beginning on; requests count for as long as they ran."""
    _, _, plan = ask(STREAMING)
    found = Efficiency()
    found(record(1.0, 2))
    assert (found.share, found.mean_batch) == (None, 0.0)
    found.begin(SIZES, plan.hardware, absorbs=False)
    for each in (record(1.0, 2), record(3.0, 6)):
        found(each)
    limit = sum(roofline(each, SIZES, plan.hardware).seconds for each in (record(1.0, 2), record(3.0, 6)))
    assert found.share == pytest.approx(limit / 4)
    assert found.mean_batch == 5.0
