"""Computes mini-batches layer by layer, on the compute stream. Called on the executor's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd import profiler

from hsrpc.device.device import Device, Event
from hsrpc.device.uploads import Upload
from hsrpc.engine.tasks.cache import CacheManager, DeviceRows, Gathers, Staged, Stores
from hsrpc.engine.tasks.weights import Prefetched
from hsrpc.engine.weights import ModelWeights
from hsrpc.model.attention import Attention, InPlaceRows, PackedRows
from hsrpc.model.family import Family, Weights
from hsrpc.plan.plan import PENDING_QUERIES, REGENERATE_ROWS
from hsrpc.schedule.blocks import PoolId, Tier
from hsrpc.schedule.step import Ints, MiniBatch

_RUN_AHEAD = 8
"""Mini-batches of a layer that are launched and not computed yet, at most."""


class Projected(NamedTuple):
    """What a group needs of a layer between its projections and its MLP."""

    x: torch.Tensor
    """[n, h] input of the projections."""
    queries: torch.Tensor
    """[n, q]"""
    kv: torch.Tensor
    """[n, 2*kv]"""
    attended: torch.Tensor
    """[n, q] as far as its mini-batches are computed."""


@dataclass(slots=True)
class Group:
    """Mini-batches whose tokens go through projections and MLP together, so that these read the weights once."""

    token_ids: torch.Tensor
    """[n]"""
    positions: torch.Tensor
    """[n]"""
    rotation: torch.Tensor = field(init=False)
    """[n, ...] of those positions."""
    hidden: torch.Tensor = field(init=False)
    """[n, h] input of the first layer, then output of the layer computed last."""
    projected: Projected | None = None
    """Of the layer under way."""


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A mini-batch on the device."""

    group: Group
    rows: slice
    """Of the group's."""
    is_first: bool
    is_last: bool
    in_place: InPlaceRows | None
    """Of the first requests, with one query each; None: there are none."""
    packed: PackedRows | None
    """Of the requests after them; None: there are none."""
    num_in_place: int
    num_rebuilt: int
    """Rows at the front of both buffers that regeneration turns into one another."""
    gathers: Gathers
    new_rows: DeviceRows
    activation_rows: torch.Tensor
    activation_positions: torch.Tensor
    stores: dict[PoolId, Stores]
    sample_rows: torch.Tensor

    @property
    def stores_on_host(self) -> bool:
        """Some of its new rows go there."""
        return any(pool.tier is Tier.HOST for pool in self.stores)

    @property
    def sampled(self) -> torch.Tensor:
        """[r, h] output of the layer computed last, of the rows that are sampled."""
        return self.group.hidden[self.rows].index_select(0, self.sample_rows)


