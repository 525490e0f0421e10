"""The scheduler on random traces, with pools that hold token ids: no request and no block is ever lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2s

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.core.batch import BufferLimits, MiniBatch, RowCosts, Step, Work
from hsrpc.core.blocks import BlockManager, PoolId
from hsrpc.core.request import FinishReason, Request, SamplingParams
from hsrpc.core.scheduler import Output, Scheduler, SchedulerLimits

EOS = 0
VOCAB = 12
LIMITS = SchedulerLimits(
    max_batch=4,
    max_model_len=24,
    max_prefill_tokens=8,
    block_size=4,
    buffers=BufferLimits(rows=24, activation_rows=24, queries=12),
    costs=RowCosts(1.0, 0.5, 0.1),
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

    def __init__(self, num_blocks: dict[PoolId, int], share: float, limits: SchedulerLimits) -> None:
        self.scheduler = Scheduler(BlockManager(num_blocks, share), limits, [EOS])
        self.limits = limits
        self.slots: dict[tuple[PoolId, int], tuple[int, int]] = {}
        self.requests: list[Request] = []
        self.prompts: list[list[int]] = []
        self.ended: dict[int, FinishReason] = {}
        """Reason by arrival, as the scheduler's outputs told."""
        self.step: Step | None = None

    @property
    def running(self) -> list[Request]:
        return list(self.scheduler._running)

    @property
    def waiting(self) -> list[Request]:
        running = self.running
        return [request for request in self.scheduler.live() if request not in running]

    def add(self, prompt: list[int], params: SamplingParams, request_id: str | None = None) -> Request:
        request = Request(request_id or str(len(self.requests)), prompt, params, len(self.requests), 0.0)
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

    def schedule(self) -> Step | None:
        """A step, checked against the contract."""
        before = self.running
        preemptions = {request.arrival: request.preemptions for request in self.requests}
        self.step = self.scheduler.schedule(1.0)
        self.check()
        preempted = [request for request in before if request.preemptions > preemptions[request.arrival]]
        self._check_preempted(before, preempted)
        if self.step is None:
            assert not self.scheduler.has_work
            return None
        self._check_works(self.step.works, [request for request in before if request not in preempted])
        return self.step

    def _check_preempted(self, before: list[Request], preempted: list[Request]) -> None:
        """Those that came last gave way, all of their blocks with them, and not to be admitted at once."""
        assert preempted == before[len(before) - len(preempted) :]
        for request in preempted:
            assert request in self.waiting
            assert len(request.blocks) == request.num_computed == 0

    def _check_works(self, works: tuple[Work, ...], kept: list[Request]) -> None:
        requests = [work.request for work in works]
        assert len(set(map(id, requests))) == len(requests)
        assert all(request in self.running and request.in_flight for request in requests)
        assert self.running[0] in requests
        for request in kept:
            assert request in requests or request.num_tokens - request.num_computed > 1
        admitted = [request for request in self.running if request not in kept]
        assert all(request in requests for request in admitted)
        assert all(a.order < b.order for a in admitted for b in self.waiting)
        for work in works:
            self._check_work(work)
        if self.limits.keeps_cache:
            prompts = [w for w in works if w.request.num_tokens - w.request.num_computed > 1 or w.request in admitted]
            assert sum(work.count for work in prompts) <= self.limits.max_prefill_tokens

    def _check_work(self, work: Work) -> None:
        request = work.request
        assert work.count >= 1
        assert work.context == request.num_computed
        assert work.samples == (work.context + work.count == request.num_tokens)
        blocks = -(-(work.context + work.count) // self.limits.block_size) if self.limits.keeps_cache else 0
        assert len(request.blocks) == blocks

    def commit(self, failed: Callable[[Request], bool] = lambda _: False) -> list[Output]:
        """Compute the step from what the pools hold, and commit it."""
        assert self.step is not None
        tokens = {t[0].request_id: t for batch in self.step.mini_batches for t in self._compute(batch)}
        sampled = [work.request for work in self.step.sampled]
        live = [request for request in sampled if request.finish_reason is None]
        token_ids = [None if failed(request) else tokens[request.request_id][1] for request in sampled]
        works, self.step = self.step.works, None
        outputs = self.scheduler.commit(Step(0, ()) if False else self._last(works), token_ids, 2.0)
        assert [output.request for output in outputs] == live
        for output in outputs:
            self._note(output)
        for work in works:
            request = work.request
            assert not request.in_flight
            if request.finish_reason is None and self.limits.keeps_cache:
                assert request.num_computed == work.context + work.count == request.num_tokens - work.samples
        self.check()
        return outputs
