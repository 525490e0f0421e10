"""What a step computes, as arrays: packed rows, the copies that fill them, and where new rows are stored.

Requests are ragged, so their rows are packed one after the other. A mini-batch has two buffers on the device:

    kv buffer          one row [K|V] a token: for each request its cached tokens, then its new ones. Attention reads it.
    activation buffer  one row [a] a token cached as activation; regeneration turns it into rows of the kv buffer.

The attention of a single query need not find its rows in one piece. It also reads the KV blocks that lie on the device,
in place: their rows are in no buffer. And its rebuilt rows lie at the front of the kv buffer, in the order of the
activation buffer, so that regeneration writes them where they are read. Where single queries attend to activations as
they are stored, the pool and the buffer that they read are those of activations, and a request's new row follows its
others there. A block that several requests of a mini-batch hold is loaded and rebuilt once, and its rows are copied to
where the others read them; only of those that are attended to as activations each has its own. The layout is the same
in every layer that has the same window, because a block has the same number in all of them: in layers in which
activation blocks hold K and V, by the plan, these are loaded to the rows that regeneration would fill. It has no token
that these layers do not see, so that a single query sees all its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsrpc.request import SamplingParams
from hsrpc.schedule.blocks import BlockKind, PoolId
from hsrpc.schedule.request_state import Matcher, Request
from hsrpc.schedule.sweep import OpList

Ints = npt.NDArray[np.int64]


class Chunk(NamedTuple):
    """One request's part in a step: compute `num_new` tokens behind `context` cached ones."""

    request: Request
    context: int
    num_new: int
    samples: bool
    """Its last token is the newest, so the step samples the next one."""
    previous_row: int | None = None
    """The token is not known yet: it is this one of those that the step before samples."""
    recomputed: int = 0
    """How many of its tokens, from the first, were computed in the step before as well, and not kept."""
    draft: tuple[int, ...] = ()
    """The last of its tokens, which its request may turn out not to have: the step samples behind each of them too."""
    splits: bool = False
    """All that it attends to, and its own tokens, lie where single queries read: each token is such a query."""

    @property
    def is_decode(self) -> bool:
        """Its newest token alone is new, and drafted ones behind it; otherwise it is a part of a prefill."""
        return self.num_new - self.recomputed - len(self.draft) == 1 and self.samples

    @property
    def num_sampled(self) -> int:
        """Rows of logits that are sampled of it: the last ones."""
        return min(self.num_new, 1 + len(self.draft)) if self.samples else 0

    @property
    def reads_in_place(self) -> bool:
        """Its attention reads device KV blocks where they lie: a single query sees all its keys, in any order."""
        return self.num_new == 1 or self.splits

    @property
    def parts(self) -> Iterator[Chunk]:
        """What of it is packed as a chunk of its own; a token sees those before it where they were just stored."""
        if not self.splits:
            yield self
            return
        for number in range(self.num_new):
            token = self.draft[number - 1 : number] if number else ()
            yield self._replace(context=self.context + number, num_new=1, draft=token, splits=False)

    def lies_in(self, pool: PoolId, block_size: int) -> bool:
        """All its tokens, cached and new, lie in blocks of the pool."""
        table = self.request.blocks
        used = (self.context + self.num_new - 1) // block_size + 1 - table.first
        return table.pools[:used].count(pool) == used

    @property
    def scored(self) -> range:
        """Positions of the prompt tokens whose log-probabilities it gives: each by the query of the one before."""
        request = self.request
        if request.params.prompt_logprobs is None:
            return range(0)
        first = max(self.context + 1, request.num_scored)
        return range(first, max(first, min(self.context + self.num_new + 1, request.num_prompt_tokens)))


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
        """Copies of the same rows, row by row."""
        return Rows(expand(self.source, self.count), expand(self.target, self.count))


NO_RUNS = Runs(*(np.zeros(0, dtype=np.int64) for _ in range(3)))


@dataclass(frozen=True, slots=True)
class Rows:
    """Single rows: from `source[i]` to `target[i]`."""

    source: Ints
    target: Ints


NO_ROWS = Rows(*(np.zeros(0, dtype=np.int64) for _ in range(2)))


