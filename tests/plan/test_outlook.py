"""What a plan lets expect: rates by batch, first tokens, and changes that would help."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsrpc.config import EngineConfig
from hsrpc.plan.advice import Advice, advise
from hsrpc.plan.forecast import first_token, longest_step, rates_by_batch
from hsrpc.plan.known_machines import KNOWN_MACHINES
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.question import Question
from tests.plan.test_plan import GIB, SMALL, make_sizes

SIZES = make_sizes(num_layers=6, hidden=2048, heads=16, ffn=8192, vocab=5000)
STREAMING = {"gpu_memory": "500MiB", "host_memory": "4GiB", "max_model_len": 1024, "max_batch": 64}
"""Little of the weights stays, and the cache lies on the host."""
SHORT = STREAMING | {"host_memory": "1GiB"}
"""The host has room for a part of the requests."""
RESIDENT = {"gpu_memory": "20GiB", "host_memory": "4GiB", "max_model_len": 1024, "max_batch": 8}


def ask(settings: dict[str, object], sizes=SIZES) -> tuple[Question, Planner, Plan]:
    """A question on an RTX 3090, and its answer."""
    question = Question(choices=(sizes,), machine=KNOWN_MACHINES["rtx3090"], config=EngineConfig(**settings))
    return question, *question.answer()


def by_name(question: Question, plan: Plan) -> dict[str, Advice]:
    """Advice by the first words of its name, where they tell enough."""
    return {advice.name.split(",")[0]: advice for advice in advise(question, question.choices[0], plan)}


def test_rates_are_those_of_the_plan_with_fewer_requests():
    """1, 4, 16 and so on, and the batch itself; more requests are never slower together."""
    _, _, plan = ask(STREAMING)
    steps = rates_by_batch(plan, SIZES)
    assert [step.batch for step in steps] == [1, 4, 16, *([64] if plan.max_batch == 64 else [plan.max_batch])]
    assert steps[1] == predict_at(plan, SIZES, plan.prediction.context, 4)
    rates = [step.tokens_per_second for step in steps]
    assert rates == sorted(rates)
    one = replace(plan, max_batch=1)
    assert [step.batch for step in rates_by_batch(one, SIZES)] == [1]


def test_an_idle_server_computes_a_prompt_in_as_long_as_its_products_or_the_weights_take():
    """Neither less, nor much more; where weights stream, the bus bounds a short prompt."""
    for settings in (STREAMING, RESIDENT):
        _, planner, plan = ask(settings)
        found, hardware = first_token(plan, SIZES, planner.traffic), plan.hardware
        flop = found.prompt * sum(layer.flop(1) for layer in SIZES.layers)
        bus = sum(layer.bus_bytes for layer in plan.placed) / hardware.load_bandwidth
        least = max(bus, flop / hardware.gemm_rate)
        assert found.prompt == planner.traffic.prompt
        assert least < found.idle < 2 * least
    assert bus == 0


def test_a_long_prompt_takes_several_steps():
    """As many as the plan lets one step compute of it, each of which loads the weights."""
    _, planner, plan = ask(STREAMING)
    once = first_token(plan, SIZES, planner.traffic)
    cut = replace(plan, max_idle_prefill_tokens=-(-once.prompt // 4))
    assert first_token(cut, SIZES, planner.traffic).idle > 1.5 * once.idle


def test_the_longest_step_is_of_prompts_beside_decoding_or_alone():
    """Whichever a plan lets a step compute more of."""
    _, planner, plan = ask(STREAMING)
    few, many = (replace(plan, max_idle_prefill_tokens=tokens) for tokens in (16, 100_000))
    assert longest_step(few, SIZES) == plan.prediction.longest_step
    at_once = replace(planner.traffic, prompt=100_000)
    assert longest_step(many, SIZES) == first_token(many, SIZES, at_once).idle > plan.prediction.longest_step


def test_under_load_a_first_token_waits_for_a_place_and_for_chunks():
    """The nearer the next end of a request, the shorter; a chunk of half the prompt takes two steps."""
    _, planner, plan = ask(STREAMING)
    found = first_token(plan, SIZES, planner.traffic)
    step = plan.prediction.mean_step
    waits = max(0.5, planner.traffic.output / (plan.max_batch + 1)) * step
    assert found.loaded >= waits + step
    assert found.loaded > found.idle
    shorter = replace(planner.traffic, output=1)
    assert first_token(plan, SIZES, shorter).loaded == pytest.approx(found.loaded - waits + 0.5 * step)
    whole, halved = (replace(plan, max_prefill_tokens=-(-found.prompt // chunks)) for chunks in (1, 2))
    more = first_token(halved, SIZES, planner.traffic).loaded - first_token(whole, SIZES, planner.traffic).loaded
    assert more == pytest.approx(max(step, plan.prediction.longest_step))


def test_advice_is_what_planning_again_finds():
    """All changes, as they were made by hand; the best comes first."""
    question, planner, plan = ask(SHORT)
    rate = plan.prediction.mean_tokens_per_second
    found = by_name(question, plan)
    changed = {"twice the device memory": {"gpu_memory": "1000MiB"}, "twice the host memory": {"host_memory": "2GiB"}}
    for name, settings in changed.items():
        _, _, again = ask(SHORT | settings)
        assert found[name].tokens_per_second == again.prediction.mean_tokens_per_second
        assert found[name].gain == pytest.approx(again.prediction.mean_tokens_per_second / rate - 1)
    hardware = question.machine.hardware
    bandwidths = {name: 2 * getattr(hardware, name) for name in ("load_bandwidth", "store_bandwidth")}
    faster = Planner(SIZES, planner.budgets, replace(hardware, **bandwidths), question.config).plan()
    assert found["a bus twice as fast"].tokens_per_second == faster.prediction.mean_tokens_per_second
    gains = [advice.gain for advice in found.values()]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.1


def test_smaller_weights_help():
    """4 bits more than 8, where weights are what streams; not weights that have as few."""
    question, planner, plan = ask(STREAMING)
    found = by_name(question, plan)
    assert found["weights of 4 bits"].gain > found["weights of 8 bits"].gain > 0
    layers = tuple(
        replace(layer, tensors=tuple(replace(each, bus_bytes=each.num_elements) for each in layer.tensors))
        for layer in planner.sizes.layers
    )
    in_bytes = replace(planner.sizes, layers=layers)
    names = {advice.name for advice in advise(replace(question, choices=(in_bytes,)), in_bytes, plan)}
    assert "weights of 4 bits" in names
    assert "weights of 8 bits" not in names


def test_a_bound_of_the_batch_is_named_only_where_it_binds():
    """Twice the bound is tried; a plan that stays below has no use for it."""
    question, _, plan = ask(RESIDENT)
    assert plan.max_batch == 8
    assert by_name(question, plan)["max_batch 16 in place of 8"].gain > 0.1
    question, _, plan = ask(SHORT)
    assert plan.max_batch < 64
    assert not any(name.startswith("max_batch") for name in by_name(question, plan))


def test_requests_stay_as_long_in_advice(monkeypatch):
    """Else a plan with more memory would take longer ones in place of being faster."""
    seen = []
    original = Question.answer
    monkeypatch.setattr(Question, "answer", lambda self: (seen.append(self.config.max_model_len), original(self))[1])
    question = Question(
        choices=(SMALL,), machine=KNOWN_MACHINES["rtx3090"], config=EngineConfig(gpu_memory=GIB, max_batch=4)
    )
    _, plan = original(question)
    advise(question, SMALL, plan)
    assert set(seen) == {plan.max_model_len}
