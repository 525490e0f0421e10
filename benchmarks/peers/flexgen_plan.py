"""FlexGen's memory and speed, by arithmetic: which setups fit a budget, and which are worth measuring.

Where a tensor goes is FlexGen 0.1.8's rule: host first, by the middle of the tensor in its group's bytes.
The rates are those that explain its speed on one H100 (PCIe 5); they only rank setups and estimate how long one takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.peers.cases import GIB, Budgets, Case, Setup, System, output_of, sizes_of
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind

RELAY_BYTES = 8 * GIB
"""Pinned buffers of its four copy threads."""
_OVERHEAD = 4 * GIB
"""Host: the process, CUDA's libraries and small tensors."""
_DEVICE_SLACK = GIB // 2
_POSITIONS = 2050
_PINNED_RATE = 50e9
_UNPINNED_RATE = 29e9
_DEVICE_RATE = 1.1e12
_PREFILL_RATE = 250e12
_MAX_BATCH = 256
_WEIGHT_PERCENT = (0, 20, 30, 55, 70, 80, 100)
"""One of each distinct placement: 0, 8, 42, 50, 58, 92 and 100 % of the layers' weights on the device."""
_CACHE_PERCENT = (0, 25, 50, 75, 100)
_NUM_BATCHES = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one setup, and what a decode step moves."""

    device: int
    host: int
    host_cache: int
    streamed_weights: int
    """Weight bytes that a step copies to the device, embeddings included."""
    host_cache_per_token: float
    """Bytes that each cached token of each request adds to a step's copies, all layers."""


def weight_groups(sizes: ModelSizes) -> list[list[int]]:
    """Bytes of each tensor, in FlexGen's order, of its groups: input, attention and MLP of a layer, output."""
    h, b = sizes.hidden_size, sizes.compute_bytes
    vocab = sizes.vocab_size * h
    attention, mlp = [h * h, h] * 4 + [h, h], [4 * h * h, 4 * h, 4 * h * h, h, h, h]
    groups = [[vocab, _POSITIONS * h], attention, mlp, [h, h, vocab]]
    return [[size * b for size in group] for group in groups]


def resident_bytes(group: Sequence[int], gpu_percent: float) -> int:
    """Bytes of a group that FlexGen keeps on the device."""
    total, before, kept = sum(group), 0, 0
    for size in group:
        middle = 100 * (before + size / 2) / total
        kept += size if middle >= 100 - gpu_percent else 0
        before += size
    return kept


