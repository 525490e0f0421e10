"""Whole decode steps of a model that lies on the device with all its cache, each launched as one.

A step of a small resident model takes a few milliseconds, and launching its kernels one by one would take longer. So
one graph is captured for each of a few batch sizes; smaller batches are padded with rows that read nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial

import numpy as np
import torch

from hsrpc.core.memory_use import DeviceUse
from hsrpc.device.device import Device
from hsrpc.engine.tasks.cache import CacheManager
from hsrpc.engine.weights import ModelWeights
from hsrpc.model.attention import Attention, InPlaceRows
from hsrpc.model.family import Family
from hsrpc.plan.plan import Plan
from hsrpc.schedule.blocks import PoolId
from hsrpc.schedule.step import MiniBatch

_TOKEN, _POSITION, _COUNT, _SLOT, _TABLE = range(5)
"""Columns of a step's input; the block table takes the rest."""


class DecodeGraphs:
    """Runs mini-batches that are in place."""

    def __init__(
        self,
        family: Family,
        weights: ModelWeights,
        cache: CacheManager,
        attention: Attention,
        device: Device,
        *,
        plan: Plan,
    ) -> None:
        self._family = family
        self._weights = weights
        self._cache = cache
        self._attention = attention
        self._device = device
        self._block_size = plan.block_size
        self._max_model_len = plan.max_model_len
        self._sizes = _batch_sizes(plan.max_batch)
        most = self._sizes[-1]
        columns = _TABLE + -(-plan.max_model_len // plan.block_size)
        self._input = device.empty((most, columns), torch.int32, DeviceUse.GRAPH_BUFFERS)
        self._input.copy_(torch.from_numpy(self._padding(most)))
        self._rows = torch.arange(most, device=device.torch_device)
        self._nothing = torch.zeros(most + 1, dtype=torch.int32, device=device.torch_device)
        self._logits = device.empty((most, family.sizes.vocab_size), torch.float32, DeviceUse.GRAPH_BUFFERS)
        # The largest first, so that the others fit into its memory.
        self._graphs = {size: device.capture(partial(self._forward, size)) for size in reversed(self._sizes)}

    def run(self, batch: MiniBatch, sampled: torch.Tensor | None) -> torch.Tensor:
        """Logits [n, vocab] of a mini-batch in place, launched on the compute stream; good until the next run.

        `sampled`: token ids of the step before on the device, which works with a source continue with.
        """
        count = batch.num_queries
        size = self._sizes[bisect_left(self._sizes, count)]
        array = self._padding(size)
        array[:count, _TOKEN] = batch.token_ids
        array[:count, _POSITION] = batch.positions
        array[:count, _COUNT] = batch.in_place.counts
        array[:count, _SLOT] = batch.stores[PoolId.DEVICE_KV].target
        array[:count, _TABLE : _TABLE + batch.in_place.tables.shape[1]] = batch.in_place.tables
        with self._device.on(self._device.compute):
            self._input[:size].copy_(self._device.upload(array))
            if sampled is not None:
                tokens = self._input[:count, _TOKEN]
                # A failed row has no token; it is computed in vain, with some token.
                tokens.copy_(sampled.index_select(0, tokens.long()).clamp_(min=0))
            self._graphs[size]()
            return self._logits[:count]

    def _padding(self, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """Rows that read no key and write behind the pool's last block."""
        array = np.zeros((size, self._input.shape[1]), dtype=np.int32)
        array[:, _SLOT] = self._cache.spare_slot
        return array

    def _forward(self, size: int) -> None:
        family, given = self._family, self._input[:size]
        positions, slots = given[:, _POSITION].long(), given[:, _SLOT].long()
        rows = InPlaceRows(
            tables=given[:, _TABLE:],
            counts=given[:, _COUNT].contiguous(),
            rebuilt_starts=self._nothing,
            key_starts=self._nothing,
            max_keys=self._max_model_len,
        )
        hidden = family.embed(self._weights.fixed, given[:, _TOKEN].long(), positions)
        rotation = family.rotation(positions)
        for layer, weights in enumerate(self._weights.layers):
            w, pool = weights.resident, self._cache.device_kv(layer)
            x = family.attention_input(w, hidden)
            queries, kv = family.queries_keys_values(w, x, rotation)
            self._device.copy_rows(pool, slots, kv, self._rows[:size])
            attended = torch.empty_like(queries, memory_format=torch.contiguous_format)
            self._attention.in_place(queries, pool, pool, rows, attended)
            hidden = family.finish_layer(w, hidden, attended)
        self._logits[:size].copy_(family.logits(self._weights.fixed, hidden))


def make_graphs(
    family: Family,
    weights: ModelWeights,
    cache: CacheManager,
    attention: Attention,
    device: Device,
    *,
    plan: Plan,
) -> DecodeGraphs | None:
    """None where weights stream, or no KV blocks lie on the device, or a sliding window needs packed rows."""
    streams = any(plan.streamed_bytes)
    in_place = plan.num_blocks[PoolId.DEVICE_KV] and family.sizes.sliding_window is None
    return DecodeGraphs(family, weights, cache, attention, device, plan=plan) if in_place and not streams else None


def _batch_sizes(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to `most`, which is included: no batch is padded by more than half."""
    smaller = {n for power in range(most.bit_length()) for n in (2**power, 3 * 2**power) if n < most}
    return sorted(smaller | {most})
