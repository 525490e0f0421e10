"""A draft model on each of several GPUs: a rank drafts for the requests that run on its GPU, when it is asked to.

It is asked between two steps, as a drafter of the front process is, and not left to draft behind what it has sampled:
how many tokens are drafted of whom follows from what is committed, from constraints, and from who was admitted,
preempted or has left, all of which the front process alone knows. That takes a message to each rank and one back, and
all ranks draft at once. A message has the tokens that a rank does not know yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from hsrpc.draft.drafter import Drafter, Wanted
from hsrpc.engine.gpus.messages import Draft, Drafted, Forget
from hsrpc.errors import EngineFaultError

_log = logging.getLogger(__name__)


class DraftingRank(Protocol):
    """What is asked of a rank that drafts."""

    def send(self, message: Draft | Forget) -> None:
        """Tell it; on the event loop."""

    def drafted(self) -> Drafted | None:
        """Wait for its answer, on another thread; None: the rank has ended."""


class _Told(NamedTuple):
    """What a rank knows of a request."""

    gpu: int
    num_tokens: int


class FarDrafter:
    """The draft models of all ranks as the front process sees them: a drafter, which asks each for its requests."""

    def __init__(self, ranks: Sequence[DraftingRank], call_soon: Callable[..., object]) -> None:
        """`call_soon`: has the event loop of the ranks call what it is given, from whatever thread."""
        self._ranks = ranks
        self._call_soon = call_soon
        self._told: dict[str, _Told] = {}
        """Requests that a rank knows."""

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        """The drafts of the ranks on which the requests run.

        Raises:
            RuntimeError: a rank could not draft.
            EngineFaultError: a rank has ended.
        """
        self.forget([each.request_id for each in wanted if self._has_moved(each)])
        asked: dict[int, list[Wanted]] = {}
        for each in wanted:
            asked.setdefault(each.gpu, []).append(self._tell(each))
        for gpu, of_gpu in asked.items():
            self._send(gpu, Draft(of_gpu))
        answers = {gpu: self._ranks[gpu].drafted() for gpu in asked}  # of all: none is left for the next time
        drafts = {gpu: iter(_drafts(gpu, answer)) for gpu, answer in answers.items()}
        return [next(drafts[each.gpu]) for each in wanted]

    def forget(self, request_ids: Collection[str]) -> None:
        """Let the ranks free what they hold for requests that have ended, or run elsewhere."""
        ended: dict[int, list[str]] = {}
        for request_id in request_ids:
            if (told := self._told.pop(request_id, None)) is not None:
                ended.setdefault(told.gpu, []).append(request_id)
        for gpu, of_gpu in ended.items():
            self._send(gpu, Forget(of_gpu))

    def _has_moved(self, wanted: Wanted) -> bool:
        told = self._told.get(wanted.request_id)
        return told is not None and told.gpu != wanted.gpu

    def _tell(self, wanted: Wanted) -> Wanted:
        """The request with the tokens alone that its rank does not know, and will."""
        known = self._told.get(wanted.request_id, _Told(wanted.gpu, 0)).num_tokens
        self._told[wanted.request_id] = _Told(wanted.gpu, len(wanted.token_ids))
        return wanted._replace(token_ids=wanted.token_ids[known:])

    def _send(self, gpu: int, message: Draft | Forget) -> None:
        self._call_soon(self._ranks[gpu].send, message)


def _drafts(gpu: int, answer: Drafted | None) -> Sequence[Sequence[int]]:
    if answer is None:
        raise EngineFaultError(f"the process of GPU {gpu} has ended")
    if answer.drafts is None:
        raise RuntimeError(f"GPU {gpu} could not draft; its log says why")
    return answer.drafts


class NearDrafter:
    """A drafter as its rank asks it: it puts the tokens of requests together as they are told."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._token_ids: dict[str, list[int]] = {}

    def draft(self, message: Draft) -> Drafted:
        """What the front process is to be told."""
        try:
            return Drafted(self._drafter.draft([self._whole(each) for each in message.wanted]))
        except Exception as error:
            # Whatever it is, requests go on without drafts.
            _log.error("the draft model failed", exc_info=error)
            return Drafted(None)

    def forget(self, message: Forget) -> None:
        """Free what is held for requests."""
        for request_id in message.request_ids:
            self._token_ids.pop(request_id, None)
        self._drafter.forget(message.request_ids)

    def _whole(self, wanted: Wanted) -> Wanted:
        token_ids = self._token_ids.setdefault(wanted.request_id, [])
        token_ids += wanted.token_ids
        return wanted._replace(token_ids=token_ids)
