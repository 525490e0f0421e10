"""Decode that uses no buffer: K and V are read where they lie, and each step's arrays follow from those of the last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.step import InPlace, MiniBatch, Rows, Work

_NOTHING = np.zeros(0, dtype=np.int64)


def uses_no_buffer(works: Sequence[Work], block_size: int, window: int | None) -> bool:
    """All of it is decode that reads, and stores to, KV blocks on the device."""
    return all(work.is_decode and work.reads_in_place(window) and _is_on_device(work, block_size) for work in works)


def _is_on_device(work: Work, block_size: int) -> bool:
    used = work.context // block_size + 1
    return work.request.blocks.pools[:used].count(PoolId.DEVICE_KV) == used


def advance(batch: MiniBatch, works: Sequence[Work], block_size: int) -> MiniBatch | None:
    """The mini-batch behind one in place: `works` go on with its tokens, each with that of its source.

    What `pack` makes of them, except that tables may be wider. None where a new token goes to a block that is not
    read in place.
    """
    source = np.array([work.source for work in works], dtype=np.int64)
    positions, slots = batch.positions[source] + 1, batch.stores[PoolId.DEVICE_KV].target[source] + 1
    tables = batch.in_place.tables[source]
    begun = np.flatnonzero(positions % block_size == 0)
    if len(begun):
        number = positions[begun] // block_size
        blocks = [(works[i].request.blocks, k) for i, k in zip(begun.tolist(), number.tolist(), strict=True)]
        if any(table.pools[k] != PoolId.DEVICE_KV for table, k in blocks):
            return None
        index = np.array([table.indices[k] for table, k in blocks], dtype=np.int64)
        missing = int(number.max()) + 1 - tables.shape[1]
        if missing > 0:
            tables = np.pad(tables, ((0, 0), (0, missing)))
        tables[begun, number], slots[begun] = index, index * block_size
    rows, nowhere = np.arange(len(works), dtype=np.int64), np.zeros(len(works) + 1, dtype=np.int64)
    return MiniBatch(
        works=tuple(works),
        token_ids=source,
        positions=positions,
        query_starts=np.arange(len(works) + 1, dtype=np.int64),
        key_starts=nowhere,
        in_place=InPlace(tables, positions + 1, nowhere),
        new_rows=Rows(_NOTHING, _NOTHING),
        kv_loads={},
        activation_loads={},
        activation_rows=_NOTHING,
        activation_positions=_NOTHING,
        stores={PoolId.DEVICE_KV: Rows(rows, slots)},
        sample_rows=rows,
    )
