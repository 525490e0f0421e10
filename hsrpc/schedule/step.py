"""What a step computes, as arrays: packed rows, the copies that fill them, and where new rows are stored.

Requests are ragged, so their rows are packed one after the other. A mini-batch has two buffers on the device:

    kv buffer          one row [K|V] a token: for each request its cached tokens, then its new ones. Attention reads it.
    activation buffer  one row [h] a token cached as activation; regeneration turns it into rows of the kv buffer.

The attention of a single query need not find its rows in one piece. It also reads the KV blocks that lie on the device,
in place: their rows are in no buffer. And its rebuilt rows lie at the front of the kv buffer, in the order of the
activation buffer, so that regeneration writes them where they are read. The layout is the same in every layer, because
a block has the same number in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.request_state import Request

Ints = npt.NDArray[np.int64]


class Work(NamedTuple):
    """One request's part in a step: compute `num_new` tokens behind `context` cached ones."""

    request: Request
    context: int
    num_new: int
    samples: bool
    """The last of its tokens is the newest, so the step samples the next one."""
    source: int | None = None
    """The token is not known yet: it is this one of those that the step before samples."""
    recomputed: int = 0
    """Of its tokens, the first ones that were computed in the step before as well, and not kept."""

    @property
    def is_decode(self) -> bool:
        """Of its tokens the newest alone is new; otherwise it is a chunk of a prefill."""
        return self.num_new - self.recomputed == 1 and self.samples

    def reads_in_place(self, window: int | None) -> bool:
        """Its attention reads device KV blocks where they lie; a sliding window's mask needs packed rows."""
        return self.num_new == 1 and window is None


@dataclass(frozen=True, slots=True)
class Runs:
    """Copies of neighbouring rows: `count[i]` rows from `source[i]` on to `target[i]` on, in a pool and a buffer."""

    source: Ints
    target: Ints
    count: Ints

    @property
    def num_rows(self) -> int:
        return int(self.count.sum())

    def where(self, chosen: npt.NDArray[np.bool_]) -> Runs:
        """Some of them."""
        return Runs(self.source[chosen], self.target[chosen], self.count[chosen])

    def rows(self) -> Rows:
        """The same copies row by row."""
        return Rows(expand(self.source, self.count), expand(self.target, self.count))


@dataclass(frozen=True, slots=True)
class Rows:
    """Single rows: from `source[i]` to `target[i]`."""

    source: Ints
    target: Ints


@dataclass(frozen=True, slots=True)
class InPlace:
    """What the first `d` requests, of one query each, attend to beside their kv-buffer rows from `key_starts` on."""

    tables: Ints
    """[d, most blocks] numbers of device KV blocks in token order, 0 behind a request's last."""
    counts: Ints
    """[d] tokens in them, with the new one where its block is one of them."""
    rebuilt_starts: Ints
    """[d+1] first kv-buffer row rebuilt for each request, then the total: rows of the activation buffer as well."""

    @property
    def num_requests(self) -> int:
        return len(self.counts)

    @property
    def num_rebuilt(self) -> int:
        return int(self.rebuilt_starts[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The part of a step that shares device buffers. `n` query rows of `r` requests; `m` activation rows."""

    works: tuple[Work, ...]
    """Those that read in place come first."""
    token_ids: Ints
    """[n] or, for works with a source, the source."""
    positions: Ints
    """[n]"""
    query_starts: Ints
    """[r+1] first query row of each request, then the total."""
    key_starts: Ints
    """[r+1] first kv-buffer row of each request, then the total."""
    in_place: InPlace
    new_rows: Rows
    """Query rows to kv-buffer rows; those that are attended to in place are not among them."""
    kv_loads: dict[PoolId, Runs]
    activation_loads: dict[PoolId, Runs]
    activation_rows: Ints
    """[m] kv-buffer row that each activation row becomes."""
    activation_positions: Ints
    """[m]"""
    stores: dict[PoolId, Rows]
    """Query rows to pool slots."""
    sample_rows: Ints
    """Query rows whose logits are sampled, in the order of the works that sample."""

    @property
    def num_queries(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        return int(self.key_starts[-1])


@dataclass(slots=True)
class Step:
    """One sweep over the layers for every request in it, whose blocks stay as they are until it is committed."""

    number: int
    parts: tuple[tuple[Work, ...], ...]
    """The works of each mini-batch."""
    pack: Callable[[], tuple[MiniBatch, ...]]
    """Makes their arrays."""
    is_in_place: bool = False
    """It is one mini-batch of decode that uses no buffer."""
    is_given_up: bool = False
    """It cannot be computed to its end."""
    works: tuple[Work, ...] = field(init=False)
    """In mini-batch order."""
    sampled: list[Work] = field(init=False)
    """The works that sample, in the order in which the executor returns tokens."""
    _mini_batches: tuple[MiniBatch, ...] | None = field(init=False, default=None)
    _laying_out: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        self.works = tuple(work for part in self.parts for work in part)
        self.sampled = [work for work in self.works if work.samples]

    @property
    def mini_batches(self) -> tuple[MiniBatch, ...]:
        """Made by the thread that asks first: of a large batch in milliseconds, which the event loop does not have."""
        with self._laying_out:
            if self._mini_batches is None:
                self._mini_batches = self.pack()
            return self._mini_batches

    @property
    def is_ahead(self) -> bool:
        """It continues with tokens that the step before has still to sample."""
        return any(work.source is not None for work in self.works)

    @property
    def is_abandoned(self) -> bool:
        """Nobody waits for any of it any more, or it was given up."""
        return self.is_given_up or all(work.request.finish_reason is not None for work in self.works)


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Seconds a layer takes for one row of the kv buffer: loaded as KV or activation, rebuilt from it, or computed."""

    load_kv: float
    load_activation: float
    regenerate: float
    compute: float = 0.0
    """From the layer's input, and on to its output."""


@dataclass(frozen=True, slots=True)
class BufferLimits:
    """Rows that fit the buffers of one mini-batch."""

    rows: int
    activation_rows: int
    queries: int


def expand(first: Ints, counts: Ints) -> Ints:
    """`first[i], first[i]+1, ...` `counts[i]` times, for each i in turn."""
    offsets = starts(counts)
    return np.repeat(first - offsets[:-1], counts) + np.arange(offsets[-1], dtype=np.int64)


def starts(counts: Ints) -> Ints:
    """Running totals from 0: [n+1]."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))
