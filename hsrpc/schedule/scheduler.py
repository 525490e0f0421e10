"""Continuous batching: which requests the next step computes, who waits, and who is preempted when blocks run out.

The running list is kept in the order in which requests were admitted, whatever their priority; `FairQueue` chooses whom
to admit. A request that needs a block when none is free preempts the one that comes last: its blocks are freed, and it
is recomputed from its token ids later, before any that was never admitted. Hence the first in order always advances,
every request ends, and nothing dead-locks: one request at full length fits by construction (the planner sees to it).
Uncached requests need no blocks and are never preempted. Where every layer has a window, a request's blocks that the
widest one has left are freed with each step that is committed.

A request takes the blocks of its first tokens that are there already, held by others or kept, and computes what is
left. Where another is about to compute the next one of them, it waits for that: it runs, and computes nothing. Whoever
computes does not wait, and needs none of those who do; so here too nothing dead-locks.

Where several GPUs share a stream of weights, each has blocks and a running list of its own. A request is given to one
of them when it is admitted, and stays until it ends or is preempted. All have one queue, and one step.

A request that decodes may have a draft: tokens that it is thought to go on with. They are computed behind its newest
one, as far as there is room that nobody else wants in this step, and behind each of them a token is sampled as it would
be without a draft. Those drafted that are equal to what was sampled before them are accepted, as if each had been
computed in a step of its own; the others are forgotten, and their blocks given back.
"""

from __future__ import annotations

import sys
from array import array
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import groupby, islice
from typing import NamedTuple

from hsrpc.request import FinishReason, TokenLogprob
from hsrpc.schedule.blocks import BlockManager, Key, PoolId
from hsrpc.schedule.decode_ahead import advance, uses_no_buffer
from hsrpc.schedule.fair_queue import FairQueue
from hsrpc.schedule.finish import finish_reason, goes_on
from hsrpc.schedule.mini_batches import form_mini_batches
from hsrpc.schedule.packing import in_order
from hsrpc.schedule.prefixes import Claims
from hsrpc.schedule.queue_places import QueuePlaces
from hsrpc.schedule.queue_rate import QueueRate
from hsrpc.schedule.recompute import NO_RECOMPUTE, RecomputeLimits, RecomputePolicy
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.step import BufferLimits, Chunk, MiniBatch, Packed, RowCosts, SamplingRow, Scheduled, StopFlag
from hsrpc.schedule.windows import NO_WINDOWS, LayerWindows, first_visible, most_blocks

_MAX_ENDED_WAITING = 64
_NOT_SAMPLED: tuple[int | None, TokenLogprob | None] = None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What bounds a step."""

    max_batch: int
    max_model_len: int
    max_prefill_tokens: int
    """Prompt tokens computed in one step beside a full batch's decoding: what delays those that decode."""
    spare_prefill_tokens: float = 0.0
    """More of them for each request that the batch lacks."""
    max_idle_prefill_tokens: int
    """Prompt tokens computed in a step in which no request decodes."""
    block_size: int
    buffers: BufferLimits
    costs: RowCosts
    windows: LayerWindows = NO_WINDOWS
    in_place: PoolId = PoolId.DEVICE_KV
    """The blocks that single queries read in place."""
    keeps_cache: bool = True
    """False for the recompute policy: nothing is cached, every step computes all tokens of its requests."""
    shares_prefixes: bool = False
    """Requests with equal first tokens hold the same blocks, which are kept when nobody holds them any longer."""
    recompute: RecomputeLimits = NO_RECOMPUTE
    """How many tokens of requests that began with a cache each step may recompute instead of loading them."""
    max_draft_tokens: int = 0
    """Drafted tokens of a request that a step computes, at most; for those of a whole batch there is workspace."""


class _InFlight(NamedTuple):
    """A step that is handed out."""

    chunks: tuple[Chunk, ...]
    """Chunks in mini-batch order."""
    stop: StopFlag


@dataclass(slots=True)
class _Gpu:
    """Who runs on a GPU, and what holds their tokens there."""

    number: int
    blocks: BlockManager
    claims: Claims[Request] = field(default_factory=Claims)
    """Which running request computes which blocks that others may share."""
    running: list[Request] = field(default_factory=list)
    """In the order in which they were admitted."""


