"""A live request: its tokens, what of them is cached, and its life."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hsrpc.request import FinishReason, SamplingParams, Timings
from hsrpc.schedule.blocks import BlockTable
from hsrpc.schedule.prefixes import BlockKeys


class Matcher(Protocol):
    """What an output must match: it follows the tokens, and tells which may come next."""

    @property
    def failure(self) -> str | None:
        """Why it can tell no more; None: it can."""
        ...

    def push(self, token_id: int) -> None:
        """Take note of an output token."""
        ...

    def allowed(self, num_drafted: int = 0) -> npt.NDArray[np.int32]:
        """A bit for each token, the first in the lowest bit of the first word, set where the token may come next.

        `num_drafted`: behind so many tokens of the step's draft. Waits until that is known; none is set after a
        failure, nor behind a drafted token that may not come.
        """
        ...

    def matched(self, draft: Sequence[int]) -> int:
        """How many of the `draft` may come next, one after the other. Not while a step is under way."""
        ...


class Request:
    """A live request: its tokens, what of them is cached, and the clock of its life (monotonic seconds)."""

    __slots__ = (
        "arrival",
        "arrival_time",
        "awaits_prefix",
        "blocks",
        "cached_tokens",
        "client",
        "draft",
        "finish_reason",
        "first_token_time",
        "gpu",
        "in_flight",
        "is_uncached",
        "keys",
        "matcher",
        "max_total_tokens",
        "num_accepted",
        "num_computed",
        "num_drafted",
        "num_prompt_tokens",
        "num_published",
        "num_scored",
        "params",
        "preemptions",
        "rank",
        "request_id",
        "salt",
        "scheduled_time",
        "token_ids",
        "user",
    )

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        arrival: int,
        now: float,
        *,
        client: str = "",
        user: str = "",
        salt: str = "",
    ) -> None:
        """`salt`: requests of equal salt alone share blocks, and learn from each other what may come next."""
        self.request_id = request_id
        self.client = client
        """Whose share it takes."""
        self.user = user
        """Whose part of that share."""
        self.salt = salt
        self.params = params
        self.matcher: Matcher | None = None
        """What follows `params.constraint`; it stays with the request when that is preempted."""
        self.token_ids = list(prompt)
        """Prompt, then output."""
        self.num_prompt_tokens = len(self.token_ids)
        self.max_total_tokens = sys.maxsize if params.max_tokens is None else self.num_prompt_tokens + params.max_tokens
        """That it may come to have; the scheduler allows no more than fit the context."""
        self.num_computed = 0
        """Tokens whose K and V, or activations, are in `blocks`."""
        self.draft: Sequence[int] = ()
        """Tokens that it may have next: what the next step computes of them it takes away."""
        self.num_drafted = 0
        """Tokens drafted for it that steps computed."""
        self.num_accepted = 0
        """Those of them that it came to have."""
        self.num_scored = 1
        """Prompt tokens whose log-probabilities are reported, where they are asked for; the first has none."""
        self.blocks = BlockTable()
        self.keys = BlockKeys(salt)
        self.num_published = 0
        """Its blocks, from the first on, that others were let find, or that it found."""
        self.awaits_prefix = False
        """It runs, and computes nothing until another has computed blocks that it shares."""
        self.cached_tokens: int | None = None
        """Tokens that were found when it was first computed; None: it was not."""
        self.arrival = arrival
        self.rank = math.inf
        """How many requests were admitted before it; infinite until it is admitted itself."""
        self.is_uncached = False
        """It keeps no blocks: each step recomputes all of its tokens."""
        self.preemptions = 0
        self.gpu = 0
        """Number of the GPU that has its blocks, once it is admitted."""
        self.in_flight = 0
        """Steps that compute it, handed out and not committed."""
        self.finish_reason: FinishReason | None = None
        self.arrival_time = now
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None

    @property
    def order(self) -> tuple[float, int]:
        """Sort key of running requests: the last is preempted first. It never changes while the request runs."""
        return self.rank, self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_reusable(self) -> int:
        """Its first tokens that need not be computed where they are cached: all but the newest.

        While the prompt is scored, those before the one that tells the next log-probability.
        """
        is_scored = self.params.prompt_logprobs is None or self.num_scored == self.num_prompt_tokens
        return self.num_tokens - 1 if is_scored else self.num_scored - 1

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Its newest token alone is to be computed for the first time."""
        is_computed = self.is_uncached or self.num_tokens - self.num_computed == 1
        return is_computed and self.num_output_tokens > 0

    def has_room_for_next(self, block_size: int) -> bool:
        """Its newest token alone is to be computed, and a block for it is there."""
        known = self.num_computed
        return len(self.token_ids) - known == 1 and known < self.blocks.end * block_size

    def timings(self, now: float) -> Timings:
        """The parts of its life so far; a part that did not begin is 0."""
        scheduled = now if self.scheduled_time is None else self.scheduled_time
        first_token = now if self.first_token_time is None else self.first_token_time
        return Timings(
            queue=scheduled - self.arrival_time,
            prefill=first_token - scheduled,
            decode=now - first_token,
            first_token=first_token - self.arrival_time,
        )
