"""Samples the next token of every request in a batch, in two halves: launch on the device, result on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hsrpc.model.logits import draw, edit, to_device
from hsrpc.request import TokenLogprob
from hsrpc.schedule.step import SamplingRow

Fetch: TypeAlias = Callable[[Tensor], Callable[[], Tensor]]
"""Begins to copy a tensor to the host, on the current stream; what it returns waits for the copy and gives it."""

_FAILED = -1
_MAX_PARTIAL_SORT = 1024
"""Up to this top-k the k largest logits are selected; above it, and for top-p alone, all are sorted."""


class Sampled(NamedTuple):
    """One row's token."""

    token_id: int
    """-1 where the row failed."""
    logprob: TokenLogprob | None
    failed: bool
    """The model's logits held NaN or infinity, or nothing but minus infinity, or the row's constraint allows no token
    that they leave: there is none, for this row alone."""


@dataclass(frozen=True, slots=True)
class PendingSample:
    """Tokens that are on their way from the device to the host."""

    rows: Sequence[SamplingRow]
    on_device: Tensor
    """[n] int64 where the logits are; -1 where a row failed."""
    token_ids: Callable[[], Tensor]
    """[n] int64 in host memory."""
    logprobs: Sequence[tuple[Sequence[int], Callable[[], Tensor]]]
    """Rows and their [rows, 2 + 2 * top] float64: logprob, rank, ids of the most probable tokens, their logprobs."""

    def result(self) -> list[Sampled]:
        """Waits for the device; one for each row of logits, in their order."""
        logprobs = {
            index: values
            for indices, table in self.logprobs
            for index, values in zip(indices, table().tolist(), strict=True)
        }
        return [
            _sampled(token_id, row, logprobs.get(index))
            for index, (token_id, row) in enumerate(zip(self.token_ids().tolist(), self.rows, strict=True))
        ]


class Sampler:
    """Samples rows of logits, each as its own parameters say, whatever else is in the batch.

    Rows that are not plainly greedy are worked on a few at a time, so that the working memory on the device stays
    below about `chunk_elements` * 60 bytes (or one row's, where a row is larger).
    """

    def __init__(self, fetch: Fetch, chunk_elements: int = 2**22) -> None:
        self._fetch = fetch
        self._chunk_elements = chunk_elements

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingSample:
        """Starts sampling logits [n, vocab] with `n` rows, on the current stream; waits for rows' matchers alone.

        Raises:
            ValueError: not one row for each row of logits.
        """
        if len(rows) != logits.shape[0]:
            raise ValueError(f"rows: {len(rows)} for {logits.shape[0]} rows of logits; give one for each")
        best, token_ids = logits.max(dim=-1)
        routes = [_route(row) for row in rows]
        for route in sorted({*routes} - {_PLAIN}):
            for indices in self._chunks([i for i, of_row in enumerate(routes) if of_row == route], logits.shape[1]):
                self._choose(logits, [rows[i] for i in indices], indices, route, token_ids)
        # An infinite or NaN maximum: such logits have no distribution.
        token_ids = torch.where(best.isfinite(), token_ids, _FAILED)
        logprobs = self._logprobs(logits, rows, token_ids)
        return PendingSample(rows, token_ids, self._fetch(token_ids), logprobs)

    @torch.inference_mode()
    def score(self, logits: Tensor, token_ids: Tensor, top: int) -> Callable[[], Tensor]:
        """Starts to find the log-probabilities of tokens [n] under logits [n, vocab], and of the `top` most probable.

        What it returns waits for the device, and is a table as `PendingSample.logprobs` has them.
        """
        return self._fetch(_logprob_table(logits, token_ids, min(top, logits.shape[1])))

    def _choose(
        self, logits: Tensor, rows: Sequence[SamplingRow], indices: Sequence[int], route: int, token_ids: Tensor
    ) -> None:
        index = _index(indices, logits.device)
        edited = edit(logits.index_select(0, index).float(), rows)
        if route == _GREEDY:
            chosen = edited.argmax(dim=-1)
        else:
            max_rank = {_ALL: 0, _TOP_K: max(row.params.top_k for row in rows), _SORTED: logits.shape[1]}[route]
            chosen = draw(edited, rows, min(max_rank, logits.shape[1]))
        is_possible = edited.amax(dim=-1) > -torch.inf  # a constraint may leave nothing
        token_ids.index_copy_(0, index, torch.where(is_possible, chosen, _FAILED))

    def _logprobs(
        self, logits: Tensor, rows: Sequence[SamplingRow], token_ids: Tensor
    ) -> list[tuple[Sequence[int], Callable[[], Tensor]]]:
        wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        tables: list[tuple[Sequence[int], Callable[[], Tensor]]] = []
        for indices in self._chunks(wanted, logits.shape[1]):
            index = _index(indices, logits.device)
            top = min(max(rows[i].params.logprobs or 0 for i in indices), logits.shape[1])
            table = _logprob_table(logits.index_select(0, index), token_ids.index_select(0, index), top)
            tables.append((indices, self._fetch(table)))
        return tables

    def _chunks(self, indices: Sequence[int], vocab_size: int) -> Iterator[Sequence[int]]:
        size = max(1, self._chunk_elements // vocab_size)
        return (indices[start : start + size] for start in range(0, len(indices), size))


# Ways to a row's token. A row's own parameters alone decide which, so that its token does not depend on the batch.
_PLAIN, _GREEDY, _ALL, _TOP_K, _SORTED = range(5)


def _route(row: SamplingRow) -> int:
    params = row.params
    if params.is_greedy:
        return _GREEDY if row.has_edits else _PLAIN
    if 0 < params.top_k <= _MAX_PARTIAL_SORT:
        return _TOP_K
    return _SORTED if params.top_k or params.top_p < 1.0 else _ALL


def _logprob_table(logits: Tensor, token_ids: Tensor, top: int) -> Tensor:
    """The table of PendingSample.logprobs, for logits [n, vocab] and the chosen ids [n]."""
    values = logits.float().log_softmax(dim=-1)
    chosen = values.gather(1, token_ids.clamp(min=0).unsqueeze(1))
    rank = (values > chosen).sum(dim=-1, keepdim=True) + 1
    best, best_ids = values.topk(top, dim=-1)
    return torch.cat([chosen.double(), rank.double(), best_ids.double(), best.double()], dim=1)


def _sampled(token_id: int, row: SamplingRow, values: list[float] | None) -> Sampled:
    if token_id == _FAILED or values is None:
        return Sampled(token_id, None, token_id == _FAILED)
    return Sampled(token_id, read_logprob(token_id, values, row.params.logprobs or 0), False)


def read_logprob(token_id: int, values: Sequence[float], top: int) -> TokenLogprob:
    """A row of a table of log-probabilities, with the `top` most probable tokens of those that it has."""
    width = (len(values) - 2) // 2
    best = zip(values[2 : 2 + min(top, width)], values[2 + width :], strict=False)
    return TokenLogprob(token_id, values[0], int(values[1]), tuple((int(best_id), value) for best_id, value in best))


def _index(indices: Sequence[int], device: torch.device) -> Tensor:
    return to_device(np.array(indices, dtype=np.int64), device)
