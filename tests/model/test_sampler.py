"""Sampling: exact sets, right distribution, and rows that do not depend on each other."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hsrpc.device.device import CpuDevice
from hsrpc.model.logits import edit, uniforms
from hsrpc.model.sampler import Sampled, Sampler
from hsrpc.request import SamplingParams
from hsrpc.schedule.step import SamplingRow

VOCAB = 60
GREEDY = SamplingParams(temperature=0.0)


def row(
    params: SamplingParams = GREEDY,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    seed: int = 0,
    eos: tuple[int, ...] = (),
) -> SamplingRow:
    """With the tokens where a penalty asks for them, as the scheduler makes it."""
    token_ids = array("q", [*prompt, *output]) if params.has_penalties else ()
    return SamplingRow(params, len(prompt), len(output), seed, frozenset(eos), token_ids)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits: Tensor, rows: list[SamplingRow]) -> list[Sampled]:
    return Sampler(CpuDevice().fetch).launch(logits, rows).result()


def token_ids(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    return [sampled.token_id for sampled in sample(logits, rows)]


def edited(logits: np.ndarray, request: SamplingRow) -> np.ndarray:
    """Bias, penalties and exclusions, token by token."""
    params, values = request.params, logits.astype(np.float64).copy()
    for token_id, bias in params.logit_bias.items():
        values[token_id] += bias
    for token_id in {*request.prompt_token_ids, *request.output_token_ids}:
        if values[token_id] > 0:
            values[token_id] /= params.repetition_penalty
        else:
            values[token_id] *= params.repetition_penalty
    for token_id in request.output_token_ids:
        values[token_id] -= params.frequency_penalty
    for token_id in set(request.output_token_ids):
        values[token_id] -= params.presence_penalty
    if request.num_output_tokens < params.min_tokens:
        values[[*request.eos_token_ids, *request.params.stop_token_ids]] = -math.inf
    return values


def distribution(logits: np.ndarray, request: SamplingRow) -> dict[int, float]:
    """Token to probability: temperature, then min-p, top-k and top-p, each on what the one before left."""
    params = request.params
    values = edited(logits, request) / params.temperature
    weights = {token_id: math.exp(value - values.max()) for token_id, value in enumerate(values)}
    kept = [token_id for token_id in sorted(weights, key=lambda t: -weights[t]) if weights[token_id] >= params.min_p]
    kept = kept[: params.top_k or None]
    total, mass, nucleus = sum(weights[token_id] for token_id in kept), 0.0, []
    for token_id in kept:
        if mass < params.top_p * total or params.top_p == 1.0:
            nucleus.append(token_id)
        mass += weights[token_id]
    total = sum(weights[token_id] for token_id in nucleus)
    return {token_id: weights[token_id] / total for token_id in nucleus if weights[token_id] > 0}


FILTERS = {
    "all": SamplingParams(),
    "temperature": SamplingParams(temperature=0.4),
    "top-k": SamplingParams(top_k=5),
    "top-k-1": SamplingParams(top_k=1),
    "top-k-beyond-the-vocabulary": SamplingParams(top_k=5000),
    "top-p": SamplingParams(top_p=0.7),
    "top-p-least": SamplingParams(top_p=1e-9),
    "min-p": SamplingParams(min_p=0.1),
    "top-k-top-p": SamplingParams(top_k=12, top_p=0.6),
    "every-filter": SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
}


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS)
def test_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    """20,000 seeds: no token outside the set, and a chi-square within 5 standard deviations of its mean."""
    draws, logits = 20_000, random_logits(1)
    expected = distribution(logits[0].numpy(), row(params))
    rows = [row(params, seed=seed) for seed in range(draws)]
    counts = np.bincount(token_ids(logits.expand(draws, -1), rows), minlength=VOCAB)
    assert {int(token_id) for token_id in counts.nonzero()[0]} <= set(expected)
    # Tokens that are expected less than 5 times are counted as one.
    common = [token_id for token_id in expected if expected[token_id] * draws >= 5]
    observed = np.array([counts[token_id] for token_id in common] + [draws - sum(counts[t] for t in common)])
    wanted = np.array([expected[token_id] * draws for token_id in common])
    wanted = np.append(wanted, max(draws - wanted.sum(), 1e-6))
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    assert chi_square <= len(common) + 5 * math.sqrt(2 * len(common))


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("chunk_elements", [1, 4 * VOCAB, 2**22])
def test_filters_keep_exactly_the_reference_set(params: SamplingParams, chunk_elements: int) -> None:
    """Every token of the reference set is drawn, and no other, in logits flat enough for all to be drawn."""
    for seed in range(5):
        logits = random_logits(1, seed, vocab=12) * 0.15
        expected = distribution(logits[0].numpy(), row(params))
        rows = [row(params, seed=draw) for draw in range(600)]
        sampler = Sampler(CpuDevice().fetch, chunk_elements)
        drawn = {s.token_id for s in sampler.launch(logits.expand(600, -1), rows).result()}
        assert drawn == set(expected)


def test_equally_probable_tokens_at_the_border_are_all_kept() -> None:
    """Top-k 2 of four equal tokens chooses among the four, whatever the device's order of equal values."""
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 5.0, 0.0]]).expand(200, -1)
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        assert set(token_ids(logits, [row(params, seed=seed) for seed in range(200)])) == {1, 2, 3, 4}


