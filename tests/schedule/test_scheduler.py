"""The scheduler on random traces, with pools that hold token ids: no request and no block is ever lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2s
from random import Random
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.blocks import Block, BlockManager, PoolId
from hsrpc.schedule.recompute import Choice, RecomputeLimits
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Output, Scheduler, SchedulerLimits
from hsrpc.schedule.step import BufferLimits, Chunk, MiniBatch, RowCosts, Rows, Scheduled
from hsrpc.schedule.windows import LayerWindows, first_visible, most_blocks
from tests.schedule.support import assemble, sampled

EOS = 0
VOCAB = 50
LIMITS = SchedulerLimits(
    max_batch=4,
    max_model_len=24,
    max_prefill_tokens=8,
    max_idle_prefill_tokens=8,
    block_size=4,
    buffers=BufferLimits(rows=24, activation_rows=24, queries=12),
    costs=RowCosts(1.0, 0.5, 0.1, 0.6),
)


def next_token(token_ids: list[int]) -> int:
    """The model: any function of all tokens so far."""
    return blake2s(bytes(token_ids), digest_size=1).digest()[0] % VOCAB


def generate(prompt: list[int], params: SamplingParams, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What a request alone gives, by definition."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not params.ignore_eos:
            return tokens, FinishReason.EOS
        if tokens[-1] in params.stop_token_ids:
            return tokens, FinishReason.STOP_TOKEN
        if len(tokens) - len(prompt) == params.max_tokens:
            return tokens, FinishReason.MAX_TOKENS
        if len(tokens) == max_model_len:
            return tokens, FinishReason.CONTEXT_LENGTH


class Harness:
    """A scheduler, pools that hold (position, token id) in each slot, and checks after every call."""

    def __init__(self, num_blocks: dict[PoolId, int], limits: SchedulerLimits) -> None:
        self.scheduler = Scheduler(BlockManager(num_blocks), limits, [EOS])
        self.limits = limits
        self.window = limits.windows.widest
        self.slots: dict[tuple[PoolId, int], tuple[int, int]] = {}
        self.requests: list[Request] = []
        self.prompts: list[list[int]] = []
        self.ended: dict[int, FinishReason] = {}
        """Reason by arrival, as the scheduler's outputs told."""
        self.step: Scheduled | None = None
        self.lengths: dict[int, int] = {}
        """Tokens by arrival, before the step."""
        self.random = Random(len(num_blocks))
        """What drafts are of."""

    @property
    def running(self) -> list[Request]:
        return self.scheduler.running

    @property
    def waiting(self) -> list[Request]:
        running = self.running
        return [request for request in self.scheduler.live() if request not in running]

    def add(
        self, prompt: list[int], params: SamplingParams, request_id: str | None = None, client: str = ""
    ) -> Request:
        number = len(self.requests)
        request = Request(request_id or str(number), prompt, params, number, 0.0, client=client, salt=client)
        self.requests.append(request)
        self.prompts.append(list(prompt))
        self.scheduler.add(request)
        self.check()
        return request

    def finish(self, request: Request, reason: FinishReason = FinishReason.ABORTED) -> None:
        assert self.scheduler.finish(request.request_id, reason) is request
        assert self.scheduler.finish(request.request_id, reason) is None
        assert request.request_id not in self.scheduler
        self.ended[request.arrival] = reason
        self.check()

    def schedule(self) -> Scheduled | None:
        """A step, checked against the contract."""
        self.draft()
        before = self.running
        preemptions = {request.arrival: request.preemptions for request in self.requests}
        self.step = self.scheduler.schedule(1.0)
        self.check()
        preempted = [request for request in before if request.preemptions > preemptions[request.arrival]]
        self._check_preempted(before, preempted)
        if self.step is None:
            assert not self.scheduler.has_work
            return None
        self._check_sampling(self.step)
        self._check_chunks(list(self.step.chunks), [request for request in before if request not in preempted])
        return self.step

    def draft(self) -> None:
        """Drafts for all that may have one: right, right at first, wrong, too long, or none."""
        for request, max_tokens in self.scheduler.draft_candidates():
            assert 1 <= max_tokens <= self.limits.max_draft_tokens
            tokens = list(request.token_ids)
            while len(tokens) - request.num_tokens < max_tokens + self.random.choice((0, 0, 5)):
                tokens.append(next_token(tokens) if self.random.random() < 0.8 else self.random.randrange(VOCAB))
            request.draft = tokens[request.num_tokens :] if self.random.random() < 0.9 else []

    def _check_preempted(self, before: list[Request], preempted: list[Request]) -> None:
        """The last of those with blocks gave way, with all of their blocks, and are not admitted at once."""
        cached = [request for request in before if not request.is_uncached]
        assert preempted == cached[len(cached) - len(preempted) :]
        for request in preempted:
            assert request in self.waiting
            assert len(request.blocks) == request.num_computed == 0

    def _check_sampling(self, step: Scheduled) -> None:
        """A row for each that samples, in mini-batch order, with the tokens where a penalty asks for them."""
        assert self.scheduler.requests(step.step_id) == [chunk.request for chunk in step.chunks]
        places = [(chunk, count) for chunk in step.chunks for count in range(chunk.num_sampled)]
        for row, (chunk, count) in zip(step.sampling, places, strict=True):
            request = chunk.request
            assert row.params is request.params
            assert row.num_prompt_tokens == request.num_prompt_tokens
            assert row.num_output_tokens == request.num_output_tokens + count
            assert (row.seed, row.eos_token_ids) == (request.params.seed or 0, {EOS})
            assert row.draft == chunk.draft[:count]
            assert list(row.token_ids) == ([*request.token_ids, *row.draft] if request.params.has_penalties else [])

    def _check_chunks(self, chunks: list[Chunk], kept: list[Request]) -> None:
        requests = [chunk.request for chunk in chunks]
        assert len(set(map(id, requests))) == len(requests)
        assert all(request in self.running and request.in_flight for request in requests)
        assert next(request for request in self.running if not request.awaits_prefix) in requests
        for request in kept:
            assert request in requests or (request.num_tokens - request.num_computed > 1 and not request.is_uncached)
        admitted = [request for request in self.running if request not in kept]
        assert all(request in requests or request.awaits_prefix for request in admitted)
        assert all(a.order < b.order for a in admitted for b in self.waiting)
        for chunk in chunks:
            self._check_chunk(chunk)
        if self.limits.keeps_cache:
            pending = [w for w in chunks if w.request.num_tokens - w.request.num_computed > 1 and not w.recomputed]
            prompts = pending + [w for w in chunks if w.request in admitted and w not in pending]
            decodes = [w for w in chunks if w.request.num_output_tokens and w.request in kept and w not in prompts]
            most = self._max_prompt_tokens(len(decodes))
            assert sum(chunk.num_new for chunk in prompts) <= most
        assert all(chunk.num_new <= self.limits.buffers.queries for chunk in chunks) or not self.limits.keeps_cache

    def _max_prompt_tokens(self, decoding: int) -> int:
        limits = self.limits
        if not decoding:
            return limits.max_idle_prefill_tokens
        spare = int(limits.spare_prefill_tokens * (limits.max_batch - decoding))
        return min(limits.max_idle_prefill_tokens, limits.max_prefill_tokens + spare)

    def _check_chunk(self, chunk: Chunk) -> None:
        request = chunk.request
        assert chunk.num_new >= 1
        assert chunk.context == request.num_computed
        assert chunk.samples == (chunk.context + chunk.num_new - len(chunk.draft) == request.num_tokens)
        assert len(chunk.draft) <= self.limits.max_draft_tokens * chunk.is_decode
        assert request.num_tokens + len(chunk.draft) < request.max_total_tokens or not chunk.draft
        assert not request.draft
        blocks = -(-(chunk.context + chunk.num_new) // self.limits.block_size)
        assert request.blocks.end in ((0, blocks * self.limits.keeps_cache) if request.is_uncached else (blocks,))
        assert request.blocks.first == first_visible(chunk.context, self.window) // self.limits.block_size
        recomputed = chunk.num_new - 1 - len(chunk.draft) if request.is_uncached and request.num_output_tokens else 0
        assert chunk.recomputed == recomputed

    def commit(self, failed: Mapping[int, int] = MappingProxyType({})) -> list[Output]:
        """Compute the step from what the pools hold, and commit it; sampling fails for the arrivals in `failed`, from
        that row of theirs on."""
        assert self.step is not None
        step, self.step = self.step, None
        self.lengths = {chunk.request.arrival: chunk.request.num_tokens for chunk in step.chunks}
        tokens: dict[int, list[int]] = {}
        for chunks, batch in zip(step.mini_batches, assemble(step, self.limits).mini_batches, strict=True):
            tokens |= self._compute(chunks, batch)
        requests = sampled(step)
        rows = ((request.arrival, *row) for request in requests for row in enumerate(tokens[request.arrival]))
        token_ids = [None if row >= failed.get(arrival, row + 1) else token_id for arrival, row, token_id in rows]
        live = [request for request in requests if request.finish_reason is None]
        outputs = self.scheduler.commit(step.step_id, token_ids, 2.0)
        assert [output.request for output in outputs] == live
        for output in outputs:
            self._note(output)
        self._check_committed(step)
        self.check()
        return outputs

    def abandon(self) -> None:
        assert self.step is not None
        assert self.step.stop.is_set
        step, self.step = self.step, None
        self.scheduler.abandon(step.step_id)
        self.check()

    def drain(self, max_steps: int = 5000) -> None:
        """Run until every request has ended."""
        if self.step is not None:
            self.commit()
        for _ in range(max_steps):
            if self.schedule() is None:
                break
            self.commit()
        assert not self.scheduler.has_work
        assert list(self.scheduler.live()) == []
        assert len(self.ended) == len(self.requests)
        assert self.scheduler.blocks[0].num_free == self.scheduler.blocks[0].num_blocks
        assert self.scheduler.integrity() == {}

    def check(self) -> None:
        """Blocks are held by live or in-flight requests, counts agree, the running list is in order."""
        scheduler, running, waiting = self.scheduler, self.running, self.waiting
        tables = [request.blocks for request in self.requests]
        owned = Counter(Block(*block) for table in tables for block in zip(table.pools, table.indices, strict=True))
        assert all(count == 1 for count in owned.values()) or self.limits.shares_prefixes
        for pool, blocks in scheduler.blocks[0].pools.items():
            assert [blocks.num_holders(n) for n in range(blocks.num_blocks)] == [
                owned[pool, n] for n in range(blocks.num_blocks)
            ]
        assert scheduler.blocks[0].num_free == scheduler.blocks[0].num_blocks - len(owned)
        assert not any(name.startswith("blocks") for name in scheduler.integrity())
        assert scheduler.num_waiting == len(waiting)
        assert scheduler.num_waiting_tokens == sum(r.num_tokens for r in waiting)
        preempted = [r for r in waiting if r.scheduled_time is not None]
        new_tokens = [r.num_tokens for r in waiting if r.scheduled_time is None]
        assert scheduler.num_preempted == len(preempted)
        assert scheduler.num_preempted_tokens == sum(r.num_tokens for r in preempted)
        assert (scheduler.places.requests.total, scheduler.places.tokens.total) == (len(new_tokens), sum(new_tokens))
        assert all((r.scheduled_time is None) == (r.rank == math.inf) for r in self.requests)
        assert all(r.scheduled_time is not None for r in running)
        assert scheduler.num_running == len(running) <= self.limits.max_batch
        assert [r.order for r in running] == sorted(r.order for r in running)
        assert all(len(r.blocks) == r.num_computed == 0 for r in waiting)
        holders = [r for r in self.requests if len(r.blocks)]
        assert all(r in running or r.in_flight for r in holders)
        ended = {r.arrival for r in self.requests if r.finish_reason is not None}
        assert ended == set(self.ended)
        assert {r.arrival for r in scheduler.live()} == {r.arrival for r in self.requests} - ended
        assert list(scheduler._in_flight) == ([self.step.step_id] if self.step is not None else [])
        if self.step is not None:
            assert self.step.stop.is_set == all(chunk.request.arrival in ended for chunk in self.step.chunks)

    def _note(self, output: Output) -> None:
        request = output.request
        assert request.finish_reason is output.finish
        assert output.failed == (not output.token_ids)
        if output.finish is not None:
            assert request.arrival not in self.ended
            self.ended[request.arrival] = output.finish
        if output.finish is FinishReason.STOP_TOKEN:
            assert output.matched_stop == output.token_ids[-1]
        if output.token_ids:
            assert request.token_ids[self.lengths[request.arrival] :] == list(output.token_ids)

    def _check_committed(self, step: Scheduled) -> None:
        for chunk in step.chunks:
            request = chunk.request
            assert not request.in_flight
            if request.finish_reason is not None:
                assert len(request.blocks) == 0
            elif self.limits.keeps_cache:
                num_new = request.num_tokens - self.lengths[request.arrival]
                known = self.lengths[request.arrival] + num_new - 1 if chunk.samples else chunk.context + chunk.num_new
                assert request.num_computed == (0 if request.is_uncached else known)
                assert request.is_uncached == (request.blocks.end == 0)
                assert request.blocks.end == (0 if request.is_uncached else -(-known // self.limits.block_size))
                first = first_visible(request.num_computed, self.window) // self.limits.block_size
                assert request.blocks.first == first
                assert chunk.samples <= num_new <= chunk.num_sampled

    def _compute(self, chunks: tuple[Chunk, ...], batch: MiniBatch) -> dict[int, list[int]]:
        """Tokens by arrival, after each request's buffer rows were seen to hold the tokens that its chunk sees."""
        queries = list(zip(batch.positions.tolist(), batch.token_ids.tolist(), strict=True))
        buffer = {row: queries[query] for query, row in pairs(batch.widest.new_rows)}
        activations: dict[int, tuple[int, int]] = {}
        for loads, target in ((batch.widest.kv_loads, buffer), (batch.widest.activation_loads, activations)):
            for pool, runs in loads.items():
                target |= {row: self.slots[pool, slot] for slot, row in pairs(runs.rows())}
        buffer |= {row: activations[i] for i, row in enumerate(batch.widest.activation_rows.tolist())}
        self._check_loaded_once(batch)
        buffer |= {target: buffer[source] for source, target in pairs(batch.widest.copies)}
        for pool, rows in batch.stores.items():
            self.slots |= {(pool, slot): queries[query] for query, slot in pairs(rows)}
        tokens: dict[int, list[int]] = {}
        packed = [(chunk, part) for chunk in chunks for part in chunk.parts]
        for i, (chunk, part) in enumerate(packed):
            rows_of_request = range(batch.widest.key_starts[i], batch.widest.key_starts[i + 1])
            front = (
                batch.widest.in_place.rebuilt_starts[i : i + 2] if i < batch.widest.in_place.num_requests else (0, 0)
            )
            rows = [buffer[row] for row in [*range(*front), *rows_of_request]]
            held = sorted(rows + self._in_place(batch, i))
            known = [*chunk.request.token_ids, *chunk.draft][: part.context + part.num_new]
            assert held == list(enumerate(known))[first_visible(part.context, self.window) :]
            if chunk.samples:
                ends = range(len(known) - part.num_sampled + 1, len(known) + 1)
                tokens.setdefault(chunk.request.arrival, []).extend(next_token(known[:end]) for end in ends)
        return tokens

    def _check_loaded_once(self, batch: MiniBatch) -> None:
        """No row crosses the bus, or is rebuilt, twice for a mini-batch; nor is one copied that is there."""
        layout = batch.widest
        for pool, runs in (*layout.kv_loads.items(), *layout.activation_loads.items()):
            sources = runs.rows().source.tolist()
            assert len(set(sources)) == len(sources), pool
        targets = layout.copies.target.tolist()
        loaded = {row for runs in layout.kv_loads.values() for row in runs.rows().target.tolist()}
        assert not {*targets} & {*loaded, *layout.activation_rows.tolist()}
        assert len(set(targets)) == len(targets)

    def _in_place(self, batch: MiniBatch, index: int) -> list[tuple[int, int]]:
        """What a request reads in the pool of device KV blocks."""
        if index >= batch.widest.in_place.num_requests:
            return []
        size, table = self.limits.block_size, batch.widest.in_place.tables[index].tolist()
        skips = batch.widest.in_place.skips
        tokens = range(0 if skips is None else int(skips[index]), int(batch.widest.in_place.counts[index]))
        return [self.slots[PoolId.DEVICE_KV, table[token // size] * size + token % size] for token in tokens]


def pairs(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.source.tolist(), rows.target.tolist(), strict=True))


def expected(harness: Harness, request: Request) -> tuple[list[int], FinishReason]:
    return generate(harness.prompts[request.arrival], request.params, harness.limits.max_model_len)


@st.composite
def harnesses(draw: st.DrawFn) -> Harness:
    """From blocks for hardly more than one request at full length to plenty; windows that free blocks, or none."""
    block_size = draw(st.integers(1, 6))
    prefill, more = draw(st.tuples(st.sampled_from((1, 2, 3, 5, 8, 13, 24, 60)), st.sampled_from((0, 1, 7))))
    limits = replace(
        LIMITS,
        block_size=block_size,
        max_batch=draw(st.sampled_from((1, 2, 3, 4, 6))),
        max_prefill_tokens=prefill,
        max_idle_prefill_tokens=prefill + more,
        spare_prefill_tokens=draw(st.sampled_from((0.0, 0.4, 2.5))),
        recompute=RecomputeLimits(
            tokens=draw(st.sampled_from((0, 0, 12, 40, 1000))),
            weights=draw(st.sampled_from((0.0, 4.0, 1000.0))),
            is_forced=draw(st.booleans()),
        ),
        shares_prefixes=draw(st.booleans()),
        buffers=replace(LIMITS.buffers, queries=draw(st.sampled_from((4, 12, 24)))),
        windows=LayerWindows((draw(st.none() | st.sampled_from((1, 2, 5, 9, 30))),)),
        max_draft_tokens=draw(st.sampled_from((0, 1, 3, 9))),
    )
    longest = -(-limits.max_model_len // block_size)
    if limits.windows.widest is not None:
        chunk = min(limits.buffers.queries, limits.max_idle_prefill_tokens)
        longest = min(longest, most_blocks(limits.windows.widest, chunk, block_size))
    total = longest + draw(st.sampled_from((0, 0, 1, 2, longest // 2, longest, 2 * longest)))
    cuts = sorted(draw(st.tuples(*[st.integers(0, total)] * 3)))
    counts = [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], total - cuts[2]]
    if draw(st.sampled_from((True, True, True, False))):
        return Harness(dict(zip(PoolId, counts, strict=True)), limits)
    prefill = limits.max_batch * limits.max_model_len
    return Harness({}, replace(limits, keeps_cache=False, max_prefill_tokens=prefill, max_idle_prefill_tokens=prefill))


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from((None, None, 23, 20, 9, 1)),
    ignore_eos=st.sampled_from((True, True, False)),
    stop_token_ids=st.sampled_from(((), (), (EOS, 7))),
    priority=st.integers(0, 2),
    presence_penalty=st.sampled_from((0.0, 0.0, 0.5)),
    seed=st.none() | st.integers(0, 9),
)
PROMPTS = st.builds(
    lambda length, token_id: [token_id + i for i in range(length)],
    st.sampled_from((1, 2, 3, 5, 8, 12, 23)),
    st.sampled_from((3, 3, 3, 4)) | st.integers(0, VOCAB - 24),
)
ADD = st.tuples(st.sampled_from(("add for a", "add for b")), PROMPTS, PARAMS)
STEPS = st.tuples(st.just("steps"), st.integers(1, 6), st.just(0))
RARE = st.one_of(
    st.tuples(st.just("step and abort"), st.integers(1, 2), st.integers(0, 99)),
    st.tuples(st.just("finish"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("reuse"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("fail"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("abandon"), st.just(0), st.just(0)),
)
OPERATIONS = st.sampled_from((ADD, ADD, ADD, STEPS, STEPS, RARE)).flatmap(lambda strategy: strategy)


def apply(harness: Harness, operation: tuple, aborted: set[int]) -> None:
    name, first, second = operation
    live = sorted(harness.scheduler.live(), key=lambda r: r.order)
    if name.startswith("add"):
        harness.add(first, second, client=name[-1])
    elif name == "steps":
        for _ in range(first):
            step_and_abort(harness, 0, 0, aborted)
    elif name == "step and abort":
        step_and_abort(harness, first, second, aborted)
    elif name == "finish" and live:
        abort(harness, live[first % len(live)], aborted)
    elif name == "reuse" and live:
        reuse(harness, live[first % len(live)], aborted)
    elif name == "fail":
        step_and_fail(harness, first, aborted)
    elif name == "abandon" and harness.schedule() is not None:
        for chunk in harness.step.chunks:
            abort(harness, chunk.request, aborted)
        harness.abandon()


def step_and_fail(harness: Harness, which: int, aborted: set[int]) -> None:
    """A step in which sampling fails for one request, at its newest token, or behind one that is drafted.

    There it matters only if the draft is right, and then to the next step.
    """
    if harness.schedule() is None or not sampled(harness.step):
        if harness.step is not None:
            harness.commit()
        return
    chunks = [chunk for chunk in harness.step.chunks if chunk.samples]
    chunk = chunks[which % len(chunks)]
    arrival, row = chunk.request.arrival, which % chunk.num_sampled
    if not row:
        aborted.add(arrival)
    for output in harness.commit(failed={arrival: row}):
        assert output.failed == (output.request.arrival == arrival and not row)


def abort(harness: Harness, request: Request, aborted: set[int]) -> None:
    aborted.add(request.arrival)
    harness.finish(request)


def reuse(harness: Harness, request: Request, aborted: set[int]) -> None:
    """A request ends, at once or while a step computes it, and another takes its id."""
    harness.schedule()
    abort(harness, request, aborted)
    harness.add([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True), request.request_id)
    if harness.step is not None:
        harness.commit()


def step_and_abort(harness: Harness, num_aborted: int, which: int, aborted: set[int]) -> None:
    """A step, and some requests that end while it is computed."""
    if harness.schedule() is None:
        return
    for _ in range(num_aborted):
        live = list(harness.scheduler.live())
        if live:
            abort(harness, live[which % len(live)], aborted)
    harness.commit()


@given(harness=harnesses(), operations=st.lists(OPERATIONS, min_size=15, max_size=50))
@settings(max_examples=100)
def test_every_request_ends_as_if_it_were_alone(harness: Harness, operations: list[tuple]):
    """Whatever comes, goes and is preempted: each request ends, with the tokens that it would get alone."""
    aborted: set[int] = set()
    for operation in operations:
        apply(harness, operation, aborted)
    harness.drain()
    for request in harness.requests:
        tokens, reason = expected(harness, request)
        if request.arrival in aborted:
            assert request.finish_reason is FinishReason.ABORTED
            assert request.token_ids == tokens[: request.num_tokens]
        else:
            assert (request.token_ids, request.finish_reason) == (tokens, reason)


def endless(max_tokens: int | None = None, priority: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, priority=priority)


def make(num_blocks: int = 6, **limits: object) -> Harness:
    """A harness with host KV blocks: by default room for one request at full length."""
    return Harness({PoolId.HOST_KV: num_blocks}, replace(LIMITS, **limits))


def test_full_length_alone_always_advances():
    """With exactly the blocks of one request at full length, one computes token after token without preemption."""
    harness = make()
    request = harness.add([1], endless())
    harness.drain(max_steps=25)
    assert request.num_tokens == LIMITS.max_model_len
    assert request.finish_reason is FinishReason.CONTEXT_LENGTH
    assert request.preemptions == 0


def test_two_full_lengths_do_not_thrash():
    """Two requests that do not fit together: the later gives way once, and comes back when the first has ended."""
    harness = make(num_blocks=7)
    first, second = harness.add([1], endless()), harness.add([2], endless())
    harness.drain(max_steps=60)
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert harness.scheduler.preemptions == 1
    assert second.token_ids == expected(harness, second)[0]


def test_many_full_lengths_end():
    """Eight requests over room for little more than one: the number of steps stays near that of one after the other."""
    harness = make(num_blocks=8, max_batch=8)
    for i in range(8):
        harness.add([i + 1], endless(priority=i % 3))
    harness.drain(max_steps=8 * 30)


def test_order_is_priority_then_arrival():
    """With one place, requests run by priority, and among equals in order of arrival."""
    harness = make(max_batch=1)
    for priority in (1, 0, 2, 0, 1):
        harness.add([1, 2], endless(max_tokens=2, priority=priority))
    harness.drain()
    assert list(harness.ended) == [1, 3, 0, 4, 2]


def test_who_was_let_in_first_gives_way_last():
    """An urgent late request is let in before others, but gives way to those that run: they lose no work to it."""
    harness = make(num_blocks=9)
    early = harness.add([1], endless(max_tokens=20, priority=3))
    harness.schedule()
    harness.commit()
    patient, urgent = harness.add([2], endless(max_tokens=20)), harness.add([3], endless(max_tokens=20, priority=-5))
    harness.scheduler.limits = replace(harness.limits, max_batch=2)
    harness.schedule()
    assert harness.running == [early, urgent]
    harness.commit()
    harness.drain()
    assert (early.preemptions, urgent.preemptions) == (0, 1)
    assert list(harness.ended) == [early.arrival, urgent.arrival, patient.arrival]


def test_a_preempted_request_comes_back_before_any_new_one():
    """Whoever gave way is next, though an urgent request of another client has come: it is not put off for ever."""
    harness = make(num_blocks=7)
    _, second = harness.add([1], endless()), harness.add([2], endless())
    while not second.preemptions:
        harness.schedule()
        harness.commit()
    urgent = harness.add([3], endless(max_tokens=1, priority=-5), client="other")
    while urgent.scheduled_time is None:
        harness.schedule()
        harness.commit()
    assert second in harness.running
    harness.drain()


def test_a_small_request_does_not_pass_a_large_one():
    """Requests are admitted strictly in order: what has no room yet is not overtaken, hence never starves."""
    harness = make(num_blocks=6)
    harness.add([1] * 12, endless(max_tokens=8))
    harness.schedule()
    harness.commit()
    large, small = harness.add([2] * 20, endless(max_tokens=1)), harness.add([3], endless(max_tokens=1))
    harness.schedule()
    assert harness.waiting == [large, small]
    harness.commit()
    harness.drain()
    assert list(harness.ended) == [0, 1, 2]


@pytest.mark.parametrize(("num_blocks", "num_running"), [(7, 1), (8, 2)])
def test_admission_leaves_a_block_for_those_that_run(num_blocks: int, num_running: int):
    """A prompt that would take the block that a running request needs next waits: to admit and preempt is work lost."""
    harness = make(num_blocks=num_blocks, max_prefill_tokens=24, max_idle_prefill_tokens=24)
    harness.add([1] * 4, endless(max_tokens=8))
    harness.schedule()
    harness.commit()
    harness.add([2] * 20, endless(max_tokens=2))
    harness.schedule()
    assert len(harness.running) == num_running
    harness.commit()
    harness.drain()
    assert harness.scheduler.preemptions == 0


def test_long_prompts_are_computed_in_chunks():
    """A prompt longer than the budget takes several steps and samples in the last; decoding goes on beside it."""
    harness = make(num_blocks=12)
    decoding = harness.add([1, 2], endless())
    harness.schedule()
    harness.commit()
    prompt = harness.add([3] * 20, endless())
    counts = []
    for _ in range(3):
        step = harness.schedule()
        counts.append([(chunk.request.arrival, chunk.num_new, chunk.samples) for chunk in step.chunks])
        harness.commit()
    chunks = [[count for count in each if count[0] == prompt.arrival] for each in counts]
    assert chunks == [[(1, 8, False)], [(1, 8, False)], [(1, 4, True)]]
    assert all((decoding.arrival, 1, True) in each for each in counts)


def test_the_prefill_budget_holds_for_prompts_one_token_at_a_time():
    """A budget of one token is one token a step, however many prompts are being computed."""
    harness = make(num_blocks=24, max_prefill_tokens=3, max_idle_prefill_tokens=3)
    for i in range(3):
        harness.add([i + 1] * 7, endless(max_tokens=2))
    for step in iter(harness.schedule, None):
        prompts = [chunk for chunk in step.chunks if chunk.context < chunk.request.num_prompt_tokens - 1]
        assert sum(chunk.num_new for chunk in prompts) <= 3
        harness.commit()
    assert len(harness.ended) == 3


def test_a_late_urgent_prompt_keeps_to_the_budget():
    """A chunk of one token of a prompt counts: an urgent request that comes between does not raise the step's total."""
    harness = make(num_blocks=24, max_prefill_tokens=1, max_idle_prefill_tokens=1)
    harness.add([1] * 6, endless(max_tokens=2, priority=1))
    harness.schedule()
    harness.commit()
    harness.add([2] * 6, endless(max_tokens=2))
    for step in iter(harness.schedule, None):
        assert sum(chunk.num_new for chunk in step.chunks if not chunk.samples) <= 1
        harness.commit()


def test_ending_in_flight_keeps_blocks_until_commit():
    """A step that computes an ended request still writes its blocks: nobody else gets them before the commit."""
    harness = make()
    request = harness.add([1] * 5, endless())
    harness.schedule()
    harness.finish(request, FinishReason.TIME_LIMIT)
    assert len(request.blocks) == 2
    assert harness.commit() == []
    assert len(request.blocks) == 0
    assert request.token_ids == [1] * 5


def test_a_step_stops_with_the_last_of_its_requests():
    """All but one ended: somebody waits for it still. One that waits to be let in has no part in it."""
    harness = make(num_blocks=24, max_batch=3)
    requests = [harness.add([number + 1], endless()) for number in range(4)]
    step = harness.schedule()
    for request in (requests[2], requests[0]):
        harness.finish(request)
        assert not step.stop.is_set
    harness.finish(requests[1])
    assert step.stop.is_set
    assert harness.waiting == [requests[3]]
    harness.abandon()
    assert not harness.schedule().stop.is_set
    harness.drain()


def test_a_step_that_is_taken_back_is_forgotten():
    """Committed or abandoned: nothing is known of it, it cannot be taken back twice, and no end flags it."""
    harness = make(num_blocks=24)
    request = harness.add([1, 2], endless())
    committed = harness.schedule()
    assert harness.scheduler.requests(committed.step_id) == [request]
    assert harness.scheduler.sampling(committed.step_id) == committed.sampling
    harness.commit()
    abandoned = harness.schedule()
    assert abandoned.step_id != committed.step_id
    harness.finish(request)
    harness.abandon()
    assert (committed.stop.is_set, abandoned.stop.is_set) == (False, True)
    for step_id in (committed.step_id, abandoned.step_id):
        for call in (harness.scheduler.requests, harness.scheduler.sampling, harness.scheduler.abandon):
            with pytest.raises(KeyError):
                call(step_id)
        with pytest.raises(KeyError):
            harness.scheduler.commit(step_id, [3], 2.0)


def test_a_step_is_handed_out_without_arrays():
    """Making them takes milliseconds, which the event loop does not have; one mini-batch in place is known as such."""
    harness = Harness({PoolId.DEVICE_KV: 24}, LIMITS)
    harness.add([1] * 5, endless())
    for is_in_place in (False, True):
        step = harness.schedule()
        assert step.arrays is None
        assert step.is_in_place == is_in_place
        harness.commit()


def test_ending_while_waiting_counts_once():
    """A waiting request that ends is gone from the count, wherever in the queue it was, and is never scheduled."""
    harness = make(max_batch=1)
    requests = [harness.add([i + 1], endless(max_tokens=3)) for i in range(4)]
    harness.schedule()
    for request in (requests[2], requests[1]):
        harness.finish(request)
    assert harness.scheduler.num_waiting == 1
    harness.commit()
    harness.drain()
    assert list(harness.ended) == [2, 1, 0, 3]


def test_ended_requests_do_not_pile_up():
    """Requests that come and end behind one that waits leave nothing behind, though the queue never moves."""
    harness = make(max_batch=1)
    harness.add([1], endless())
    harness.schedule()
    harness.scheduler.add(Request("urgent", [1], endless(priority=-1), 1, 0.0))
    for i in range(2, 2000):
        harness.scheduler.add(Request(str(i), [1], endless(), i, 0.0))
        harness.scheduler.finish(str(i), FinishReason.ABORTED)
    assert harness.scheduler.num_waiting == 1
    queue = harness.scheduler._queue
    users = queue._lines[""].line
    heaps = [
        users._lines[""].line._heap,
        *(heap for level in (queue, users) for heap in (level._by_share, level._by_due)),
    ]
    assert sum(map(len, heaps)) < 600


class Counting(Request):
    """A request that counts how often any of its attributes is read."""

    __slots__ = ()
    reads = 0

    def __getattribute__(self, name: str) -> object:
        Counting.reads += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("num_waiting", [100, 10_000])
def test_a_deep_queue_costs_nothing(num_waiting: int):
    """A step reads as much with 10,000 requests waiting as with 100: it does not touch them all."""
    scheduler = Scheduler(BlockManager({PoolId.HOST_KV: 100}), LIMITS, [EOS])
    for i in range(num_waiting):
        scheduler.add(Counting(str(i), [1, 2], SamplingParams(max_tokens=2, ignore_eos=True), i, 0.0))
    Counting.reads = 0
    for _ in range(10):
        step = scheduler.schedule(0.0)
        scheduler.commit(step.step_id, [3] * len(step.sampling), 0.0)
    assert scheduler.num_waiting == num_waiting - 20
    assert 0 < Counting.reads < 4000


def test_the_recompute_policy_keeps_nothing():
    """Every step computes all tokens of its requests; no block is taken, so nobody is preempted."""
    harness = Harness({}, replace(LIMITS, keeps_cache=False, max_prefill_tokens=96, max_idle_prefill_tokens=96))
    harness.add([1] * 4, endless(max_tokens=3))
    harness.add([2] * 20, endless(max_tokens=3))
    counts = []
    while (step := harness.schedule()) is not None:
        counts.append(sorted(chunk.num_new for chunk in step.chunks))
        harness.commit()
    assert counts == [[4, 20], [5, 21], [6, 22]]
    assert harness.scheduler.preemptions == 0


def test_failed_sampling_ends_one_request_alone():
    """A request whose logits are bad ends; the other one goes on."""
    harness = make(num_blocks=12)
    bad, good = harness.add([1], endless(max_tokens=3)), harness.add([2], endless(max_tokens=3))
    harness.schedule()
    outputs = {output.request: output for output in harness.commit(failed={bad.arrival: 0})}
    assert outputs[bad].failed
    assert outputs[bad].token_ids == ()
    assert not outputs[good].failed
    harness.drain()
    assert good.finish_reason is FinishReason.MAX_TOKENS


def test_idle_gives_no_step():
    """Without requests there is no step; an unknown id cannot be finished."""
    scheduler = Scheduler(BlockManager({PoolId.HOST_KV: 6}), LIMITS, [EOS])
    assert scheduler.schedule(0.0) is None
    assert not scheduler.has_work
    assert scheduler.finish("nobody", FinishReason.ABORTED) is None


def test_times_are_those_of_the_first_step():
    """A request's first scheduling and first token are noted once, also when it is preempted and computed again."""
    scheduler = Scheduler(BlockManager({PoolId.HOST_KV: 7}), LIMITS, [EOS])
    requests = [Request(str(i), [1], endless(), i, 0.0) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    now = 0.0
    while (step := scheduler.schedule(now := now + 1.0)) is not None:
        scheduler.commit(step.step_id, [3] * len(step.sampling), now + 0.5)
    assert requests[1].preemptions == 1
    assert [(r.scheduled_time, r.first_token_time) for r in requests] == [(1.0, 1.5)] * 2


def test_prompts_take_more_of_a_step_while_nobody_decodes():
    """A prompt of 20 tokens: 16 in its first step alone, but 4 a step beside a request that decodes."""
    buffers = BufferLimits(rows=99, activation_rows=99, queries=99)
    counts = []
    for first in ([2] * 20, [1]):
        harness = make(num_blocks=24, max_prefill_tokens=4, max_idle_prefill_tokens=16, buffers=buffers)
        harness.add(first, endless())
        if len(first) == 1:
            harness.schedule()
            harness.commit()
            harness.add([2] * 20, endless())
        step = harness.schedule()
        assert step is not None
        counts.append([chunk.num_new for chunk in step.chunks])
    assert counts == [[16], [1, 4]]


def test_a_batch_that_is_not_full_leaves_room_for_prompts():
    """One of four decodes: beside it 4 tokens, and 2 for each of the three that are missing; never more than idle."""
    buffers = BufferLimits(rows=99, activation_rows=99, queries=99)
    for spare, expected in ((2.0, 10), (0.5, 5), (9.0, 16)):
        limits = {"max_prefill_tokens": 4, "max_idle_prefill_tokens": 16, "spare_prefill_tokens": spare}
        harness = make(num_blocks=24, max_batch=4, buffers=buffers, **limits)
        harness.add([1], endless())
        harness.schedule()
        harness.commit()
        harness.add([2] * 20, endless())
        step = harness.schedule()
        assert step is not None
        assert [chunk.num_new for chunk in step.chunks] == [1, expected]


def test_a_long_prompt_is_no_more_than_a_mini_batch_takes():
    """Each request's chunk fits the buffers' queries, and several fill a step."""
    buffers = BufferLimits(rows=99, activation_rows=99, queries=6)
    harness = make(num_blocks=24, max_prefill_tokens=16, max_idle_prefill_tokens=16, buffers=buffers)
    for _ in range(3):
        harness.add([2] * 20, endless())
    step = harness.schedule()
    assert step is not None
    assert [chunk.num_new for chunk in step.chunks] == [6, 6, 4]
    assert len(step.mini_batches) == 3


def test_blocks_that_are_given_up_let_others_in():
    """Blocks for two of three: one that decodes gives up its own, and so the third needs not wait for an end."""
    recompute = RecomputeLimits(tokens=20, weights=6.0)
    limits = replace(LIMITS, recompute=recompute, max_prefill_tokens=24, max_idle_prefill_tokens=24)
    harness = Harness({PoolId.HOST_ACTIVATION: 7}, limits)
    first, second, third = (harness.add([5] * 8, SamplingParams(max_tokens=4, ignore_eos=True)) for _ in range(3))
    harness.schedule()
    harness.commit()
    assert harness.running == [first, second]
    harness.schedule()
    assert first.is_uncached
    assert harness.running == [first, second, third]
    harness.drain()
    assert all(request.preemptions == 0 for request in (first, second, third))


def test_no_block_is_kept_free_for_those_that_keep_none():
    """Blocks for one request at full length, and all are forced to keep none: the whole batch runs."""
    recompute = RecomputeLimits(tokens=1000, is_forced=True)
    chunks = {"max_prefill_tokens": 24, "max_idle_prefill_tokens": 24, "buffers": BufferLimits(24, 24, 24)}
    harness = Harness({PoolId.HOST_KV: 6}, replace(LIMITS, max_batch=10, recompute=recompute, **chunks))
    for _ in range(10):
        harness.add([5] * 8, endless(max_tokens=16))
    most = 0
    while harness.schedule() is not None:
        harness.commit()
        most = max(most, len(harness.running))
    assert most == 10


def test_a_prompt_that_finds_no_room_is_none_of_the_next_step():
    """The one that waits needs five blocks beside one for each that runs, and four are free: the GPU has time."""
    recompute = RecomputeLimits(tokens=20, weights=6.0)
    limits = replace(LIMITS, recompute=recompute, max_prefill_tokens=24, max_idle_prefill_tokens=24)
    harness = Harness({PoolId.HOST_ACTIVATION: 8}, limits)
    first, _ = (harness.add([5] * 8, SamplingParams(max_tokens=4, ignore_eos=True)) for _ in range(2))
    harness.schedule()
    harness.commit()
    harness.add([5] * 20, SamplingParams(max_tokens=2, ignore_eos=True))
    harness.schedule()
    assert first.is_uncached


def takes_back(harness: Harness, requests: list[Request]) -> None:
    """From now on `requests` should keep their caches again, the first of them before the others."""

    class Fixed:
        is_of_use = True

        def choose(self, running: list[Request], prompt_tokens: int) -> Choice:
            return Choice([], [r for r in requests if r in running and r.is_uncached])

    harness.scheduler._recompute = Fixed()


def keeping_none(num_blocks: int, prompts: list[int]) -> tuple[Harness, list[Request]]:
    """Requests with prompts of so many tokens that all keep no cache."""
    chunks = {"max_prefill_tokens": 4, "max_idle_prefill_tokens": 40, "buffers": BufferLimits(40, 40, 40)}
    limits = replace(LIMITS, max_model_len=40, recompute=RecomputeLimits(tokens=1000, is_forced=True), **chunks)
    harness = Harness({PoolId.HOST_KV: num_blocks}, limits)
    requests = [harness.add([1] * length, endless(max_tokens=12)) for length in prompts]
    while not all(request.is_uncached for request in requests):
        harness.schedule()
        harness.commit()
    return harness, requests


def test_a_cache_is_not_taken_back_at_the_cost_of_a_prompt():
    """Ten blocks: six are not taken while a prompt that has one of them needs four more."""
    harness, [request] = keeping_none(10, [20])
    takes_back(harness, [])
    prompt = harness.add([3] * 20, endless(max_tokens=2))
    harness.schedule()
    harness.commit()
    assert prompt.num_computed == 4
    takes_back(harness, [request])
    harness.schedule()
    assert request.is_uncached
    harness.commit()
    harness.drain()
    assert harness.scheduler.preemptions == 0


def test_the_first_with_room_takes_its_cache_back():
    """One needs six blocks and one needs three, where five are free."""
    harness, [short, long] = keeping_none(10, [8, 20])
    takes_back(harness, [])
    harness.add([3] * 16, endless(max_tokens=2))
    for _ in range(4):
        harness.schedule()
        harness.commit()
    takes_back(harness, [long, short])
    harness.schedule()
    harness.commit()
    assert (short.is_uncached, long.is_uncached) == (False, True)
    harness.drain()


def test_prompts_of_several_mini_batches_share_a_budget():
    """A prompt that fills a mini-batch leaves the rest of the step's prompt tokens to the next, in every step."""
    limits = replace(LIMITS, max_idle_prefill_tokens=10, buffers=BufferLimits(rows=24, activation_rows=24, queries=8))
    harness = Harness({PoolId.HOST_KV: 40}, limits)
    for _ in range(2):
        harness.add([1] * 23, SamplingParams(max_tokens=1))
    for wanted in ([8, 2], [8, 2], [7, 3]):
        step = harness.schedule()
        assert step is not None
        assert sorted((chunk.num_new for chunk in step.chunks), reverse=True) == wanted
        harness.scheduler.commit(step.step_id, [1] * len(step.sampling), 1.0)


def test_a_preempted_request_that_ends_waits_no_longer():
    """It is counted among those that wait until then; nothing is left to do after it."""
    scheduler = Scheduler(BlockManager({PoolId.HOST_KV: 8}), LIMITS, [EOS])
    params = SamplingParams(max_tokens=18, ignore_eos=True)
    first, second = (Request(str(number), [1] * 6, params, number, 0.0) for number in range(2))
    for request in (first, second):
        scheduler.add(request)
    while not second.preemptions:
        step = scheduler.schedule(1.0)
        assert step is not None
        scheduler.commit(step.step_id, [1] * len(step.sampling), 1.0)
    assert scheduler.num_waiting == 1
    scheduler.finish("1", FinishReason.ABORTED)
    assert scheduler.num_waiting == scheduler.num_waiting_tokens == 0
    scheduler.finish("0", FinishReason.ABORTED)
    assert not scheduler.has_work
