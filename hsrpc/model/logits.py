"""From a model's logits to a token: edits (bias, penalties, exclusions), then the draw. Rows are independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsrpc.schedule.step import SamplingRow

_MIN_DIVISOR = 1e-30  # a normal float32: nothing is divided by zero
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, index): SplitMix64 (Steele, Lea and Flood, 2014), read at any index."""
    start = _mix(np.array(seeds, dtype=np.uint64))
    bits = _mix(start + (np.array(indices, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN_GAMMA))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def edit(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits [n, vocab] with bias, penalties and exclusions; `logits` may be overwritten.

    Waits for what says which tokens a constrained row may have. Where it may have none, all are minus infinity.
    """
    if any(row.params.logit_bias for row in rows):
        _add_bias(logits, rows)
    if any(row.params.has_penalties for row in rows):
        logits = _penalise(logits, rows)
    if any(row.matcher is not None for row in rows):
        _constrain(logits, rows)
    excluded = _positions([row.excluded_ids for row in rows], logits.shape[1])
    if excluded.size:
        left = logits.flatten().index_fill(0, to_device(excluded, logits.device), -torch.inf).view_as(logits)
        # Excluding every token would leave nothing to choose from: such a row keeps them all.
        logits = torch.where(left.amax(dim=-1, keepdim=True) == -torch.inf, logits, left)
    return logits


def _positions(token_ids: Sequence[Sequence[int] | frozenset[int]], vocab_size: int) -> NDArray[np.int64]:
    """Flat positions in a tensor [len(token_ids), vocab_size] of each row's ids."""
    parts = [np.zeros(0, dtype=np.int64)]
    for index, row_ids in enumerate(token_ids):
        if row_ids:
            ids = np.array(row_ids if not isinstance(row_ids, frozenset) else sorted(row_ids), dtype=np.int64)
            parts.append(ids[(ids >= 0) & (ids < vocab_size)] + index * vocab_size)
    return np.concatenate(parts)


def _add_bias(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    vocab_size = logits.shape[1]
    kept = [
        (index * vocab_size + token_id, bias)
        for index, row in enumerate(rows)
        for token_id, bias in row.params.logit_bias.items()
        if 0 <= token_id < vocab_size
    ]
    positions = np.array([position for position, _ in kept], dtype=np.int64)
    biases = np.array([bias for _, bias in kept], dtype=np.float32)
    logits.view(-1).scatter_add_(0, to_device(positions, logits.device), to_device(biases, logits.device))


def _constrain(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Exclude what constrained rows may not have."""
    allowed = {i: row.matcher.allowed(len(row.draft)) for i, row in enumerate(rows) if row.matcher is not None}
    index = to_device(np.array(list(allowed), dtype=np.int64), logits.device)
    words = to_device(np.stack(list(allowed.values())), logits.device)
    bits = words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    excluded = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(excluded, -torch.inf))


def _penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Repetition penalty (Keskar et al., 2019) over prompt and output, then presence and frequency over the output."""
    params = [row.params for row in rows]
    penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
    repetition, presence, frequency = to_device(np.array(penalties, dtype=np.float32), logits.device).chunk(3, dim=1)
    outputs = _counts([row.output_token_ids if row.params.has_penalties else () for row in rows], logits)
    seen = outputs > 0
    if any(p.repetition_penalty != 1.0 for p in params):
        prompts = _counts(
            [() if row.params.repetition_penalty == 1.0 else row.prompt_token_ids for row in rows], logits
        )
        repetition = repetition.clamp(min=_MIN_DIVISOR)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen | (prompts > 0), repeated, logits)
    logits = logits - frequency * outputs - presence * seen
    return logits.clamp_(max=torch.finfo(logits.dtype).max)


def _counts(token_ids: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """How often each token is among a row's ids, [n, vocab]."""
    positions = to_device(_positions(token_ids, like.shape[1]), like.device)
    counts = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
    return counts.scatter_add_(0, positions, torch.ones_like(positions, dtype=like.dtype)).view_as(like)


def draw(logits: Tensor, rows: Sequence[SamplingRow], max_rank: int) -> Tensor:
    """Token ids [n], drawn by each row's temperature, min-p, top-k and top-p from edited logits [n, vocab].

    `max_rank`: the largest top-k of the rows, where each has one; the vocabulary's size where some have only top-p; 0
    where none has either. Tokens as probable as the least probable one kept are kept too. The inverse of the
    cumulative distribution, in order of token id and in float64, makes a row's token independent of the other rows.
    """
    columns = to_device(_columns(rows, logits.shape[1]), logits.device)
    temperature, min_p, top_p, top_k, uniform = columns.chunk(5, dim=1)
    # The most probable token has 0: no exponential overflows, however small the temperature.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.to(logits.dtype)
    weights = scaled.exp()
    weights = weights.masked_fill(weights < min_p.to(logits.dtype), 0.0)
    if max_rank:
        weights = weights.masked_fill(scaled < _cutoff(scaled, weights, top_k.long(), top_p, max_rank), 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    # A parallel sum may round up at an excluded token; that token must not be drawn.
    return torch.where(weights.gather(1, index) > 0, index, scaled.argmax(dim=-1, keepdim=True)).squeeze(1)


def _columns(rows: Sequence[SamplingRow], vocab_size: int) -> NDArray[np.float64]:
    """Temperature, min-p, top-p (infinite: off), top-k (the vocabulary's size: off) and uniform number, [n, 5]."""
    columns = np.empty((len(rows), 5))
    for column, row in zip(columns, rows, strict=True):
        params = row.params
        top_p = params.top_p if params.top_p < 1.0 else np.inf
        top_k = min(params.top_k or vocab_size, vocab_size)
        column[:4] = max(params.temperature, _MIN_DIVISOR), params.min_p, top_p, top_k
    columns[:, 4] = uniforms([row.seed for row in rows], [row.num_output_tokens for row in rows])
    return columns


def _cutoff(scaled: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, max_rank: int) -> Tensor:
    """The least of `scaled` that top-k, then top-p over what top-k and min-p leave, keep: [n, 1]."""
    every = max_rank == scaled.shape[1]
    ordered = scaled.sort(dim=-1, descending=True).values if every else scaled.topk(max_rank, dim=-1).values
    kth = ordered.gather(1, top_k - 1)
    total = weights.masked_fill(scaled < kth, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
    mass = ordered.exp().masked_fill_(ordered < kth, 0.0).double()
    before = mass.cumsum(dim=-1) - mass
    return ordered.masked_fill((before >= top_p * total) | (mass == 0.0), torch.inf).amin(dim=-1, keepdim=True)