EDITS = {
    "bias": row(SamplingParams(temperature=0.0, logit_bias={3: 50.0, 7: -100.0})),
    "repetition": row(SamplingParams(temperature=0.0, repetition_penalty=1.8), (1, 2, 2, 3), (4, 4)),
    "repetition-below-1": row(SamplingParams(temperature=0.0, repetition_penalty=0.5), (1, 2), (4,)),
    "presence": row(SamplingParams(temperature=0.0, presence_penalty=1.5), (1, 2), array("q", [5, 5, 6])),
    "frequency": row(SamplingParams(temperature=0.0, frequency_penalty=-0.7), (1, 2), (5, 5, 6)),
    "min-tokens": row(SamplingParams(temperature=0.0, min_tokens=2), output=(1,), eos=(0, 5, 9)),
    "min-tokens-reached": row(SamplingParams(temperature=0.0, min_tokens=1), output=(1,), eos=(0, 5, 9)),
    "every-edit": row(
        SamplingParams(
            temperature=0.0,
            logit_bias={3: 2.0},
            repetition_penalty=1.3,
            presence_penalty=1.0,
            frequency_penalty=0.5,
            min_tokens=9,
        ),
        (1, 2, 3, 10, 11),
        (3, 4, 4, 20),
        eos=(8, 30),
    ),
    "none": row(),
}


def test_edits_equal_the_reference() -> None:
    """Rows with different edits, in one batch: each row's logits are as if it were edited token by token."""
    rows = [*EDITS.values()] * 3
    logits = random_logits(len(rows))
    expected = [edited(values.numpy(), request) for values, request in zip(logits, rows, strict=True)]
    assert edit(logits, rows).numpy() == pytest.approx(np.stack(expected), abs=1e-5)


def test_greedy_rows_choose_by_their_edited_logits() -> None:
    """Each row in a batch chooses the most probable token of its own edited logits; the given ones stay as they are."""
    rows = [*EDITS.values()] * 20
    logits = random_logits(len(rows))
    before = logits.clone()
    expected = [int(edited(values.numpy(), request).argmax()) for values, request in zip(logits, rows, strict=True)]
    assert token_ids(logits, rows) == expected
    assert torch.equal(logits, before)


def test_edits_come_before_the_draw() -> None:
    """A drawn row with every edit and filter chooses among the reference's tokens, and chooses all of them."""
    params = SamplingParams(
        temperature=2.0, top_k=6, repetition_penalty=1.3, presence_penalty=1.0, logit_bias={3: 4.0}, min_tokens=9
    )
    logits = random_logits(1)
    rows = [row(params, (1, 2), (3, 4, 4), seed, (0, 8)) for seed in range(500)]
    assert set(token_ids(logits.expand(500, -1), rows)) == set(distribution(logits[0].numpy(), rows[0]))


def test_greedy_is_argmax() -> None:
    """Temperature 0: the most probable token, the first of equal ones."""
    logits = random_logits(50)
    logits[0, [4, 9]] = 100.0
    assert token_ids(logits, [row()] * 50) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    """No overflow, however small the temperature."""
    logits = random_logits(20) * 1000
    rows = [row(SamplingParams(temperature=temperature), seed=seed) for seed in range(20)]
    assert token_ids(logits, rows) == logits.argmax(dim=-1).tolist()