def footprint(setup: Setup) -> Footprint:
    """Device and host bytes of a FlexGen setup, at the peak of prefill or decode."""
    sizes = sizes_of(setup.model)
    groups = weight_groups(sizes)
    counts = (1, sizes.num_layers, sizes.num_layers, 1)
    resident = [resident_bytes(group, setup.percent[0]) for group in groups]
    streamed = [sum(group) - kept for group, kept in zip(groups, resident, strict=True)]
    of_model = sum(count * size for count, size in zip(counts, streamed, strict=True))
    on_device = sum(count * size for count, size in zip(counts, resident, strict=True))
    per_batch = (setup.batch or 0) // setup.num_batches
    on_gpu = per_batch * setup.percent[2] // 100
    request = (setup.prompt + setup.output - 1) * sizes.max_row_bytes(BlockKind.KV)
    cache = setup.num_batches * sizes.num_layers * request
    weight_buffers = max(streamed[1] + streamed[2], streamed[2] + streamed[3], streamed[3] + streamed[0])
    cache_buffers = (3 if on_gpu < per_batch else 1) * per_batch * request
    prefill = _prefill_bytes(sizes, setup, per_batch)
    relayed = 2 * _power_of_two((per_batch - on_gpu) * request // 2) if on_gpu < per_batch else 0
    return Footprint(
        device=on_device + weight_buffers + on_gpu * cache + max(cache_buffers, prefill) + _DEVICE_SLACK,
        host=of_model + (per_batch - on_gpu) * cache + RELAY_BYTES + 2 * relayed + _OVERHEAD,
        host_cache=(per_batch - on_gpu) * cache,
        streamed_weights=of_model,
        host_cache_per_token=sizes.token_bytes(BlockKind.KV) * (1 - on_gpu / max(1, per_batch)),
    )


def predicted_step(setup: Setup) -> float:
    """Seconds of a decode step; copies of weights and of the cache do not overlap each other.

    Each GPU batch reads the weights on the device once more.
    """
    sizes, used = sizes_of(setup.model), footprint(setup)
    tokens = (setup.batch or 0) * (setup.prompt + setup.output / 2)
    on_host = tokens * used.host_cache_per_token
    touched = setup.num_batches * sizes.model_bytes + tokens * sizes.token_bytes(BlockKind.KV)
    return used.streamed_weights / _PINNED_RATE + on_host / _UNPINNED_RATE + touched / _DEVICE_RATE


def predicted_prefill(setup: Setup) -> float:
    """Seconds until the first tokens."""
    sizes, used = sizes_of(setup.model), footprint(setup)
    tokens = (setup.batch or 0) * setup.prompt
    compute = sizes.num_layers * float(sizes.mean(lambda layer: layer.flop(tokens))) / _PREFILL_RATE
    return compute + max(used.streamed_weights / _PINNED_RATE, tokens * used.host_cache_per_token / _UNPINNED_RATE)


def predicted_throughput(setup: Setup) -> float:
    """New tokens/s of the whole run, prefill included."""
    seconds = predicted_prefill(setup) + (setup.output - 1) * predicted_step(setup)
    return (setup.batch or 0) * setup.output / seconds


def fits(setup: Setup) -> bool:
    """Whether the arithmetic leaves it within both budgets."""
    used = footprint(setup)
    return used.device <= setup.budgets.device and used.host <= setup.budgets.host


def candidates(model: str, budgets: Budgets, count: int) -> list[Setup]:
    """The `count` most promising setups within the budgets, best first: one for each placement."""
    best: dict[tuple[int, int], Setup] = {}
    for weights, cache, num_batches in product(_WEIGHT_PERCENT, _CACHE_PERCENT, _NUM_BATCHES):
        setup = _largest(_setup(Case.BUDGET, model, budgets, weights=weights, cache=cache, num_batches=num_batches))
        known = best.get((weights, cache))
        if setup and (known is None or predicted_throughput(setup) > predicted_throughput(known)):
            best[weights, cache] = setup
    return sorted(best.values(), key=predicted_throughput, reverse=True)[:count]


def host_setups(model: str, budgets: Budgets, batch: int) -> Iterator[Setup]:
    """Everything on the host, in one to four GPU batches, and attention there."""
    for num_batches, cpu_attention in ((1, False), (4, False), (2, False), (4, True)):
        setup = _setup(Case.HOST, model, budgets, weights=0, cache=0, num_batches=num_batches)
        yield replace(setup, batch=batch, cpu_attention=cpu_attention)


def largest_host_batch(model: str, budgets: Budgets) -> int:
    """The largest batch, a multiple of eight, that fits with everything on the host; 0: none."""
    setup = _largest(_setup(Case.HOST, model, budgets, weights=0, cache=0, num_batches=4), granularity=8)
    return setup.batch or 0 if setup else 0


def _setup(case: Case, model: str, budgets: Budgets, *, weights: int, cache: int, num_batches: int) -> Setup:
    return Setup(
        case=case,
        model=model,
        system=System.FLEXGEN,
        budgets=budgets,
        batch=None,
        output=output_of(model),
        percent=(weights, 100 - weights, cache, 100 - cache, 100, 0),
        num_batches=num_batches,
    )


def _largest(setup: Setup, granularity: int = 2) -> Setup | None:
    """Setup with the largest batch that fits; None: none fits."""
    step = max(granularity, setup.num_batches)
    fitting = (sized for size in range(_MAX_BATCH, 0, -step) if fits(sized := replace(setup, batch=size)))
    return next(fitting, None)


def _prefill_bytes(sizes: ModelSizes, setup: Setup, batch: int) -> int:
    """Most device bytes of one GPU batch's prompts in one layer, and the hidden states of the others."""
    tokens = batch * setup.prompt
    hidden = tokens * sizes.hidden_size
    scores = batch * sizes.num_heads * setup.prompt**2
    peak = max(9 * hidden + 3 * scores, 9 * hidden, 3 * hidden + tokens * sizes.vocab_size)
    return sizes.compute_bytes * (peak + setup.num_batches * hidden)


def _power_of_two(size: int) -> int:
    """Pinned memory of torch's allocator comes in powers of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0