@dataclass(frozen=True, slots=True)
class InPlace:
    """What the first `d` requests, of one query each, attend to beside their kv-buffer rows from `key_starts` on."""

    tables: Ints
    """[d, max_blocks] numbers of blocks of `pool` in token order, 0 behind a request's last."""
    counts: Ints
    """[d] tokens in them, with the new one where its block is one of them."""
    rebuilt_starts: Ints
    """[d+1] first kv-buffer row rebuilt for each request, then the total: rows of the activation buffer as well, and of
    that alone where activations are read."""
    skips: Ints | None = None
    """[d] of the `counts`, how many from the first on lie behind the window; None: the layers have no window."""
    pool: PoolId = PoolId.DEVICE_KV
    """What is read in place: K and V, or activations."""

    @property
    def num_requests(self) -> int:
        return len(self.counts)

    @property
    def num_visible(self) -> Ints:
        """[d] tokens that are read in place."""
        return self.counts if self.skips is None else self.counts - self.skips

    @property
    def absorbs(self) -> bool:
        """Activations are read, and nothing is rebuilt."""
        return self.pool.kind is BlockKind.ACTIVATION

    @property
    def num_in_front(self) -> int:
        """Rows at the front of the activation buffer."""
        return int(self.rebuilt_starts[-1])

    @property
    def num_rebuilt(self) -> int:
        """Rows at the front of both buffers, rebuilt from one to the other."""
        return 0 if self.absorbs else self.num_in_front

    @property
    def num_absorbed(self) -> int:
        """Rows at the front of the activation buffer that are attended to as they are."""
        return self.num_in_front if self.absorbs else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What layers with the same window read of a mini-batch's requests: `m` activation rows."""

    key_starts: Ints
    """[r+1] first kv-buffer row of each request, then the total."""
    in_place: InPlace
    new_rows: Rows
    """Query rows to kv-buffer rows; those that are attended to in place are not among them."""
    absorbed: Rows
    """Query rows to activation-buffer rows: new ones that are attended to as activations, and are not in place."""
    kv_loads: dict[PoolId, Runs]
    activation_loads: dict[PoolId, Runs]
    activation_rows: Ints
    """[m] kv-buffer row that each activation row becomes; of those that are attended to as they are, none."""
    activation_positions: Ints
    """[m]"""
    copies: Rows = NO_ROWS
    """Rows of blocks that several requests hold, from where these are loaded or rebuilt to where others read them: kv
    buffer to kv buffer."""

    @property
    def num_rows(self) -> int:
        return int(self.key_starts[-1])

    @property
    def rebuilds(self) -> bool:
        return len(self.activation_rows) > self.in_place.num_absorbed


@dataclass(frozen=True, slots=True)
class Scores:
    """Prompt tokens of a mini-batch whose log-probabilities are wanted: `s` of them, in the order of the chunks."""

    rows: Ints
    """[s] query row that tells each."""
    token_ids: Ints
    """[s]"""
    tops: Ints
    """[s] how many of the most probable tokens are wanted beside each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The part of a step that shares device buffers. `n` query rows of `r` requests."""

    token_ids: Ints
    """[n] token ids; for a chunk that continues a step under way, the row of its token among those sampled there."""
    positions: Ints
    """[n]"""
    query_starts: Ints
    """[r+1] first query row of each request, then the total."""
    layouts: tuple[Layout, ...]
    """One for each distinct window of the model's layers, the widest first, which sees what any of them sees."""
    stores: dict[PoolId, Rows]
    """Query rows to pool slots."""
    sample_rows: Ints
    """Query rows whose logits are sampled, in the order of the chunks that sample."""
    scores: Scores | None = None
    """None: no log-probabilities of prompt tokens are wanted."""

    @property
    def num_requests(self) -> int:
        return len(self.query_starts) - 1

    @property
    def num_queries(self) -> int:
        return len(self.token_ids)

    @property
    def widest(self) -> Layout:
        return self.layouts[0]

    @property
    def only_single_queries(self) -> bool:
        """Whether each of its requests has one, which reads in place."""
        return self.widest.in_place.num_requests == self.num_requests


