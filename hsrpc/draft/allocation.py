"""How many tokens are drafted for each request of a step: as many as raise tokens/s.

A row is a token that the step computes. With `n` drafted rows a step takes

    step + first + d * token + max(0, n * read + max(0, n - free) * row - spare)

seconds, where `first` counts if there is any row, `d` is the length of the longest draft, for which a draft model takes
`token` each, and `spare` is what the GPU would wait for the bus anyway: much where
weights stream, nothing where all is resident. A request of acceptance `p` gains `p**j` tokens by its j-th row. Rows are
taken in the order of what they gain, up to where tokens a second are most; where rows cost nothing, as long as they
gain anything to speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hsrpc.draft.acceptance import Acceptance

MIN_GAIN = 0.01
"""Tokens that a row has to gain, at least; one that nothing waits for still takes its drafter and memory time."""
PROBE_TOKENS = 4
"""Tokens of a probe: right ones change an estimate at once, wrong ones count as one."""
MIN_IDLE = 32
"""Steps after which a request that was not asked for a draft is probed."""
_PROBED = 1 / 64
"""Part of a step's seconds that probes may add; one is made in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrice:
    """What drafted rows cost a step. Seconds, all layers."""

    step_seconds: float
    """The step without any."""
    row_seconds: float
    """GPU time of a row's products."""
    read_seconds: float = 0.0
    """GPU time of what a row alone reads, however few there are: what its request has cached, where that is read in
    place."""
    free_rows: int = 0
    """Rows whose products take no GPU time, since the others leave the GPU waiting for device memory."""
    spare_seconds: float = 0.0
    """GPU time that the step has beside the bus; 0 where all is resident."""
    first_seconds: float = 0.0
    """That a step takes longer with any draft, whatever its rows take: without, it may be launched as a graph."""
    token_seconds: float = 0.0
    """That each token of the longest draft takes a draft model, which nothing hides."""
    max_rows: int
    """Rows for which the step has room in its buffers."""

    @property
    def num_free(self) -> int:
        """Rows that make no step longer, but for what the first of them adds."""
        free = (self.spare_seconds + self.free_rows * self.row_seconds) / (self.read_seconds + self.row_seconds)
        return int(min(free, self.spare_seconds / self.read_seconds) if self.read_seconds else free)

    def seconds(self, rows: npt.NDArray[np.int64], longest: npt.NDArray[np.int64] | int) -> npt.NDArray[np.float64]:
        """The step with so many drafted rows, of which a request has the `longest` draft."""
        compute = rows * self.read_seconds + np.maximum(0, rows - self.free_rows) * self.row_seconds
        first = np.where(rows > 0, self.first_seconds, 0.0)
        drafting = longest * self.token_seconds
        return self.step_seconds + first + drafting + np.maximum(0.0, compute - self.spare_seconds)


@dataclass(frozen=True, slots=True)
class Draftable:
    """A request that decodes, and may go on with drafted tokens."""

    acceptance: Acceptance
    max_tokens: int
    """Tokens to draft, at most; may be 0."""


def allocate(requests: Sequence[Draftable], price: StepPrice) -> list[int]:
    """Tokens to draft for each of all requests that decode in a step, at most."""
    if not any(request.max_tokens for request in requests):
        return [0] * len(requests)
    chances = np.array([request.acceptance.chance for request in requests])
    limits = np.array([request.max_tokens for request in requests])
    depths = np.arange(1, limits.max() + 1)[:, None]
    gains = np.where(depths <= limits, chances**depths, 0.0)
    """[depths, requests]; never more in a greater depth."""
    order = np.argsort(-gains, axis=None, kind="stable")[: np.count_nonzero(gains >= MIN_GAIN)][: price.max_rows]
    tokens = len(requests) + np.concatenate(([0.0], np.cumsum(gains.flat[order])))
    longest = np.maximum.accumulate(np.concatenate(([0], order // len(requests) + 1)))
    best = int(np.argmax(tokens / price.seconds(np.arange(len(tokens)), longest)))
    counts: list[int] = np.bincount(order[:best] % len(requests), minlength=len(requests)).tolist()
    for request in _probed(requests, counts, price):
        counts[request] = min(PROBE_TOKENS, requests[request].max_tokens)
    return counts


def _probed(requests: Sequence[Draftable], counts: Sequence[int], price: StepPrice) -> list[int]:
    """Numbers of requests that get nothing and are to be tried again: those that have waited longest."""
    idle = [
        number
        for number, (request, count) in enumerate(zip(requests, counts, strict=True))
        if count == 0 and request.max_tokens and request.acceptance.num_idle >= MIN_IDLE
    ]
    rows = sum(counts) + PROBE_TOKENS * np.arange(1, len(idle) + 1)
    longest = max(counts, default=0)
    seconds = price.seconds(np.array([sum(counts)]), longest)
    probed = price.seconds(rows, max(PROBE_TOKENS, longest))
    affordable = int(np.count_nonzero(probed <= seconds * (1 + _PROBED)))
    fitting = int(np.count_nonzero(rows <= price.max_rows))
    return sorted(idle, key=lambda number: -requests[number].acceptance.num_idle)[: min(fitting, max(1, affordable))]
