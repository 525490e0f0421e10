"""Decode that uses no buffer: K and V are read where they lie, and each step's arrays follow from those of the last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.step import NO_ROWS, Chunk, InPlace, Layout, MiniBatch, Rows

_NOTHING = np.zeros(0, dtype=np.int64)


def uses_no_buffer(chunks: Sequence[Chunk], block_size: int, pool: PoolId = PoolId.DEVICE_KV) -> bool:
    """All of it is decode that reads, and stores to, blocks of the `pool` that is read in place."""
    return all(chunk.is_decode and chunk.reads_in_place and chunk.lies_in(pool, block_size) for chunk in chunks)


def advance(batch: MiniBatch, chunks: Sequence[Chunk], block_size: int, window: int | None) -> MiniBatch | None:
    """The mini-batch behind one in place: `chunks` go on with its tokens, each with that of its row there.

    What `pack` makes of them for the widest `window` alone, which a decode graph needs, except that tables may be
    wider, and begin with blocks that the window has left. None where a new token goes to a block that is not read in
    place.
    """
    previous = np.array([chunk.previous_row for chunk in chunks], dtype=np.int64)
    before = batch.widest.in_place
    positions, slots = batch.positions[previous] + 1, batch.stores[before.pool].target[previous] + 1
    tables, counts = before.tables[previous], before.counts[previous] + 1
    begun = np.flatnonzero(positions % block_size == 0)
    if len(begun):
        number, column = positions[begun] // block_size, (counts[begun] - 1) // block_size
        tables_begun = [chunks[i].request.blocks for i in begun.tolist()]
        blocks = [(table, k - table.first) for table, k in zip(tables_begun, number.tolist(), strict=True)]
        if any(table.pools[k] != before.pool for table, k in blocks):
            return None
        index = np.array([table.indices[k] for table, k in blocks], dtype=np.int64)
        missing = int(column.max()) + 1 - tables.shape[1]
        if missing > 0:
            tables = np.pad(tables, ((0, 0), (0, missing)))
        tables[begun, column], slots[begun] = index, index * block_size
    rows, nowhere = np.arange(len(chunks), dtype=np.int64), np.zeros(len(chunks) + 1, dtype=np.int64)
    skips = None if window is None else np.maximum(0, counts - window)
    layout = Layout(
        key_starts=nowhere,
        in_place=InPlace(tables, counts, nowhere, skips, before.pool),
        new_rows=NO_ROWS,
        absorbed=NO_ROWS,
        kv_loads={},
        activation_loads={},
        activation_rows=_NOTHING,
        activation_positions=_NOTHING,
    )
    return MiniBatch(
        token_ids=previous,
        positions=positions,
        query_starts=np.arange(len(chunks) + 1, dtype=np.int64),
        layouts=(layout,),
        stores={before.pool: Rows(rows, slots)},
        sample_rows=rows,
    )
