"""Plans for requests that draft: what a drafted token costs, how many pay, and what there is room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hsrpc.config import EngineConfig
from hsrpc.draft.acceptance import Acceptance
from hsrpc.draft.allocation import Draftable, allocate
from hsrpc.engine.startup import plan_for as plan_on
from hsrpc.errors import ConfigError
from hsrpc.plan.device_memory import sampled_at_once
from hsrpc.plan.draft_choice import plan_drafts
from hsrpc.plan.drafting import Drafting, DraftTime
from hsrpc.plan.fitted import PACKED_QUERIES
from hsrpc.plan.known_machines import KNOWN_MACHINES
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.plan.plan import Plan
from hsrpc.plan.prediction import predict_at
from hsrpc.plan.sizes import ExpertSizes
from hsrpc.plan.step_time import Candidates, StepModel, StepTimes
from tests.plan.test_search import GIB, OPT, plan_for
from tests.plan.test_step_time import (
    BATCH,
    CONTEXT,
    EVEN,
    LAYER,
    LAYERS,
    RESIDENT,
    SIZES,
    STREAMED,
    TRAFFIC,
)

DRAFTS, ROWS = 7, 8 * BATCH


def streaming(batch: int, **settings: object) -> Plan:
    """Half of OPT-13B streams."""
    lengths = {"max_model_len": 640, "max_batch": batch, "min_batch": batch}
    return plan_for(OPT["13b"], 24 * GIB, resident_share=0.5, **lengths, **settings)


def resident(batch: int, **settings: object) -> Plan:
    """OPT-6.7B on the device with all its cache."""
    lengths = {"max_model_len": 640, "max_batch": batch, "min_batch": batch}
    return plan_for(OPT["6.7b"], 139 * GIB, resident_share=1.0, **lengths, **settings)


SHAPE = {streaming: OPT["13b"], resident: OPT["6.7b"]}


def predict(candidate: Candidates, drafts: float, acceptance: float = 0.5) -> StepTimes:
    return StepModel(SIZES, EVEN, replace(TRAFFIC, acceptance=acceptance)).predict(replace(candidate, drafts=drafts))


@pytest.mark.parametrize(("drafts", "acceptance", "tokens"), [(0, 0.7, 1), (3, 0, 1), (3, 1, 4), (2, 0.5, 1.75)])
def test_what_is_accepted_and_one_more(drafts: int, acceptance: float, tokens: float) -> None:
    """A drafted token counts if those before it do: 1 + p + p^2 and so on."""
    assert replace(TRAFFIC, acceptance=acceptance).tokens_per_step(drafts) == pytest.approx(tokens)


def test_a_drafted_token_is_a_row_more_and_no_byte_more() -> None:
    """By hand, on a machine of bytes and FLOP alone: OPT-6.7B, 64 requests of 512 tokens, activations on the host."""
    times, alone = predict(STREAMED, DRAFTS), predict(STREAMED, 0)
    assert times.bus == alone.bus
    assert times.regenerate == alone.regenerate
    read, compute = LAYER.weight_bytes / EVEN.memory_bandwidth, ROWS * LAYER.flop(1) / EVEN.gemm_rate
    assert alone.forward < times.forward
    assert LAYERS * max(read, compute) <= times.forward <= LAYERS * 1.3 * max(read, compute)
    cached = BATCH * CONTEXT * LAYER.kv.num_bytes / EVEN.memory_bandwidth
    padded = BATCH * PACKED_QUERIES * LAYER.attention_flop(CONTEXT) / EVEN.gemm_rate
    assert times.attention == pytest.approx(LAYERS * max(cached, padded))
    head = SIZES.vocab_size * SIZES.hidden_size
    assert times.head == pytest.approx(
        max(8 * head * SIZES.compute_bytes / EVEN.memory_bandwidth, ROWS * 2 * head / EVEN.gemm_rate)
        + ROWS * 8 * SIZES.vocab_size / EVEN.memory_bandwidth
    )
    assert times.tokens_per_request == pytest.approx(sum(0.5**j for j in range(DRAFTS + 1)))
    assert times.prefill == pytest.approx(times.tokens_per_request * alone.prefill)
    assert alone.prefill == predict(replace(STREAMED, chunk=2048), 0).prefill > 0


def test_rows_of_a_mini_batch_hold_the_drafts() -> None:
    """In buffers that the cached tokens and one new one of each fill to the last row, drafts take another."""
    full = replace(STREAMED, rows=BATCH * (CONTEXT + 1) / 4)
    assert (predict(full, 0).mini_batches, predict(full, 1).mini_batches) == (4, 5)


def test_what_lies_on_the_device_is_copied_for_several_queries() -> None:
    """Requests that do not lie there as a whole pay for it; the others' drafts are single queries, read in place."""
    partly, alone = (predict(replace(RESIDENT, on_device=0.75), drafts) for drafts in (DRAFTS, 0))
    assert alone.gather == 0
    copied = 0.75 * BATCH * CONTEXT * 2 * LAYER.kv.num_bytes / EVEN.memory_bandwidth
    assert partly.gather == pytest.approx(LAYERS * copied)
    shared = StepModel(SIZES, EVEN, replace(TRAFFIC, shared=384))
    for on_device in (0.75, 1.0):
        found = shared.predict(replace(RESIDENT, drafts=DRAFTS, on_device=on_device))
        assert (found.gather > 0) == (on_device < 1)