class SamplingRow(NamedTuple):
    """What one row of logits is sampled with. Ids outside the vocabulary are ignored."""

    params: SamplingParams
    num_prompt_tokens: int
    num_output_tokens: int
    seed: int
    """Seed of the request, in [0, 2**64): with the number of output tokens it decides the draw."""
    eos_token_ids: frozenset[int] = frozenset()
    """End tokens of the model."""
    token_ids: Sequence[int] = ()
    """Prompt, then output, where a penalty asks for them."""
    matcher: Matcher | None = None
    """What the output must match; None: nothing. A process that is sent the row is to have it without."""
    draft: tuple[int, ...] = ()
    """Output tokens that it is sampled behind, and which its request may turn out not to have: the last of both
    `token_ids` and `num_output_tokens`."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def excluded_ids(self) -> frozenset[int]:
        """Tokens that are sampled only where nothing else may be: end tokens and stop tokens until the output has
        `params.min_tokens`, and end tokens of a constrained output that goes on past them.
        """
        if self.num_output_tokens < self.params.min_tokens:
            return self.eos_token_ids | frozenset(self.params.stop_token_ids)
        return self.eos_token_ids if self.params.ignore_eos and self.matcher is not None else frozenset()

    @property
    def has_edits(self) -> bool:
        has_matcher = self.matcher is not None
        return has_matcher or bool(self.params.logit_bias) or self.params.has_penalties or bool(self.excluded_ids)


class StepCounts(NamedTuple):
    """Tokens of a step, by what they are for."""

    requests: int
    decode: int
    prefill: int
    recomputed: int
    """Computed in the step before as well."""
    context: int
    """Cached tokens of all its requests."""
    drafted: int = 0
    """Computed behind the newest ones of their requests, which may turn out not to have them."""


@dataclass(slots=True)
class StopFlag:
    """Set once nobody waits for a step any more, or it cannot be computed to its end; never taken back."""

    is_set: bool = False
    tell: Callable[[], object] | None = None
    """Called when it is set: other processes may compute the step."""

    def set(self) -> None:
        self.is_set = True
        if self.tell is not None:
            self.tell()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """What the scheduler decided for a step. Its chunks' blocks and tokens stay as they are until it is committed."""

    step_id: int
    mini_batches: tuple[tuple[Chunk, ...], ...]
    """Chunks of each mini-batch; those that read in place come first."""
    sampling: tuple[SamplingRow, ...]
    """Rows of the chunks that sample, in mini-batch order."""
    stop: StopFlag
    arrays: tuple[MiniBatch, ...] | None = None
    """Arrays of the mini-batches, where they are made already."""
    is_in_place: bool = False
    """It is one mini-batch of decode that uses no buffer, on each GPU that computes any of it."""

    def of_gpu(self, gpu: int) -> Scheduled:
        """What one of several GPUs computes of it; its rows to sample are known at its turn."""
        numbers = [number for number, chunks in enumerate(self.mini_batches) if chunks[0].request.gpu == gpu]
        return replace(
            self,
            mini_batches=tuple(self.mini_batches[number] for number in numbers),
            sampling=(),
            arrays=None if self.arrays is None else tuple(self.arrays[number] for number in numbers),
            is_in_place=self.is_in_place and bool(numbers),
        )

    @property
    def chunks(self) -> Iterator[Chunk]:
        """Chunks in mini-batch order."""
        return (chunk for chunks in self.mini_batches for chunk in chunks)

    @property
    def counts(self) -> StepCounts:
        chunks = list(self.chunks)
        decode, recomputed = sum(c.is_decode for c in chunks), sum(c.recomputed for c in chunks)
        drafted = sum(len(c.draft) for c in chunks)
        return StepCounts(
            requests=len(chunks),
            decode=decode,
            prefill=sum(c.num_new for c in chunks) - decode - recomputed - drafted,
            recomputed=recomputed,
            drafted=drafted,
            context=sum(c.context for c in chunks),
        )


@dataclass(slots=True, kw_only=True)
class Packed:
    """What a step computes: plain data, which can be sent to another process."""

    step_id: int
    mini_batches: tuple[MiniBatch, ...]
    sampling: tuple[SamplingRow, ...]
    """Settings for each row that is sampled, in mini-batch order."""
    counts: StepCounts
    is_in_place: bool = False
    """It is one mini-batch of decode that uses no buffer, on each GPU that computes any of it."""
    is_ahead: bool = False
    """It continues with tokens that the step before has still to sample."""

    @property
    def num_sampled(self) -> int:
        """Rows of logits that are sampled."""
        return sum(len(batch.sample_rows) for batch in self.mini_batches)


@dataclass(slots=True, kw_only=True)
class Step(Packed):
    """One sweep over the layers for every request in it."""

    ops: OpList
    stop: StopFlag


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Seconds a layer takes for one row of the kv buffer: loaded as KV or activation, rebuilt from it, or computed."""

    load_kv: float
    load_activation: float
    regenerate: float
    compute: float = 0.0
    """Seconds to compute a row from the layer's input to its output."""


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