@dataclass(slots=True)
class _Turn:
    """What a GPU computes in the step that is being made."""

    gpu: _Gpu
    chunks: list[Chunk]
    budget: int
    """Prompt tokens that it has room for."""
    reserved: int = 0
    """Blocks that those that run still need."""
    uncached: int = 0
    """Blocks that the tokens would take of those that keep no cache."""

    @property
    def room(self) -> int:
        """Blocks that are left; the more, the shorter is its step, whose time goes with the tokens that it has.

        All GPUs have as many; what several requests share is there once, and once in a step. Below 0 where requests
        that keep no cache have more tokens than blocks hold.
        """
        return self.gpu.blocks.num_free - self.reserved - self.uncached


class DraftCandidate(NamedTuple):
    """A request that the next step may compute drafted tokens of."""

    request: Request
    max_tokens: int
    """So many of them, at most."""


class Output(NamedTuple):
    """What a step (or an end without one) gave a request: tokens, an end, or both."""

    request: Request
    token_ids: tuple[int, ...] = ()
    """Its next token, and those that were drafted behind it and accepted."""
    finish: FinishReason | None = None
    """How it ended, with the last of them."""
    matched_stop: int | None = None
    failed: bool = False
    """Sampling failed for this request alone."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """The tokens' log-probabilities, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of the next tokens of its prompt, where they were asked for."""