def test_a_row_does_not_depend_on_the_batch() -> None:
    """Alone, in any order and beside any other rows: the same token and logprob."""
    kinds = [*FILTERS.values(), SamplingParams(logprobs=3), *(request.params for request in EDITS.values())]
    rows = [row(kind, (1, 2, 3), (4, 5), seed) for seed, kind in enumerate(kinds * 3)]
    logits = random_logits(len(rows))
    alone = [sample(logits[index : index + 1], [request])[0] for index, request in enumerate(rows)]
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = sample(logits[torch.from_numpy(order)], [rows[index] for index in order])
    assert [shuffled[place] for place in np.argsort(order)] == alone


def test_a_preempted_request_goes_on_with_the_same_tokens() -> None:
    """The draw depends on the seed and the number of output tokens, not on the sampler's past or the steps between."""
    params, logits = SamplingParams(), random_logits(8)

    def go_on(sampler: Sampler, output: list[int], steps: int, beside: int) -> None:
        for _ in range(steps):
            rows = [row(SamplingParams(top_p=0.5), seed=seed) for seed in range(beside)]
            rows.append(row(params, output=tuple(output), seed=7))
            output.append(sampler.launch(logits[len(output)].expand(len(rows), -1), rows).result()[-1].token_id)

    whole: list[int] = []
    go_on(Sampler(CpuDevice().fetch), whole, 8, beside=0)
    resumed: list[int] = []
    go_on(Sampler(CpuDevice().fetch), resumed, 3, beside=5)
    go_on(Sampler(CpuDevice().fetch), resumed, 5, beside=2)
    assert resumed == whole


def test_every_output_position_and_seed_draws_anew() -> None:
    """30 positions of one request choose many of 60 equal tokens, and so do 30 seeds."""
    rows = [row(SamplingParams(), output=(0,) * length, seed=7) for length in range(30)]
    assert len(set(token_ids(torch.zeros(30, VOCAB), rows))) > 15
    rows = [row(SamplingParams(), seed=seed) for seed in range(30)]
    assert len(set(token_ids(torch.zeros(30, VOCAB), rows))) > 15


def test_uniform_numbers_are_uniform_over_seeds_and_positions() -> None:
    """Neighbouring seeds and neighbouring positions: even tenths, and no correlation."""
    seeds, positions = np.meshgrid(np.arange(300), np.arange(300))
    grid = uniforms(seeds.ravel().tolist(), positions.ravel().tolist()).reshape(300, 300)
    tenths = np.bincount((grid * 10).astype(int).ravel(), minlength=10)
    assert abs(tenths - 9000).max() < 450  # 5 standard deviations
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert np.unique(uniforms([2**64 - 1, 2**63, 0], [0, 0, 0])).size == 3


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(top_p=0.9, logprobs=2), SamplingParams(temperature=0.0, repetition_penalty=1.2)]
)
def test_a_row_with_bad_logits_fails_alone(poison: float, params: SamplingParams) -> None:
    """NaN or infinity in one row: that row has no token, the others are as without it."""
    logits = random_logits(5)
    rows = [row(params, (1,), (2,), seed) for seed in range(5)]
    expected = sample(logits, rows)
    logits[2, 17] = poison
    assert sample(logits, rows) == [*expected[:2], Sampled(-1, None, failed=True), *expected[3:]]


def test_a_row_of_minus_infinity_fails_and_one_with_a_few_does_not() -> None:
    """Tokens that the model excludes are never drawn; if it excludes all of them, the row fails."""
    logits = torch.full((40, VOCAB), -math.inf)
    logits[1:, [3, 8]] = 1.0
    sampled = sample(logits, [row(SamplingParams(top_p=0.99), seed=seed) for seed in range(40)])
    assert sampled[0].failed
    assert {s.token_id for s in sampled[1:]} == {3, 8}


def test_exclusions_that_leave_nothing_are_dropped() -> None:
    """min_tokens with every token an end token: the row keeps them rather than fail."""
    logits = random_logits(2)
    params = SamplingParams(temperature=0.0, min_tokens=5)
    rows = [row(params, eos=tuple(range(VOCAB))), row(params, eos=(int(logits[1].argmax()),))]
    assert token_ids(logits, rows) == [int(logits[0].argmax()), int(logits[1].argsort()[-2])]