def test_drafts_in_place_are_single_queries() -> None:
    """Nothing is copied, no rows of buffers are taken, and each query reads what its request has cached."""
    few_rows = replace(RESIDENT, rows=ROWS / 4)
    times, alone = predict(few_rows, DRAFTS), predict(few_rows, 0)
    assert (times.gather, times.mini_batches, times.launch) == (0, 1, 0)
    assert times.attention == pytest.approx((1 + DRAFTS) * alone.attention)
    between = EVEN.boundary_time + BATCH * EVEN.request_time
    gpu = times.forward + times.attention + times.head
    assert times.step == pytest.approx(gpu + between)  # nothing is launched ahead of it
    rebuilt = predict(replace(few_rows, device_share=0.5), DRAFTS)  # not as single queries read
    assert rebuilt.gather > 0


def test_drafts_take_more_experts() -> None:
    """Where these come on demand: 8 times the tokens touch more of 64, of which each takes 4."""
    names = frozenset(tensor.name for tensor in LAYER.tensors[:1])
    experts = ExpertSizes(count=64, k=4, names=names, num_elements=1000, device_bytes=2000)
    model = StepModel(replace(SIZES, layers=(replace(LAYER, experts=experts),) * LAYERS), EVEN, TRAFFIC)
    one = replace(STREAMED, batch=1, on_demand=1.0, missed=1.0)
    few, many = (model.predict(replace(one, drafts=drafts)).experts for drafts in (0, DRAFTS))
    touched = [64 * (1 - (1 - 4 / 64) ** tokens) for tokens in (1, 8)]
    loaded = [LAYERS * count * model.sizes.layers[0].expert_bus_bytes / EVEN.load_bandwidth for count in touched]
    assert many - few == pytest.approx(loaded[1] - loaded[0])
    assert touched[1] > 6 * touched[0]


@pytest.mark.parametrize(("batch", "drafts"), [(1, 15), (64, 7)])
def test_where_the_bus_binds_drafts_are_nearly_for_nothing(batch: int, drafts: int) -> None:
    """At the same batch, for hardly any time of a step; and the plan says how many rows are free."""
    plan, alone = (streaming(batch, max_draft_tokens=each) for each in ("auto", 0))
    assert (alone.max_draft_tokens, alone.drafts.reason, alone.drafts.price) == (0, "", None)
    assert (plan.max_draft_tokens, plan.max_batch) == (drafts, alone.max_batch)
    assert plan.prediction.tokens_per_second > 1.9 * alone.prediction.tokens_per_second  # tau is 2
    assert f"up to {drafts} tokens a request: " in plan.drafts.reason
    assert "rows that the GPU computes in the time of a step" in plan.drafts.reason
    assert plan.prediction.bus > plan.prediction.gpu


def test_where_all_is_resident_drafts_cost_what_they_read() -> None:
    """One request's are nearly for nothing, since a step reads all weights for it; of 64 each reads its own cache.

    If half of the tokens are right, that is; whoever asks for drafts is told.
    """
    one, alone = (resident(1, max_draft_tokens=each) for each in ("auto", 0))
    assert one.max_draft_tokens > 0
    assert one.prediction.tokens_per_second > 1.3 * alone.prediction.tokens_per_second
    plan = resident(64, max_draft_tokens="auto")
    assert (plan.max_draft_tokens, plan.drafts.price) == (0, None)
    assert plan.drafts.reason.startswith("off: model and cache are on the device")
    asked = resident(64, max_draft_tokens=3)
    assert asked.max_draft_tokens == 3
    assert "up to 3 tokens a request, as asked, though that is predicted not to pay" in asked.drafts.reason