class Scheduler:
    """Owns the life of requests and their blocks. Synchronous: every call leaves all of its state consistent."""

    def __init__(
        self,
        blocks: BlockManager,
        limits: SchedulerLimits,
        eos_token_ids: Sequence[int],
        others: Sequence[BlockManager] = (),
    ) -> None:
        """`limits` are those of each GPU; `others`: blocks of the GPUs behind the first, where there are several."""
        self.limits = limits
        self._gpus = tuple(_Gpu(number, each) for number, each in enumerate((blocks, *others)))
        self.preemptions = 0
        self._eos = frozenset(eos_token_ids)
        self._recompute = RecomputePolicy(
            limits.recompute,
            limits.costs,
            block_size=limits.block_size,
            max_queries=limits.buffers.queries,
            windows=limits.windows,
        )
        self.cached_tokens = 0
        """Tokens of requests that were found, and not computed when these were admitted for the first time."""
        self.drafted_tokens = 0
        """Tokens drafted for requests that steps computed."""
        self.accepted_tokens = 0
        """Those of them that the requests came to have."""
        self._live: dict[str, Request] = {}
        self._queue = FairQueue()
        self.places = QueuePlaces()
        """Places of those that wait and were never admitted, and of others that hold one before they are added."""
        self._queue_rate = QueueRate()
        self._preempted: list[tuple[tuple[float, int], Request]] = []
        self.num_preempted = 0
        """Requests that were admitted and wait again."""
        self.num_preempted_tokens = 0
        """Tokens to compute before these have their next one."""
        self._num_admitted = 0
        window, chunk = limits.windows.widest, min(limits.buffers.queries, limits.max_idle_prefill_tokens)
        self._most_blocks = sys.maxsize if window is None else most_blocks(window, chunk, limits.block_size)
        """That one request holds at once, unless it takes its cache back."""
        self.num_waiting_tokens = 0
        """Tokens to compute before all that wait have their next one."""
        self._num_steps = 0
        self._in_flight: dict[int, _InFlight] = {}
        """Steps handed out and not committed, by id."""

    @property
    def blocks(self) -> tuple[BlockManager, ...]:
        """Those of each GPU."""
        return tuple(gpu.blocks for gpu in self._gpus)

    @property
    def running(self) -> list[Request]:
        """Those that run, GPU by GPU, each in the order in which they were admitted."""
        return [request for gpu in self._gpus for request in gpu.running]

    @property
    def num_running(self) -> int:
        return sum(self.num_running_each)

    @property
    def num_running_each(self) -> list[int]:
        """Requests that run on each GPU."""
        return [len(gpu.running) for gpu in self._gpus]

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + self.num_preempted

    @property
    def has_work(self) -> bool:
        return self.num_running > 0 or self.num_waiting > 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    def live(self) -> Iterator[Request]:
        """Every request that has not ended."""
        return iter(list(self._live.values()))

    def add(self, request: Request) -> None:
        """Let `request` wait for its turn."""
        request.is_uncached = not self.limits.keeps_cache
        request.max_total_tokens = min(request.max_total_tokens, self.limits.max_model_len)
        self._live[request.request_id] = request
        self._queue.add(request, request.arrival_time)
        self.places.hold(request)
        self.num_waiting_tokens += request.num_tokens

    def predicted_wait(self, client: str, user: str) -> float:
        """Seconds until a new request of these would be admitted, as the queue has moved lately; 0 if unknown."""
        if not self.num_waiting:
            return 0.0
        ahead = self.num_preempted + self._queue.num_ahead(client, user)
        return self._queue_rate.seconds_for(self.num_waiting_tokens * ahead / self.num_waiting)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End a live request now; blocks that a step still writes are freed when that step is committed."""
        request = self._live.pop(request_id, None)
        if request is None:
            return None
        request.finish_reason = reason
        self._drop_claims(request)
        running = self._gpu(request).running
        if request in running:
            running.remove(request)
        else:
            self.num_waiting_tokens -= request.num_tokens
            if request.scheduled_time is not None:
                self._count_preempted(request, -1)
            self._drop_ended()
            self.places.release(request)
        self._queue.end(request)
        self._free_ended(request)
        if request.in_flight:
            self._stop_abandoned()
        return request

    def draft_candidates(self) -> list[DraftCandidate]:
        """Requests that the next step may compute drafted tokens of, with how many each at most, GPU by GPU.

        The step computes fewer where room runs out: for prompts, for blocks, or for all drafts together.
        """
        return [each for gpu in self._gpus for each in self._draft_candidates(gpu)]

    def _draft_candidates(self, gpu: _Gpu) -> Iterator[DraftCandidate]:
        limits = self.limits
        free_tokens, queries = gpu.blocks.num_free * limits.block_size, limits.buffers.queries
        for request in gpu.running:
            if not request.is_decoding or request.awaits_prefix:
                continue
            room = min(limits.max_draft_tokens, request.max_total_tokens - request.num_tokens - 1)
            if request.is_uncached:
                room = min(room, queries - request.num_tokens)
            else:
                in_blocks = request.blocks.end * limits.block_size - request.num_tokens
                room = min(room, queries - 1, in_blocks + free_tokens)
            if room > 0:
                yield DraftCandidate(request, room)

    def schedule(self, now: float) -> Scheduled | None:
        """The next step: a token for each running request, and prompts as far as room allows. None: nothing to do."""
        turns = [self._continue(gpu, now) for gpu in self._gpus]
        if self.num_waiting:
            self._admit(now, turns)
        self._queue_rate.note(now, is_waiting=self.num_waiting > 0)
        if self.limits.max_draft_tokens:
            for turn in turns:
                turn.chunks = self._with_drafts(turn.chunks)
        batches = tuple(batch for turn in turns if turn.chunks for batch in self._divide(turn.chunks))
        if not batches:
            return None
        block_size, pool = self.limits.block_size, self.limits.in_place
        is_one_each = len(batches) == sum(bool(turn.chunks) for turn in turns)
        is_in_place = is_one_each and all(uses_no_buffer(batch, block_size, pool) for batch in batches)
        return self._hand_out(batches, is_in_place=is_in_place)

    def schedule_ahead(self, step: Packed) -> Scheduled | None:
        """The step after `step`, which is under way: its requests' next tokens, in place.

        Those that `step` ends by its length are left out; those that it ends otherwise are computed in vain. None where
        that is not all there is to do: somebody could be admitted, or would have to be preempted.
        """
        under_way = self._in_flight[step.step_id].chunks
        has_places = any(len(gpu.running) < self.limits.max_batch for gpu in self._gpus)
        if (self.num_waiting and has_places) or not step.is_in_place or self.num_running != len(under_way):
            return None
        batches, arrays = list[tuple[Chunk, ...]](), list[MiniBatch]()
        of_gpus = groupby(under_way, key=lambda chunk: chunk.request.gpu)
        for before, (_, of_gpu) in zip(step.mini_batches, of_gpus, strict=True):
            chunks = tuple(
                Chunk(chunk.request, chunk.context + 1, 1, samples=True, previous_row=row)
                for row, chunk in enumerate(of_gpu)
                if goes_on(chunk.request)
            )
            if not chunks:
                continue
            if not self._grow_ahead(chunks):
                return None
            batch = advance(before, chunks, self.limits.block_size, self.limits.windows.widest)
            if batch is None:
                return None
            batches.append(chunks)
            arrays.append(batch)
        return self._hand_out(tuple(batches), is_in_place=True, arrays=tuple(arrays)) if batches else None

    def sampling(self, step_id: int) -> tuple[SamplingRow, ...]:
        """Rows of a step that was scheduled ahead, now that the tokens of the step before are known."""
        rows = []
        for chunk in self._in_flight[step_id].chunks:
            if chunk.samples:
                rows.append(row := self._row(chunk.request))
                if chunk.draft:
                    rows += _rows_behind(row, chunk.draft)
        return tuple(rows)

    def integrity(self) -> dict[str, object]:
        """What requests hold, and what contradicts itself, by name; empty where nobody is there and all is well."""
        owned = Counter(
            (r.gpu, *block) for r in self._live.values() for block in zip(r.blocks.pools, r.blocks.indices, strict=True)
        )
        used = sum(pool.num_used for blocks in self.blocks for pool in blocks.pools.values())
        held = ((block, self.blocks[block[0]].pools[PoolId(block[1])].num_holders(block[2])) for block in owned)
        in_flight = (chunk.request for flight in self._in_flight.values() for chunk in flight.chunks)
        has_ended = any(request.finish_reason is not None for request in in_flight)
        found = {
            "running": self.num_running,
            "waiting": self.num_waiting,
            "waiting tokens": self.num_waiting_tokens,
            "live": list(self._live),
            "steps in flight": list(self._in_flight),
            "used blocks": used,
            "blocks of other owners": [block for block, holders in held if holders < owned[block]],
            "claims": sum(len(gpu.claims) for gpu in self._gpus),
            "blocks without owner": 0 if has_ended else used - len(owned),
        }
        return {name: value for name, value in found.items() if value}

    def requests(self, step_id: int) -> list[Request]:
        """All that a step computes, which is handed out and not committed."""
        return [chunk.request for chunk in self._in_flight[step_id].chunks]

    def _grow_ahead(self, chunks: Sequence[Chunk]) -> bool:
        """A block for each of a GPU's that begins one; False where there are too few: what was taken stays taken."""
        size = self.limits.block_size
        starting = [chunk.request.blocks for chunk in chunks if chunk.request.blocks.end * size == chunk.context]
        blocks = self._gpu(chunks[0].request).blocks
        if len(starting) > blocks.num_free:
            return False
        return all(blocks.grow(table, 1) for table in starting)

    def _hand_out(
        self,
        mini_batches: tuple[tuple[Chunk, ...], ...],
        *,
        is_in_place: bool,
        arrays: tuple[MiniBatch, ...] | None = None,
    ) -> Scheduled:
        """A step of these mini-batches, with their `arrays` where these are there already: then it is ahead."""
        self._num_steps += 1
        chunks, stop = tuple(chunk for batch in mini_batches for chunk in batch), StopFlag()
        self._in_flight[self._num_steps] = _InFlight(chunks, stop)
        for chunk in chunks:
            chunk.request.in_flight += 1
        return Scheduled(
            step_id=self._num_steps,
            mini_batches=mini_batches,
            sampling=self.sampling(self._num_steps) if arrays is None else (),
            stop=stop,
            arrays=arrays,
            is_in_place=is_in_place,
        )

    def _row(self, request: Request) -> SamplingRow:
        params = request.params
        return SamplingRow(
            params,
            request.num_prompt_tokens,
            request.num_output_tokens,
            params.seed or 0,
            self._eos,
            array("q", request.token_ids) if params.has_penalties else (),
            request.matcher,
        )

    def commit(
        self,
        step_id: int,
        token_ids: Sequence[int | None],
        now: float,
        logprobs: Sequence[TokenLogprob | None] | None = None,
        scored: Sequence[TokenLogprob | None] = (),
    ) -> list[Output]:
        """Take a step's result in the order of its rows that sample: the token is None where sampling failed.

        `scored`: log-probabilities of prompt tokens in the order of its chunks, as far as they are asked for; None
        where that failed.
        """
        chunks = self._in_flight.pop(step_id).chunks
        assert len(token_ids) == sum(chunk.num_sampled for chunk in chunks)
        rows = zip(token_ids, logprobs or [None] * len(token_ids), strict=True)
        scores = iter(scored)
        outputs = []
        for chunk in chunks:
            request = chunk.request
            token_id, logprob = next(rows) if chunk.samples else _NOT_SAMPLED
            behind = tuple(islice(rows, len(chunk.draft))) if chunk.draft else ()
            of_prompt = list(islice(scores, len(chunk.scored))) if scored else []
            prompt_logprobs = tuple(each for each in of_prompt if each is not None)
            request.in_flight -= 1
            if request.finish_reason is not None:
                self._free_ended(request)
                continue
            if len(prompt_logprobs) < len(of_prompt) or (chunk.samples and token_id is None):
                output, prompt_logprobs = Output(request, (), FinishReason.ABORTED, failed=True), ()
            else:
                output = Output(request) if token_id is None else self._accept(request, token_id, logprob, now)
                request.num_scored += len(prompt_logprobs)
            if behind:
                output = self._accept_behind(output, chunk.draft, behind, now)
            self._note_computed(chunk, output)
            if output.finish is not None:
                self.finish(request.request_id, output.finish)
            if prompt_logprobs:
                output = output._replace(prompt_logprobs=prompt_logprobs)
            if output.token_ids or output.finish is not None or prompt_logprobs:
                outputs.append(output)
        return outputs

    def abandon(self, step_id: int) -> None:
        """Forget a step whose result nobody waits for."""
        for chunk in self._in_flight.pop(step_id).chunks:
            chunk.request.in_flight -= 1
            self._free_ended(chunk.request)

    def _stop_abandoned(self) -> None:
        """Flag the steps of which nobody waits for anything any more."""
        for flight in self._in_flight.values():
            if all(chunk.request.finish_reason is not None for chunk in flight.chunks):
                flight.stop.set()

    def _free_ended(self, request: Request) -> None:
        """Blocks go back with the last step that writes them."""
        if not request.in_flight and request.finish_reason is not None:
            self._gpu(request).blocks.free(request.blocks)

    def _free_hidden(self, request: Request) -> None:
        """Blocks that no token to come sees: a step ahead of those that are committed does not read them either."""
        window = self.limits.windows.widest
        if window is not None:
            first = first_visible(request.num_computed, window) // self.limits.block_size
            self._gpu(request).blocks.free_before(request.blocks, first)

    def _accept(self, request: Request, token_id: int, logprob: TokenLogprob | None, now: float) -> Output:
        """Its next token, and whether it is to end with that."""
        if request.first_token_time is None:
            request.first_token_time = now
        if request.params.only_scores:
            return Output(request, (), FinishReason.MAX_TOKENS)
        request.token_ids.append(token_id)
        if request.matcher is not None:
            request.matcher.push(token_id)
        reason = finish_reason(request, token_id, self._eos)
        matched = token_id if reason is FinishReason.STOP_TOKEN else None
        return Output(request, (token_id,), reason, matched, logprobs=() if logprob is None else (logprob,))

    def _accept_behind(
        self,
        output: Output,
        draft: Sequence[int],
        sampled: Sequence[tuple[int | None, TokenLogprob | None]],
        now: float,
    ) -> Output:
        """The output with what was `sampled` behind each token of the draft, as far as the request has that token.

        Where sampling failed there, the next step fails.
        """
        for drafted, (token_id, logprob) in zip(draft, sampled, strict=True):
            if output.finish is not None or token_id is None or output.token_ids[-1] != drafted:
                break
            more = self._accept(output.request, token_id, logprob, now)
            output = more._replace(
                token_ids=output.token_ids + more.token_ids, logprobs=output.logprobs + more.logprobs
            )
        return output

    def _note_computed(self, chunk: Chunk, output: Output) -> None:
        """What a step computed of a request is cached; what was drafted, and is not accepted, is as if it never was."""
        request = chunk.request
        computed = chunk.context + chunk.num_new
        if chunk.draft:
            num_drafted, num_accepted = len(chunk.draft), max(0, len(output.token_ids) - 1)
            request.num_drafted += num_drafted
            request.num_accepted += num_accepted
            self.drafted_tokens += num_drafted
            self.accepted_tokens += num_accepted
            computed += num_accepted - num_drafted
            self._gpu(request).blocks.free_from(request.blocks, self._num_blocks(computed))
        if not len(request.blocks):
            return
        request.num_computed = computed
        request.is_uncached = False
        self._publish(request)
        self._free_hidden(request)

    def _gpu(self, request: Request) -> _Gpu:
        """Where a request runs, or ran last."""
        return self._gpus[request.gpu]

    def _prefill_budget(self, gpu: _Gpu) -> int:
        limits = self.limits
        decoding = sum(request.is_decoding for request in gpu.running)
        spare = int(limits.spare_prefill_tokens * (limits.max_batch - decoding))
        idle = limits.max_idle_prefill_tokens
        return min(idle, limits.max_prefill_tokens + spare) if decoding else idle

    def _balance(self, gpu: _Gpu, now: float) -> None:
        """Free the blocks of requests, which are uncached then, or cache one again, as bus and GPU have time."""
        drafted = sum(len(request.draft) for request in gpu.running)
        choice = self._recompute.choose(gpu.running, self._coming_prompt_tokens(gpu, now) + drafted)
        for request in choice.giving_up:
            self._give_up_blocks(request)
            request.is_uncached = True
        reserved = self._reserved(gpu) if choice.taking_back else 0
        for request in choice.taking_back:
            num_blocks = self._num_blocks(request.num_tokens)  # as the step computes it
            if _has_room(gpu, num_blocks, reserved):
                gpu.blocks.grow(request.blocks, num_blocks)
                break

    def _coming_prompt_tokens(self, gpu: _Gpu, now: float) -> int:
        """Upper bound of the prompt tokens in the next step."""
        pending = sum(r.num_tokens - r.num_computed for r in gpu.running if not r.is_decoding)
        if len(gpu.running) < self.limits.max_batch:
            first, reserved = self._first_waiting(now), self._reserved(gpu)
            if first is not None and _has_room(gpu, self._num_wanted(first, gpu), reserved):
                room = (gpu.blocks.num_free - reserved) * self.limits.block_size
                pending += min(room, self.num_waiting_tokens)
        return min(pending, self._prefill_budget(gpu))

    def _continue(self, gpu: _Gpu, now: float) -> _Turn:
        """What those compute next that run on a GPU, and how many prompt tokens it has room for beside."""
        if self._recompute.is_of_use:
            self._balance(gpu, now)
        budget = self._prefill_budget(gpu)
        chunks = self._continue_running(gpu, budget)
        while not chunks and gpu.running:  # whom they waited for was preempted: for want of blocks, itself
            chunks = self._continue_running(gpu, budget)
        return _Turn(gpu, chunks, budget - sum(map(_prefill_tokens, chunks)))

    def _continue_running(self, gpu: _Gpu, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        position, block_size = 0, self.limits.block_size
        while position < len(gpu.running):
            request = gpu.running[position]
            position += 1
            if request.awaits_prefix and not self._take_prefix(request):
                continue
            if request.has_room_for_next(block_size):  # most of them, in most steps
                chunks.append(Chunk(request, request.num_computed, 1, samples=True))
                continue
            chunk = self._next_chunk(request, budget)
            if chunk is None:
                continue
            if not self._reserve(request, chunk):
                position -= 1  # it was preempted itself, being the last with blocks
                continue
            budget -= _prefill_tokens(chunk)
            chunks.append(chunk)
        return chunks

    def _admit(self, now: float, turns: Sequence[_Turn]) -> None:
        """Let those that wait run, one after the other, each on a GPU that has room, as long as there is one."""
        turns = [turn for turn in turns if len(turn.gpu.running) < self.limits.max_batch]
        for each in turns:
            each.reserved, each.uncached = self._reserved(each.gpu), sum(map(self._num_uncached, each.gpu.running))
        while turns and (request := self._first_waiting(now)) is not None:
            if (turn := self._roomiest(request, turns)) is None:
                return
            request.gpu = turn.gpu.number
            if self._take_prefix(request):
                chunk = self._next_chunk(request, turn.budget)
                missing = 0 if chunk is None else self._missing_blocks(request, chunk)
                if chunk is None or not turn.gpu.blocks.grow(request.blocks, missing):
                    self._give_up_blocks(request)
                    return
                turn.budget -= chunk.num_new
                turn.chunks.append(chunk)
            self._admit_one(request, now)
            turn.reserved += self._num_needed(request)
            turn.uncached += self._num_uncached(request)

    def _roomiest(self, request: Request, turns: Sequence[_Turn]) -> _Turn | None:
        """The GPU for a request of those that have room: whose step is the shortest with what it adds to it.

        It adds the blocks of its tokens, but for the first ones that are there.
        """
        roomy = [turn for turn in turns if self._has_room_for(request, turn)]
        if len(roomy) <= 1:
            return roomy[0] if roomy else None
        return max(roomy, key=lambda turn: (turn.room + self._num_known(request, turn.gpu), -len(turn.gpu.running)))

    def _has_room_for(self, request: Request, turn: _Turn) -> bool:
        gpu = turn.gpu
        if turn.budget <= 0 or len(gpu.running) >= self.limits.max_batch:
            return False
        return request.is_uncached or _has_room(gpu, self._num_wanted(request, gpu), turn.reserved)

    def _num_known(self, request: Request, gpu: _Gpu) -> int:
        """Blocks of its first tokens that need not be computed on a GPU."""
        if not self._may_share(request):
            return 0
        keys = self._keys(request)
        found = len(gpu.blocks.find(keys))
        while found < len(keys) and gpu.claims.is_others(keys[found], request):
            found += 1
        return found

    def _with_drafts(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks, those that decode with what is drafted for their requests, as far as room is left."""
        found = []
        for chunk in chunks:
            drafted, chunk.request.draft = chunk.request.draft, ()
            count = self._draft_room(chunk, len(drafted)) if drafted and chunk.is_decode else 0
            found.append(self._with_draft(chunk, tuple(drafted[:count])) if count else chunk)
        return found

    def _with_draft(self, chunk: Chunk, draft: tuple[int, ...]) -> Chunk:
        longer = chunk._replace(num_new=chunk.num_new + len(draft), draft=draft)
        splits = not longer.recomputed and longer.lies_in(self.limits.in_place, self.limits.block_size)
        return longer._replace(splits=splits)

    def _draft_room(self, chunk: Chunk, wanted: int) -> int:
        """How many of the `wanted` drafted tokens a chunk has room for, whose blocks are there then."""
        limits, request = self.limits, chunk.request
        left = request.max_total_tokens - request.num_tokens - 1
        count = min(wanted, limits.max_draft_tokens, left, limits.buffers.queries - chunk.num_new)
        if request.is_uncached and not len(request.blocks):
            return max(0, count)
        known = chunk.context + chunk.num_new
        while count > 0:
            missing = self._num_blocks(known + count) - request.blocks.end
            if self._gpu(request).blocks.grow(request.blocks, missing):
                break
            count = (request.blocks.end + missing - 1) * limits.block_size - known
        return max(0, count)

    def _take_prefix(self, request: Request) -> bool:
        """Hold the blocks of its first tokens that are there; False while another computes the next one of them."""
        if not self._may_share(request):
            return True
        keys = self._keys(request)
        gpu = self._gpu(request)
        found = gpu.blocks.find(keys[request.blocks.end :])
        gpu.blocks.share(request.blocks, found)
        request.num_published = end = request.blocks.end
        request.num_computed = end * self.limits.block_size
        self._free_hidden(request)
        request.awaits_prefix = end < len(keys) and gpu.claims.is_others(keys[end], request)
        if request.awaits_prefix:
            return False
        gpu.claims.claim(keys[end:], request)
        if request.cached_tokens is None:
            request.cached_tokens = request.num_computed
            self.cached_tokens += request.num_computed
        return True

    def _may_share(self, request: Request) -> bool:
        return self.limits.shares_prefixes and not request.is_uncached

    def _keys(self, request: Request) -> list[Key]:
        """Keys of its full blocks that need not be computed where they are found."""
        size = self.limits.block_size
        return request.keys.first(request.num_reusable // size, request.token_ids, size)

    def _publish(self, request: Request) -> None:
        """Let others find the blocks that are full by now."""
        size = self.limits.block_size
        number, end = request.num_published, request.num_computed // size
        if number >= end or not self.limits.shares_prefixes:
            return
        keys, gpu = request.keys.first(end, request.token_ids, size), self._gpu(request)
        for each in range(max(number, request.blocks.first), end):
            gpu.blocks.publish(request.blocks, each, keys[each])
        gpu.claims.drop(keys[number:], request)
        request.num_published = end

    def _drop_claims(self, request: Request) -> None:
        """It computes no blocks that others wait for."""
        if self._may_share(request):
            self._gpu(request).claims.drop(self._keys(request)[request.num_published :], request)

    def _give_up_blocks(self, request: Request) -> None:
        self._drop_claims(request)
        self._gpu(request).blocks.free(request.blocks)
        request.num_computed = request.num_published = 0
        request.awaits_prefix = False
        request.draft = ()

    def _admit_one(self, request: Request, now: float) -> None:
        self.num_waiting_tokens -= request.num_tokens
        if request.scheduled_time is None:
            self._queue.admit(request, now)
            self.places.release(request)
            self._queue_rate.admit(request.num_tokens)
            request.scheduled_time = now
            request.rank = self._num_admitted
            self._num_admitted += 1
        else:
            heappop(self._preempted)
            self._count_preempted(request, -1)
        insort(self._gpu(request).running, request, key=lambda r: r.order)

    def _next_chunk(self, request: Request, budget: int) -> Chunk | None:
        pending = request.num_tokens - request.num_computed
        if request.is_uncached:
            return Chunk(request, 0, pending, samples=True, recomputed=pending - 1 if request.is_decoding else 0)
        count = min(pending, max(budget, 1 if pending == 1 else 0), self.limits.buffers.queries)
        return Chunk(request, request.num_computed, count, samples=count == pending) if count > 0 else None

    def _reserve(self, request: Request, chunk: Chunk) -> bool:
        """Blocks for `chunk`, preempting from the end of the running list; False where it is the request itself."""
        gpu = self._gpu(request)
        while not gpu.blocks.grow(request.blocks, self._missing_blocks(request, chunk)):
            victim = next(r for r in reversed(gpu.running) if not r.is_uncached)
            gpu.running.remove(victim)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._give_up_blocks(request)
        request.preemptions += 1
        self.preemptions += 1
        self.num_waiting_tokens += request.num_tokens
        heappush(self._preempted, (request.order, request))
        self._count_preempted(request, 1)

    def _count_preempted(self, request: Request, sign: int) -> None:
        self.num_preempted += sign
        self.num_preempted_tokens += sign * request.num_tokens

    def _missing_blocks(self, request: Request, chunk: Chunk) -> int:
        return 0 if request.is_uncached else self._num_blocks(chunk.context + chunk.num_new) - request.blocks.end

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _most_held(self, request: Request) -> int:
        """Blocks that a request holds at once while its tokens are computed, chunk by chunk."""
        return min(self._num_blocks(request.num_tokens), self._most_blocks)

    def _num_wanted(self, request: Request, gpu: _Gpu) -> int:
        """Blocks that one which waits holds at once on a GPU, beside those that others hold there."""
        return self._most_held(request) - self._num_shared(request, gpu)

    def _num_shared(self, request: Request, gpu: _Gpu) -> int:
        """Blocks of its first tokens beyond those that it holds which others hold there, or are about to compute."""
        if not self._may_share(request):
            return 0
        count = 0
        for key in self._keys(request)[request.blocks.end :]:
            found = gpu.blocks.find((key,))
            if not (gpu.blocks.is_held(found[0]) if found else gpu.claims.is_others(key, request)):
                break
            count += 1
        return count

    def _reserved(self, gpu: _Gpu) -> int:
        """Blocks that those that run there still need."""
        return sum(map(self._num_needed, gpu.running))

    def _num_needed(self, request: Request) -> int:
        """Blocks for what is left of a running request's prompt, and at least one to grow into."""
        if request.is_uncached and not len(request.blocks):
            return 0
        left = self._num_blocks(request.num_tokens) - request.blocks.end
        if request.awaits_prefix:
            left -= self._num_shared(request, self._gpu(request))
        return max(1, min(left, self._most_blocks - len(request.blocks)))

    def _num_uncached(self, request: Request) -> int:
        """Blocks that a request's tokens would take which every step computes anew."""
        return self._num_blocks(request.num_tokens) if request.is_uncached and not len(request.blocks) else 0

    def _drop_ended(self) -> None:
        """Requests that ended after they were preempted leave the heap at its top, or here once they are most of it."""
        if len(self._preempted) > 2 * self.num_preempted + _MAX_ENDED_WAITING:
            self._preempted = [entry for entry in self._preempted if entry[1].finish_reason is None]
            heapify(self._preempted)

    def _first_waiting(self, now: float) -> Request | None:
        while self._preempted and self._preempted[0][1].finish_reason is not None:
            heappop(self._preempted)  # ended while it waited
        return self._preempted[0][1] if self._preempted else self._queue.first(now)

    def _divide(self, chunks: Sequence[Chunk]) -> tuple[tuple[Chunk, ...], ...]:
        limits = self.limits
        batches = form_mini_batches(
            chunks, limits.block_size, limits.buffers, limits.costs, limits.windows, pool=limits.in_place
        )
        return tuple(map(in_order, batches))


def _has_room(gpu: _Gpu, num_blocks: int, reserved: int) -> bool:
    """Whether they fit beside `reserved` blocks for those that run: to admit, then preempt, is work lost."""
    return gpu.blocks.num_free >= num_blocks + reserved


def _prefill_tokens(chunk: Chunk) -> int:
    """Tokens of a running request's chunk that count against the prefill budget: all but the one of a decode."""
    return 0 if chunk.is_decode else chunk.num_new


def _rows_behind(row: SamplingRow, draft: tuple[int, ...]) -> Iterator[SamplingRow]:
    """What is sampled behind each token of a draft, as it would be if the request had these."""
    for count in range(1, len(draft) + 1):
        known = draft[:count]
        yield row._replace(
            num_output_tokens=row.num_output_tokens + count,
            token_ids=(*row.token_ids, *known) if row.token_ids else (),
            draft=known,
        )