class Forward:
    """The forward pass of a step, one layer of one mini-batch at a time."""

    def __init__(
        self,
        family: Family,
        weights: ModelWeights,
        cache: CacheManager,
        attention: Attention,
        device: Device,
        *,
        max_queries: int,
    ) -> None:
        self.regenerated_tokens = 0
        """Rows rebuilt from activations since the start, all layers."""
        self._family = family
        self._fixed = weights.fixed
        self._windows = [layer.sliding_window for layer in family.sizes.layers]
        self._cache = cache
        self._attention = attention
        self._device = device
        self._max_queries = max_queries
        """Of a group: what the workspace is planned for."""
        self._under_way: deque[tuple[Event, int]] = deque()
        """Ends of the mini-batches that were launched last, and the new tokens of each."""

    def upload(self, batches: Sequence[MiniBatch]) -> list[DeviceBatch]:
        """The arrays of a step's mini-batches and their first layer's input, on the current stream."""
        with self._device.uploads() as upload:
            groups = [list(self._upload(group, upload)) for group in group_batches(batches, self._max_queries)]
        for group in (found[0].group for found in groups):
            group.rotation = self._family.rotation(group.positions)
            group.hidden = self._family.embed(self._fixed, group.token_ids, group.positions)
        return [batch for group in groups for batch in group]

    def _upload(self, batches: Sequence[MiniBatch], upload: Upload) -> Iterator[DeviceBatch]:
        """A group's mini-batches."""
        positions = upload(np.concatenate([batch.positions for batch in batches]))
        group = Group(upload(np.concatenate([batch.token_ids for batch in batches])), positions)
        start = 0
        for batch in batches:
            rows = slice(start, start + batch.num_queries)
            start = rows.stop
            yield DeviceBatch(
                group=group,
                rows=rows,
                is_first=batch is batches[0],
                is_last=batch is batches[-1],
                in_place=_in_place_rows(batch, upload),
                packed=_packed_rows(batch, upload),
                num_in_place=batch.in_place.num_requests,
                num_rebuilt=batch.in_place.num_rebuilt,
                gathers=self._cache.gathers(batch, upload),
                new_rows=DeviceRows.of(batch.new_rows, upload),
                activation_rows=upload(batch.activation_rows),
                activation_positions=upload(batch.activation_positions),
                stores={pool: Stores.of(pool, rows, upload) for pool, rows in batch.stores.items()},
                sample_rows=upload(batch.sample_rows),
            )

    def decode_weights(self, weights: Prefetched) -> None:
        """Decode what of a layer's weights came coded; they are then used by all its mini-batches."""
        device = self._device
        device.wait(device.compute, weights.loaded)
        with device.on(device.compute), _part("decode_weights"):
            for decoding in weights.decodings:
                decoding.run()

    def compute(self, weights: Prefetched, staged: Staged, batch: DeviceBatch) -> tuple[Event, Event]:
        """One layer of one mini-batch: events when the cache buffers, and when the weights, are no longer read.

        The first of a group projects for all of it, the last one finishes the layer.
        """
        device, w, group, rows = self._device, weights.tensors, batch.group, batch.rows
        num_queries = rows.stop - rows.start
        self._keep_pace(num_queries)
        device.wait(device.compute, weights.loaded)
        with device.on(device.compute):
            if batch.is_first:
                group.projected = self._project(w, group)
            assert group.projected is not None  # by the first of the group
            is_whole = batch.is_first and batch.is_last
            projected = group.projected if is_whole else Projected(*(part[rows] for part in group.projected))
            x, kv = projected.x, projected.kv
            device.wait(device.compute, staged.loaded)
            self._cache.gather(staged.buffers, batch.gathers, weights.layer)
            device.copy_rows(staged.buffers.kv, batch.new_rows.target, kv, batch.new_rows.source)
            self._cache.store(Tier.DEVICE, weights.layer, batch.stores, kv, x)
            with _part("regenerate"):
                self._regenerate(w, staged, batch)
            with _part("attend"):
                self._attend(weights.layer, staged.buffers.kv, projected, batch)
            done = freed = device.record(device.compute)
            if batch.is_last:
                with _part("finish"):
                    group.hidden = self._family.finish_layer(w, group.hidden, group.projected.attended)
                group.projected = None  # one group at a time has room for it
                done = device.record(device.compute)
        self._under_way.append((done, num_queries))
        if batch.stores_on_host:
            device.wait(device.store, freed)
            with device.on(device.store):
                self._cache.store(Tier.HOST, weights.layer, batch.stores, kv, x)
        return freed, done

    def _project(self, w: Weights, group: Group) -> Projected:
        with _part("project"):
            x = self._family.attention_input(w, group.hidden)
            queries, kv = self._family.queries_keys_values(w, x, group.rotation)
            return Projected(x, queries, kv, torch.empty_like(queries, memory_format=torch.contiguous_format))

    def _keep_pace(self, num_queries: int) -> None:
        """Launch no further ahead than keeps the device busy, and than there is memory for.

        A full launch queue blocks with the interpreter held; rows that go to the host are kept until they are there.
        """
        room = PENDING_QUERIES * self._max_queries - num_queries
        while self._under_way and (
            len(self._under_way) > _RUN_AHEAD or sum(count for _, count in self._under_way) > room
        ):
            self._device.synchronize(self._under_way.popleft()[0])

    def _attend(self, layer: int, kv: torch.Tensor, projected: Projected, batch: DeviceBatch) -> None:
        """Fill the mini-batch's rows of what is attended to."""
        queries, out, first = projected.queries, projected.attended, batch.num_in_place
        if batch.in_place is not None:
            pool = self._cache.device_kv(layer)
            self._attention.in_place(queries[:first], pool, kv, batch.in_place, out[:first])
        if batch.packed is not None:
            out[first:] = self._attention.packed(queries[first:], kv, batch.packed, self._windows[layer])

    def _regenerate(self, w: Weights, staged: Staged, batch: DeviceBatch) -> None:
        """Rebuild K and V of the cached activations where attention reads them; rows of chunks are copied there."""
        total, in_front, kv = len(batch.activation_rows), batch.num_rebuilt, staged.buffers.kv
        self.regenerated_tokens += total
        pieces = [*([0] if in_front else []), *range(in_front, total, REGENERATE_ROWS), total]
        for start, end in pairwise(pieces):
            rows = slice(start, end)
            out = kv[rows] if start < in_front else torch.empty_like(kv[rows])
            rotation = self._family.rotation(batch.activation_positions[rows])
            self._family.keys_values(w, staged.buffers.activations[rows], rotation, out)
            if start >= in_front:
                kv.index_copy_(0, batch.activation_rows[rows], out)


def _part(name: str) -> AbstractContextManager[object]:
    """A range for torch's profiler while that runs: it takes the host as long as a small kernel."""
    return profiler.record_function(f"hsrpc.{name}") if profiler._is_profiler_enabled else nullcontext()


def _in_place_rows(batch: MiniBatch, upload: Upload) -> InPlaceRows | None:
    rows = batch.in_place
    if not rows.num_requests:
        return None
    key_starts = batch.key_starts[: rows.num_requests + 1]
    return InPlaceRows(
        tables=upload(rows.tables.astype(np.int32)),
        counts=upload(rows.counts.astype(np.int32)),
        key_starts=upload(key_starts.astype(np.int32)),
        rebuilt_starts=upload(rows.rebuilt_starts.astype(np.int32)),
        max_keys=int((rows.counts + np.diff(rows.rebuilt_starts) + np.diff(key_starts)).max()),
    )


def _packed_rows(batch: MiniBatch, upload: Upload) -> PackedRows | None:
    first = batch.in_place.num_requests
    if first == len(batch.works):
        return None
    query_starts, key_starts = batch.query_starts[first:] - first, batch.key_starts[first:]
    return PackedRows(
        query_starts=upload(query_starts.astype(np.int32)),
        key_starts=upload(key_starts.astype(np.int32)),
        query_offsets=tuple(query_starts.tolist()),
        key_offsets=tuple(key_starts.tolist()),
        max_queries=_longest(query_starts),
        max_keys=_longest(key_starts),
    )


def _longest(starts: Ints) -> int:
    return int(np.diff(starts).max())


def group_batches(batches: Sequence[MiniBatch], max_queries: int) -> list[list[MiniBatch]]:
    """Neighbours together, as long as a group has no more than `max_queries` tokens or is one mini-batch."""
    groups: list[list[MiniBatch]] = []
    room = 0
    for batch in batches:
        if not groups or batch.num_queries > room:
            groups.append([])
            room = max_queries
        groups[-1].append(batch)
        room -= batch.num_queries
    return groups
