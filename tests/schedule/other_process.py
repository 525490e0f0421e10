"""A process that knows of schedule/ alone: it gets a pickled step on its standard input and answers with its sums."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from hsrpc.schedule.step import MiniBatch, Rows, Runs, Step

Sums: TypeAlias = dict[str, list[int]]


def sums(step: Step) -> Sums:
    """What whoever computes the step reads of it, added up; a list has an entry for each mini-batch or lane."""

    def each(number: Callable[[MiniBatch], object]) -> list[int]:
        return [int(np.sum(number(batch))) for batch in step.mini_batches]

    return {
        "token ids": each(lambda batch: batch.token_ids),
        "positions": each(lambda batch: batch.positions),
        "in place": each(lambda batch: batch.widest.in_place.counts),
        "loaded rows": each(lambda batch: [runs.num_rows for runs in _loads(batch)]),
        "rebuilt rows": each(lambda batch: len(batch.widest.activation_rows)),
        "stored rows": each(lambda batch: [len(rows.source) for rows in batch.stores.values()]),
        "slots": each(lambda batch: [_slots(rows) for rows in (*_loads(batch), *batch.stores.values())]),
        "sampled rows": each(lambda batch: len(batch.sample_rows)),
        "seeds": [row.seed for row in step.sampling],
        "penalised": [sum(row.token_ids) for row in step.sampling],
        "operations": [len(lane) for lane in step.ops.lanes],
        "awaited": sorted(step.ops.awaited),
        "stopped": [int(step.stop.is_set)],
    }


def _loads(batch: MiniBatch) -> tuple[Runs, ...]:
    return (*batch.widest.kv_loads.values(), *batch.widest.activation_loads.values())


def _slots(copies: Runs | Rows) -> int:
    """Slots of the pools: all that are read or written, added up."""
    return int(np.sum(copies.rows().source if isinstance(copies, Runs) else copies.target))


def main() -> None:
    step = pickle.load(sys.stdin.buffer)
    loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("hsrpc", "torch"))
    json.dump({"modules": loaded, "sums": sums(step)}, sys.stdout)


if __name__ == "__main__":
    main()
