"""The paper's mini-batch formation, for ragged requests: each fits the buffers and balances bus and GPU."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from hsrpc.core.batch import BufferLimits, RowCosts, Work
from hsrpc.core.blocks import PoolId
from hsrpc.core.layout import first_block


class _Bin:
    """A mini-batch being filled."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.rows = self.activation_rows = self.queries = 0
        self.bus = self.gpu = 0.0

    def fits(self, rows: int, activation_rows: int, queries: int, limits: BufferLimits) -> bool:
        return (
            self.rows + rows <= limits.rows
            and self.activation_rows + activation_rows <= limits.activation_rows
            and self.queries + queries <= limits.queries
        )


def form_mini_batches(
    works: Sequence[Work], block_size: int, limits: BufferLimits, costs: RowCosts, window: int | None
) -> list[list[Work]]:
    """Divide works into as few mini-batches as fit the buffers, each with about the same bus and GPU time.

    Longest first into the least loaded that has room.
    """
    sized = [(work, *_buffer_rows(work, block_size, window)) for work in works]
    fewest = _fewest_bins(sized, limits)
    if fewest == 1 and works:  # nothing to balance
        return [list(works)]
    sized.sort(key=lambda item: (-item[1] - item[2] - item[3], item[0].request.order))
    bins = [_Bin() for _ in range(fewest)]
    least_loaded = [(0.0, 0, number) for number in range(len(bins))]  # load, rows, number: a heap
    for work, kv_rows, activation_rows, new_rows in sized:
        rows, full = kv_rows + activation_rows + new_rows, []
        while least_loaded and not bins[least_loaded[0][2]].fits(rows, activation_rows, work.count, limits):
            full.append(heappop(least_loaded))
        number = heappop(least_loaded)[2] if least_loaded else len(bins)
        if number == len(bins):
            bins.append(_Bin())
        chosen = bins[number]
        chosen.works.append(work)
        chosen.rows += rows
        chosen.activation_rows += activation_rows
        chosen.queries += work.count
        chosen.bus += kv_rows * costs.load_kv + activation_rows * costs.load_activation
        chosen.gpu += activation_rows * costs.regenerate + work.count * costs.compute
        for entry in (*full, (max(chosen.bus, chosen.gpu), chosen.rows, number)):
            heappush(least_loaded, entry)
    return [b.works for b in bins if b.works]


def _fewest_bins(sized: Sequence[tuple[Work, int, int, int]], limits: BufferLimits) -> int:
    rows = sum(kv_rows + activation_rows + new_rows for _, kv_rows, activation_rows, new_rows in sized)
    activations = sum(activation_rows for _, _, activation_rows, _ in sized)
    queries = sum(work.count for work, *_ in sized)
    demands = ((rows, limits.rows), (activations, limits.activation_rows), (queries, limits.queries))
    return max(1, *(-(-amount // room) for amount, room in demands if room))


def _buffer_rows(work: Work, block_size: int, window: int | None) -> tuple[int, int, int]:
    """Rows of the kv buffer that `work` takes: cached as KV, cached as activations, new."""
    first, last = first_block(work.context, block_size, window), -(-work.context // block_size)
    pools = work.request.blocks.pools[first:last].tobytes()
    missing = last * block_size - work.context  # in the last block, which is partly filled
    in_place = work.reads_in_place(window)
    kv = pools.count(PoolId.HOST_KV) + (0 if in_place else pools.count(PoolId.DEVICE_KV))
    activations = pools.count(PoolId.DEVICE_ACTIVATION) + pools.count(PoolId.HOST_ACTIVATION)
    kv_rows, activation_rows = kv * block_size, activations * block_size
    if pools and pools[-1] >= PoolId.DEVICE_ACTIVATION:
        activation_rows -= missing
    elif pools and (pools[-1] == PoolId.HOST_KV or not in_place):
        kv_rows -= missing
    if not in_place:
        return kv_rows, activation_rows, work.count
    newest = work.request.blocks.pools[work.context // block_size : work.context // block_size + 1]
    return kv_rows, activation_rows, 1 - newest.count(PoolId.DEVICE_KV)
