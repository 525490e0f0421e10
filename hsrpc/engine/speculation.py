"""Asks a drafter, between two steps, for what the requests that decode may go on with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from operator import index
from typing import NamedTuple

from hsrpc.draft.drafter import Drafter, Wanted
from hsrpc.engine.draft_lengths import DraftLengths
from hsrpc.engine.worker import Worker
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler

_log = logging.getLogger(__name__)

_REST = 8
"""Steps that are launched ahead, where that is possible, after one of which nothing was drafted."""


class _Asked(NamedTuple):
    """A request, and what the drafter is told of it."""

    request: Request
    wanted: Wanted


class Speculation:
    """Gives requests their drafts. Whatever a drafter answers, no request fails by it."""

    def __init__(self, drafter: Drafter | None, scheduler: Scheduler, lengths: DraftLengths, vocab_size: int) -> None:
        """`drafter` None: there are no drafts."""
        self._drafter = drafter
        self._scheduler = scheduler
        self._lengths = lengths
        self._vocab_size = vocab_size
        self._known: dict[str, Request] = {}
        """Requests that may have been asked about, and that the drafter was not told to forget."""
        self._num_left_out = 0
        """Steps that may still go without being asked about."""

    def leave_out(self) -> bool:
        """Whether the next step is to be as it is without drafts: it can be launched ahead of its tokens then."""
        if self._drafter is None:
            return True
        self._num_left_out -= 1
        return self._num_left_out >= 0

    async def draft(self, worker: Worker) -> None:
        """Give those that decode in the next step their drafts; the drafter runs on the worker's thread."""
        drafter = self._drafter
        if drafter is None:
            return
        ended = self._take_ended()
        candidates = self._scheduler.draft_candidates()
        self._known |= {each.request.request_id: each.request for each in candidates}
        asked = [
            _Asked(candidate.request, _wanted(candidate.request, length))
            for candidate, length in zip(candidates, self._lengths.choose(candidates), strict=True)
            if length > 0
        ]
        if not asked and not ended:
            self._num_left_out = _REST
            return
        try:
            drafts = await worker.run(partial(self._ask, drafter, asked, ended))
        except Exception as error:
            # A drafter may raise anything; requests go on without it.
            _log.error("the drafter failed: no more tokens are drafted", exc_info=error)
            self._drafter = None
            return
        for each, draft in zip(asked, drafts, strict=True):
            each.request.draft = draft
        self._num_left_out = 0 if any(drafts) else _REST

    def _take_ended(self) -> list[str]:
        """Those that have ended since: another may have the id of one of them by now."""
        ended = [name for name, request in self._known.items() if request.finish_reason is not None]
        for name in ended:
            del self._known[name]
        self._lengths.forget(ended)
        return ended

    def _ask(self, drafter: Drafter, asked: Sequence[_Asked], ended: Sequence[str]) -> list[tuple[int, ...]]:
        if ended:
            drafter.forget(ended)
        if not asked:
            return []
        drafts = drafter.draft([each.wanted for each in asked])
        return [self._usable(each, draft) for each, draft in zip(asked, drafts, strict=True)]

    def _usable(self, asked: _Asked, draft: Iterable[int]) -> tuple[int, ...]:
        """The first tokens of a draft, as far as the request could go on with them."""
        usable: list[int] = []
        for token_id in map(index, draft):
            if len(usable) == asked.wanted.max_tokens or not 0 <= token_id < self._vocab_size:
                break
            usable.append(token_id)
        matcher = asked.request.matcher
        return tuple(usable if matcher is None else usable[: matcher.matched(usable)])


def _wanted(request: Request, max_tokens: int) -> Wanted:
    token_ids, num_prompt_tokens = request.token_ids, request.num_prompt_tokens
    return Wanted(request.request_id, request.salt, token_ids, num_prompt_tokens, max_tokens, request.gpu)
