"""From what the scheduler decided to a step that can be handed out: its arrays and its list of operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsrpc.schedule.blocks import PoolId, Tier
from hsrpc.schedule.packing import pack
from hsrpc.schedule.step import MiniBatch, Packed, Scheduled, Step, StopFlag
from hsrpc.schedule.sweep import BatchShape, Carried, Places, sweep
from hsrpc.schedule.windows import LayerWindows


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembler:
    """Makes steps for a model that lies as `layers` say. Large batches take milliseconds: not for the event loop."""

    layers: Places
    block_size: int
    windows: LayerWindows
    max_queries: int
    """Query rows of a group of mini-batches: what the workspace is planned for."""
    in_place: PoolId = PoolId.DEVICE_KV
    """The blocks that single queries read in place."""

    def assemble(self, scheduled: Scheduled, carried: Carried) -> Step:
        """The step, after a list that has left `carried` in the weight buffers."""
        packed = pack_step(scheduled, self.block_size, self.windows, self.in_place)
        return self.order(packed, scheduled.stop, carried)

    def order(self, packed: Packed, stop: StopFlag, carried: Carried) -> Step:
        """The step of these arrays."""
        return Step(
            step_id=packed.step_id,
            mini_batches=packed.mini_batches,
            ops=sweep(self.layers, batch_shapes(packed.mini_batches, self.max_queries), carried),
            sampling=packed.sampling,
            counts=packed.counts,
            stop=stop,
            is_in_place=packed.is_in_place,
            is_ahead=packed.is_ahead,
        )


def pack_step(scheduled: Scheduled, block_size: int, windows: LayerWindows, in_place: PoolId) -> Packed:
    """The arrays of a step."""
    arrays = scheduled.arrays
    return Packed(
        step_id=scheduled.step_id,
        mini_batches=arrays
        or tuple(pack(chunks, block_size, windows.distinct, in_place) for chunks in scheduled.mini_batches),
        sampling=scheduled.sampling,
        counts=scheduled.counts,
        is_in_place=scheduled.is_in_place,
        is_ahead=arrays is not None,
    )


def batch_shapes(batches: Sequence[MiniBatch], max_queries: int) -> tuple[BatchShape, ...]:
    """What each mini-batch asks of a sweep."""
    groups = group_numbers([batch.num_queries for batch in batches], max_queries)
    return tuple(map(_shape, batches, groups))


def group_numbers(queries: Sequence[int], max_queries: int) -> list[int]:
    """Neighbours share a number, as long as a group has no more than `max_queries` rows or is one mini-batch."""
    groups: list[int] = []
    room = 0
    for count in queries:
        if not groups or count > room:
            groups.append(groups[-1] + 1 if groups else 0)
            room = max_queries
        else:
            groups.append(groups[-1])
        room -= count
    return groups


def _shape(batch: MiniBatch, group: int) -> BatchShape:
    layout = batch.widest
    return BatchShape(
        group=group,
        loads=any(pool.tier is Tier.HOST for pool in (*layout.kv_loads, *layout.activation_loads)),
        rebuilds=layout.rebuilds,
        stores=any(pool.tier is Tier.HOST for pool in batch.stores),
        scores=batch.scores is not None,
    )
