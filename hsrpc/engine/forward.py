"""Computes mini-batches layer by layer, on the compute stream. Called on the executor's thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.profiler import record_function

from hsrpc.core.batch import Ints, MiniBatch
from hsrpc.core.blocks import PoolId, Tier
from hsrpc.core.plan import REGENERATE_ROWS
from hsrpc.device.device import Device, Event
from hsrpc.engine.cache import CacheManager, DeviceRows, Staged
from hsrpc.engine.weights import ModelWeights, Prefetched
from hsrpc.model.attention import Attention, InPlaceRows, PackedRows
from hsrpc.model.family import Family, Weights

_RUN_AHEAD = 8
"""Mini-batches of a layer that are launched and not computed yet."""


@dataclass(slots=True)
class DeviceBatch:
    """A mini-batch on the device."""

    hidden: torch.Tensor
    """[n, h] output of the layer computed last."""
    positions: torch.Tensor
    in_place: InPlaceRows | None
    """Of the first requests, with one query each; None: there are none."""
    packed: PackedRows | None
    """Of the requests after them; None: there are none."""
    num_in_place: int
    num_rebuilt: int
    """Rows at the front of both buffers that regeneration turns into one another."""
    new_rows: DeviceRows
    activation_rows: torch.Tensor
    activation_positions: torch.Tensor
    stores: dict[PoolId, DeviceRows]
    sample_rows: torch.Tensor


class Forward:
    """The forward pass of a step, one layer of one mini-batch at a time."""

    def __init__(
        self, family: Family, weights: ModelWeights, cache: CacheManager, attention: Attention, device: Device
    ) -> None:
        self._family = family
        self._fixed = weights.fixed
        self._cache = cache
        self._attention = attention
        self._device = device
        self._under_way: deque[Event] = deque()
        """Ends of the mini-batches that were launched last."""

    def upload(self, batch: MiniBatch) -> DeviceBatch:
        """The arrays of a mini-batch and its first layer's input, on the current stream."""
        upload = self._device.upload
        positions = upload(batch.positions)
        return DeviceBatch(
            hidden=self._family.embed(self._fixed, upload(batch.token_ids), positions),
            positions=positions,
            in_place=self._in_place_rows(batch),
            packed=self._packed_rows(batch),
            num_in_place=batch.in_place.num_requests,
            num_rebuilt=batch.in_place.num_rebuilt,
            new_rows=self._cache.upload_rows(batch.new_rows),
            activation_rows=upload(batch.activation_rows),
            activation_positions=upload(batch.activation_positions),
            stores=self._cache.upload(batch.stores),
            sample_rows=upload(batch.sample_rows),
        )

    def _in_place_rows(self, batch: MiniBatch) -> InPlaceRows | None:
        rows, upload = batch.in_place, self._device.upload
        if not rows.num_requests:
            return None
        key_starts = batch.key_starts[: rows.num_requests + 1]
        return InPlaceRows(
            tables=upload(rows.tables.astype(np.int32)),
            counts=upload(rows.counts.astype(np.int32)),
            key_starts=upload(key_starts.astype(np.int32)),
            rebuilt_starts=upload(rows.rebuilt_starts.astype(np.int32)),
            most_keys=int((rows.counts + np.diff(rows.rebuilt_starts) + np.diff(key_starts)).max()),
        )

    def _packed_rows(self, batch: MiniBatch) -> PackedRows | None:
        first, upload = batch.in_place.num_requests, self._device.upload
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

    def compute(self, weights: Prefetched, staged: Staged, batch: DeviceBatch) -> tuple[Event, Event]:
        """One layer of one mini-batch: events when the cache buffers, and when the weights, are no longer read."""
        device, family, w, buffers = self._device, self._family, weights.tensors, staged.buffers
        self._keep_pace()
        device.wait(device.compute, weights.loaded)
        device.wait(device.compute, staged.loaded)
        with device.on(device.compute):
            with record_function("hsrpc.project"):
                x = family.attention_input(w, batch.hidden)
                queries, kv = family.queries_keys_values(w, x, batch.positions)
                device.copy_rows(buffers.kv, batch.new_rows.target, kv, batch.new_rows.source)
                self._cache.store(Tier.DEVICE, weights.layer, batch.stores, kv, x)
            with record_function("hsrpc.regenerate"):
                self._regenerate(w, staged, batch)
            with record_function("hsrpc.attend"):
                attended = self._attend(queries, weights.layer, buffers.kv, batch)
            freed = device.record(device.compute)
            with record_function("hsrpc.finish"):
                batch.hidden = family.finish_layer(w, batch.hidden, attended)
            done = device.record(device.compute)
        self._under_way.append(done)
        device.wait(device.store, freed)
        with device.on(device.store):
            self._cache.store(Tier.HOST, weights.layer, batch.stores, kv, x)
        return freed, done

    def _keep_pace(self) -> None:
        """Launch no further ahead than keeps the device busy: a full launch queue blocks with the interpreter held."""
        while len(self._under_way) > _RUN_AHEAD:
            self._device.synchronize(self._under_way.popleft())

    def _attend(self, queries: torch.Tensor, layer: int, kv: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """[n, q]"""
        parts = []
        if batch.in_place is not None:
            pool = self._cache.device_kv(layer)
            parts.append(self._attention.in_place(queries[: batch.num_in_place], pool, kv, batch.in_place))
        if batch.packed is not None:
            parts.append(self._attention.packed(queries[batch.num_in_place :], kv, batch.packed))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _regenerate(self, w: Weights, staged: Staged, batch: DeviceBatch) -> None:
        """Rebuild K and V of the cached activations where attention reads them; rows of chunks are copied there."""
        total, in_front, kv = len(batch.activation_rows), batch.num_rebuilt, staged.buffers.kv
        pieces = [*range(0, in_front, REGENERATE_ROWS), *range(in_front, total, REGENERATE_ROWS), total]
        for start, end in pairwise(pieces):
            rows = slice(start, end)
            out = kv[rows] if start < in_front else torch.empty_like(kv[rows])
            x, positions = staged.buffers.activations[rows], batch.activation_positions[rows]
            self._family.keys_values(w, x, positions, out)
            if start >= in_front:
                kv.index_copy_(0, batch.activation_rows[rows], out)


def _longest(starts: Ints) -> int:
    return int(np.diff(starts).max())