def test_drafts_have_room() -> None:
    """Queries of a mini-batch, hidden states of a step, blocks to grow into; all of it within the budget."""
    plan, alone = (streaming(64, max_draft_tokens=drafts) for drafts in (15, 0))
    more = [each.device_bytes[DeviceUse.HIDDEN_STATES] // (2 * OPT["13b"].hidden_bytes) for each in (plan, alone)]
    assert plan.buffers.queries - alone.buffers.queries >= 15 * 64
    assert more[0] - more[1] >= 15 * 64
    assert sum(plan.device_bytes.values()) <= 24 * GIB


def test_logits_are_sampled_in_parts() -> None:
    """A step's drafts take no more memory for them than a batch without, or than a few rows."""
    assert sampled_at_once(200, 0) == sampled_at_once(200, 15) == 200
    assert [sampled_at_once(3, drafts) for drafts in (0, 1, 30)] == [3, 6, 64]


@pytest.mark.parametrize("make", [streaming, resident])
@pytest.mark.parametrize("batch", [1, 64])
def test_the_price_is_that_of_the_prediction(make: Callable[..., Plan], batch: int) -> None:
    """What allocation counts on is what the plan predicts, within a few percent, whatever bounds the step."""
    plan = make(batch, max_draft_tokens=15)
    price, context, sizes = plan.drafts.price, plan.prediction.context, SHAPE[make]
    assert price is not None
    assert price.max_rows == 15 * batch
    for drafts in (0, 1, 7, 15):
        predicted = predict_at(plan, sizes, context, drafting=Drafting(drafts)).step
        assert float(price.seconds(np.array(drafts * batch), drafts)) == pytest.approx(predicted, rel=0.08)


def test_a_draft_model_takes_its_time() -> None:
    """A pass for each token, which adds to a step of a model that is resident, and to the price of its drafts."""
    time = DraftTime(first=0.002, each=0.001, request=1e-5)
    assert time.seconds(64, 0) == 0
    assert time.seconds(64, 3) == pytest.approx(0.002 + 3 * 0.00164)
    model = StepModel(SIZES, EVEN, replace(TRAFFIC, draft_time=time))
    for drafts in (0, 3):
        candidate = replace(RESIDENT, drafts=drafts)
        assert model.predict(candidate).step - predict(candidate, drafts).step == pytest.approx(
            time.seconds(BATCH, drafts)
        )
    slow = DraftTime(first=0.001, each=0.02)
    plan, sizes = resident(1, max_draft_tokens=15), OPT["6.7b"]
    found = [plan_drafts(plan, sizes, Drafting(15, 0.7, each), is_given=True).price for each in (DraftTime(), slow)]
    without, price = (each for each in found if each is not None)
    assert (without.token_seconds, price.token_seconds) == (0, pytest.approx(slow.each))
    predicted = predict_at(plan, sizes, plan.prediction.context, drafting=Drafting(7, 0.7, slow)).step
    assert float(price.seconds(np.array(7), 7)) == pytest.approx(predicted, rel=0.01)
    lengths = {allocate([Draftable(Acceptance(0.7, 0), 15)], each)[0] for each in (without, price)}
    assert len(lengths) == 2
    off = plan_drafts(plan, sizes, Drafting(0, 0.7, slow), is_given=False).reason
    assert off.endswith("the draft model alone takes 21 ms for a token of each, and 20 ms for every later one")


@pytest.mark.parametrize("drafts", [-1, 65, True, 1.5, "many"])
def test_what_cannot_be_drafted_is_refused(drafts: object) -> None:
    with pytest.raises(ConfigError, match="give 0 to 64, or auto") as raised:
        EngineConfig(max_draft_tokens=drafts)
    assert raised.value.field == "max_draft_tokens"
    with pytest.raises(ConfigError, match=r"outside \[0, 1\]"):
        EngineConfig(expected_acceptance=1.5)


def test_three_tokens_a_step_are_nearly_three_times_as_fast() -> None:
    """OPT-13B in 24 GiB of an H200, as it is known: 64 requests, 15 drafted tokens of which tau is 3."""
    given = {"gpu_memory": "24GiB", "host_memory": "110GiB", "model": "random:opt-13b", "weight_coding": "none"}
    given |= {"expected_context": 576, "expected_output": 128, "expected_acceptance": 0.6668}
    given |= {"max_model_len": 640, "max_batch": 64, "min_batch": 64, "resident_share": 0.8}

    def rate(drafts: int) -> tuple[float, Plan]:
        plan = plan_on(KNOWN_MACHINES["h200"], EngineConfig(max_draft_tokens=drafts, **given)).plan
        return plan.prediction.tokens_per_second, plan

    (alone, _), (drafting, plan) = rate(0), rate(15)
    assert plan.prediction.tokens_per_request == pytest.approx(3, rel=0.01)
    assert drafting > 2.7 * alone