class Allows:
    """A matcher that allows these tokens; its mask has bits for more tokens than the model."""

    failure = None

    def __init__(self, *token_ids: int) -> None:
        self._token_ids = token_ids

    def push(self, token_id: int) -> None:
        raise AssertionError("sampling follows no tokens")

    def allowed(self, num_drafted: int = 0) -> np.ndarray:
        bits = np.zeros(96, dtype=np.uint8)
        bits[list(self._token_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.parametrize("chunk_elements", [VOCAB, 2**22])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.9)])
def test_constrained_rows_have_what_they_may(params: SamplingParams, chunk_elements: int) -> None:
    """Each its own tokens, in whatever chunks; rows beside them are as without them."""
    logits = random_logits(6)
    rows = [row(params, seed=seed) for seed in range(6)]
    free = token_ids(logits, rows)
    allowed = [(0, 31), (32,), (7, 59, 70)]
    rows[::2] = [made._replace(matcher=Allows(*ids)) for made, ids in zip(rows[::2], allowed, strict=True)]
    found = Sampler(CpuDevice().fetch, chunk_elements).launch(logits, rows).result()
    assert all(sampled.token_id in ids for sampled, ids in zip(found[::2], allowed, strict=True))
    assert [sampled.token_id for sampled in found[1::2]] == free[1::2]
    if params.is_greedy:
        assert found[0].token_id == max(allowed[0], key=lambda token_id: float(logits[0, token_id]))


def test_a_constraint_comes_before_other_exclusions_and_after_biases() -> None:
    """An end token that it alone allows is not excluded; no bias brings back what it excludes."""
    params = SamplingParams(temperature=0.0, min_tokens=5, logit_bias={9: 100.0}, repetition_penalty=2.0)
    rows = [row(params, (4,), eos=(2,))._replace(matcher=Allows(*ids)) for ids in [(2,), (2, 4)]]
    assert token_ids(random_logits(2), rows) == [2, 4]


def test_a_constraint_that_leaves_nothing_fails_its_row_alone() -> None:
    """Whether it allows no token, none of the model's, or only some that the model excludes."""
    logits = random_logits(4)
    logits[2, 5] = -math.inf
    rows = [row(params)._replace(matcher=Allows(*ids)) for params in (GREEDY, SamplingParams()) for ids in [(), (70,)]]
    assert [each.failed for each in sample(logits, rows)] == [True] * 4
    rows = [row(), row(), row()._replace(matcher=Allows(5)), row()]
    assert [each.failed for each in sample(logits, rows)] == [False, False, True, False]


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    """Such ids touch no other row's logits."""
    params = SamplingParams(temperature=0.0, min_tokens=9, logit_bias={VOCAB: 100.0, -1: 100.0}, presence_penalty=2.0)
    logits = random_logits(3)
    rows = [row(params, (VOCAB + 1,), (VOCAB, 5 * VOCAB), eos=(VOCAB + 2,))] * 3
    assert token_ids(logits, rows) == logits.argmax(dim=-1).tolist()


def test_logprobs_are_of_the_raw_logits() -> None:
    """Chosen token, rank and the most probable ones, whatever the edits and filters."""
    logits = random_logits(3)
    params = SamplingParams(temperature=0.0, logit_bias={11: 100.0}, logprobs=4)
    rows = [row(params), row(), row(SamplingParams(temperature=0.0, logprobs=0))]
    expected = torch.log_softmax(logits.double(), dim=-1)
    first, second, third = sample(logits, rows)
    assert first.logprob is not None
    assert third.logprob is not None
    assert (first.token_id, first.logprob.token_id) == (11, 11)
    assert first.logprob.logprob == pytest.approx(float(expected[0, 11]), abs=1e-5)
    assert first.logprob.rank == int((expected[0] > expected[0, 11]).sum()) + 1
    assert [token_id for token_id, _ in first.logprob.top] == expected[0].argsort(descending=True)[:4].tolist()
    best = expected[0].sort(descending=True).values[:4].tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(best, abs=1e-5)
    assert second.logprob is None
    assert (third.logprob.rank, third.logprob.top) == (1, ())


def test_rows_and_logits_must_agree() -> None:
    """One row for each row of logits; none is fine."""
    assert sample(torch.zeros(0, VOCAB), []) == []
    with pytest.raises(ValueError, match="rows: 1 for 2 rows of logits"):
        sample(random_logits(2), [row()])
