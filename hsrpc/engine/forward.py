"""The compute lane's operations, as launches. Called on the executor's thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from hsrpc.device.device import Device
from hsrpc.device.uploads import Upload
from hsrpc.engine.tasks.cache import Buffers, CacheManager, DeviceRows, Gathers, LayerKind, Stores
from hsrpc.engine.tasks.weights import WeightPrefetcher
from hsrpc.engine.weights import OpenedLayer
from hsrpc.model.attention import Attention, InPlaceRows, PackedRows
from hsrpc.model.family import Family, Projection, Routed, Weights
from hsrpc.model.formats.rows import ValueRows
from hsrpc.model.rope import Rotation
from hsrpc.plan.plan import REGENERATE_ROWS
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind, PoolId, Tier
from hsrpc.schedule.step import Ints, Layout, MiniBatch, Scores
from hsrpc.schedule.sweep import Op, OpKind


class Projected(NamedTuple):
    """What a group needs of a layer between its projections and its MLP."""

    projection: Projection
    attended: torch.Tensor
    """[n, o] as far as its mini-batches are computed."""

    def select(self, rows: slice) -> Projected:
        """That of some rows."""
        return Projected(Projection(*(part[rows] for part in self.projection)), self.attended[rows])


@dataclass(slots=True)
class Group:
    """Mini-batches whose tokens go through projections and MLP together, so that these read the weights once."""

    token_ids: torch.Tensor
    """[n]"""
    positions: torch.Tensor
    """[n]"""
    absorbs: bool = False
    """All its queries attend to activations as they are stored."""
    choosing: torch.Tensor | None = None
    """[n] the row by which each one's experts are chosen, where that is told before they are used; None: its own."""
    rotation: Rotation = field(init=False)
    """Rotation of those positions."""
    hidden: torch.Tensor = field(init=False)
    """[n, h] input of the first layer, then output of the layer computed last."""
    projected: Projected | None = None
    """Projections of the layer under way; None before its first and after its last use."""
    routed: Routed | None = None
    """The layer under way behind its router; None where its experts do not come on demand."""


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """What layers with the same window read of a mini-batch, on the device."""

    in_place: InPlaceRows | None
    """Rows of the first requests, with one query each; None: there are no such requests."""
    packed: PackedRows | None
    """Rows of the requests after those read in place; None: there are no such requests."""
    num_rebuilt: int
    """Rows at the front of both buffers that are rebuilt in place."""
    num_absorbed: int
    """Rows at the front of the activation buffer that are attended to as they are."""
    absorbed: DeviceRows
    """New rows among these."""
    new_rows: DeviceRows
    activation_rows: torch.Tensor
    activation_positions: torch.Tensor
    copies: DeviceRows
    """Rows that other requests of the mini-batch read as well."""


class DeviceScores(NamedTuple):
    """Prompt tokens of a mini-batch whose log-probabilities are wanted, on the device."""

    rows: torch.Tensor
    """[s] query rows."""
    token_ids: torch.Tensor
    """[s]"""


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A mini-batch on the device."""

    group: Group
    rows: slice
    """Query rows of this mini-batch within its group's tensors."""
    is_first: bool
    is_last: bool
    num_in_place: int
    layouts: Sequence[DeviceLayout]
    """One for each of the model's windows."""
    gathers: Mapping[LayerKind, Gathers]
    """Copies of blocks on the device, by kind of layer."""
    stores: Mapping[BlockKind, Mapping[PoolId, Stores]]
    """Copies of new rows, by what activation blocks hold in a layer."""
    sample_rows: torch.Tensor
    scores: DeviceScores | None = None

    @property
    def num_queries(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def rebuilds(self) -> bool:
        """Whether K and V are rebuilt."""
        return any(len(layout.activation_rows) > layout.num_absorbed for layout in self.layouts)

    @property
    def sampled(self) -> torch.Tensor:
        """[r, h] output of the layer computed last: the rows that are sampled."""
        return self.group.hidden[self.rows].index_select(0, self.sample_rows)


@dataclass(slots=True)
class Pass:
    """A step on the device."""

    batches: list[DeviceBatch]
    weights: OpenedLayer | None = None
    """Weights of the layer that is computed."""
    projected: Projected | None = None
    """Projections of the mini-batch that is computed."""
    logits: torch.Tensor | None = None
    """[r, vocab] of the first rows that are sampled, as many as there is room for at a time."""
    others: torch.Tensor | None = None
    """[s, h] output of the last layer: the rows that are sampled behind these."""

    @property
    def num_rows(self) -> int | None:
        """Rows of the largest group; None where K and V are rebuilt."""
        if any(batch.rebuilds for batch in self.batches):
            return None
        return max(len(batch.group.token_ids) for batch in self.batches)

    @property
    def w(self) -> Weights:
        assert self.weights is not None  # PROJECT comes first
        return self.weights.tensors


class Forward:
    """Launches the operations of the compute lane: a step's forward pass."""

    def __init__(
        self,
        family: Family,
        fixed: Weights,
        device: Device,
        *,
        prefetcher: WeightPrefetcher,
        cache: CacheManager,
        attention: Attention,
        absorbed: Attention | None = None,
        sample_rows: int,
    ) -> None:
        """`absorbed`: attention of single queries to activations as they are stored; None: they attend to K and V.

        `sample_rows`: rows of logits that are sampled at a time.
        """
        self.regenerated_tokens = 0
        """Rows rebuilt from activations since the start, all layers."""
        self._family = family
        self._fixed = fixed
        self._prefetcher = prefetcher
        self._windows = family.sizes.windows
        self._cache = cache
        self._attention = attention
        self._absorbed = absorbed
        self.sample_rows = sample_rows
        self._device = device

    @property
    def sizes(self) -> ModelSizes:
        return self._family.spec.sizes

    @property
    def dtype(self) -> torch.dtype:
        """Element type of hidden states."""
        return self._family.spec.dtype

    def upload(self, batches: Sequence[MiniBatch], group_starts: Sequence[int]) -> Pass:
        """A step's mini-batches on the device, as soon as the current stream has come to it."""
        bounds = pairwise((*group_starts, len(batches)))
        with self._device.uploads() as upload:
            return Pass([batch for start, end in bounds for batch in self._upload(batches[start:end], upload)])

    def launch(self, op: Op, step: Pass) -> None:
        """Launch an operation of a layer, or of all, on the stream that is current."""
        match op.kind:
            case OpKind.EMBED:
                self._embed(step)
            case OpKind.DECODE:
                self._decode(self._prefetcher.open(op.layer, op.slot, step.num_rows))
            case OpKind.DECODE_EXPERTS:
                self._decode_experts(step, step.batches[op.batch])
            case OpKind.PROJECT:
                step.weights = self._prefetcher.open(op.layer, op.slot, step.num_rows)
                self._project(step.w, op.layer, step.batches[op.batch])
            case OpKind.PLACE:
                self._place(op, step, step.batches[op.batch])
            case OpKind.REBUILD:
                self._rebuild(step.w, op.layer, self._cache.buffers[op.slot], self._layout(op, step))
            case OpKind.ATTEND:
                self._attend(op, step, step.batches[op.batch])
            case OpKind.ROUTE:
                self._route(step, op.layer, step.batches[op.batch])
            case OpKind.FINISH:
                self._finish(step, op.layer, step.batches[op.batch])
            case OpKind.STORE:
                self._store(Tier.HOST, op, step)
            case OpKind.HEAD:
                self._head(step)
            case _:
                raise AssertionError(f"{op.kind} is no operation of the forward pass")

    def prompt_logits(self, batch: DeviceBatch, wanted: slice) -> torch.Tensor:
        """Logits [r, vocab] of some of the rows that tell a mini-batch's prompt tokens, behind the last layer."""
        assert batch.scores is not None  # else the list does not ask for it
        hidden = batch.group.hidden[batch.rows].index_select(0, batch.scores.rows[wanted])
        return self._family.logits(self._fixed, hidden)

    def logits(self, step: Pass) -> Iterator[torch.Tensor]:
        """Logits [r, vocab] of the rows that are sampled, behind HEAD, some at a time: each is launched when the one
        before is done with, whose memory it takes."""
        assert step.others is not None  # HEAD comes first
        assert step.logits is not None
        first, step.logits = step.logits, None
        yield first
        del first
        for rows in step.others.split(self.sample_rows):
            if len(rows):
                yield self._family.logits(self._fixed, rows)

    def _upload(self, batches: Sequence[MiniBatch], upload: Upload) -> Iterator[DeviceBatch]:
        """A group's mini-batches."""
        positions = upload(np.concatenate([batch.positions for batch in batches]))
        absorbs = all(batch.widest.in_place.absorbs and batch.only_single_queries for batch in batches)
        group = Group(upload(np.concatenate([batch.token_ids for batch in batches])), positions, absorbs)
        start = 0
        for batch in batches:
            rows = slice(start, start + batch.num_queries)
            start = rows.stop
            yield DeviceBatch(
                group=group,
                rows=rows,
                is_first=batch is batches[0],
                is_last=batch is batches[-1],
                num_in_place=batch.widest.in_place.num_requests,
                layouts=[_on_device(layout, batch.query_starts, upload) for layout in batch.layouts],
                gathers=self._cache.gathers(batch, upload),
                stores=self._cache.stores(batch, upload),
                sample_rows=upload(batch.sample_rows),
                scores=_scores(batch.scores, upload),
            )

    def _layout(self, op: Op, step: Pass) -> DeviceLayout:
        return step.batches[op.batch].layouts[self._windows.numbers[op.layer]]

    def _embed(self, step: Pass) -> None:
        for group in (batch.group for batch in step.batches if batch.is_first):
            group.rotation = self._family.rotation(group.positions)
            group.hidden = self._family.embed(self._fixed, group.token_ids, group.positions)

    def _decode(self, weights: OpenedLayer) -> None:
        """Decode what of a layer's weights lies coded; they are then used by all its mini-batches."""
        for decode in weights.decodings:
            decode()

    def _decode_experts(self, step: Pass, batch: DeviceBatch) -> None:
        """Decode the experts that a whole group has chosen, of which this is the last mini-batch."""
        group = batch.group
        assert step.weights is not None  # PROJECT comes first
        assert step.weights.experts is not None  # else the list does not ask for it
        assert group.routed is not None  # ROUTE comes first
        step.weights.experts.run(group.routed.routes.chosen, is_first=group is step.batches[0].group)

    def _project(self, w: Weights, layer: int, batch: DeviceBatch) -> None:
        """Project for a whole group, of which this is the first mini-batch."""
        group = batch.group
        absorption = self._family.absorption if group.absorbs else None
        project = self._family.project if absorption is None else absorption.project
        projection = project(w, layer, group.hidden, group.rotation)
        attended = projection.queries.new_empty((len(group.hidden), self._family.heads.out_size))
        group.projected = Projected(projection, attended)

    def _place(self, op: Op, step: Pass, batch: DeviceBatch) -> None:
        """Fill the buffer with what is on the device already, and store new rows there."""
        buffers, projected = self._cache.buffers[op.slot], batch.group.projected
        assert projected is not None  # PROJECT comes first
        is_whole = batch.is_first and batch.is_last
        step.projected = projected if is_whole else projected.select(batch.rows)
        self._cache.gather(buffers, batch.gathers, op.layer)
        layout, new = self._layout(op, step), step.projected.projection
        self._cache.write_kv(buffers.kv, layout.new_rows.target, new.kv, layout.new_rows.source)
        if self._absorbed is not None:
            rows = layout.absorbed
            self._device.copy_rows(buffers.activations, rows.target, new.activation, rows.source)
        self._store(Tier.DEVICE, op, step)

    def _store(self, tier: Tier, op: Op, step: Pass) -> None:
        assert step.projected is not None  # PLACE comes first
        new = step.projected.projection
        self._cache.store(tier, op.layer, step.batches[op.batch].stores, new.kv, new.activation)

    def _attend(self, op: Op, step: Pass, batch: DeviceBatch) -> None:
        """Fill the mini-batch's rows of what is attended to."""
        assert step.projected is not None  # PLACE comes first
        queries, out = step.projected.projection.queries, step.projected.attended
        kv, first = self._cache.buffers[op.slot].kv, batch.num_in_place
        layout, sinks = self._layout(op, step), self._family.sinks(step.w, op.layer)
        self._device.copy_rows(kv, layout.copies.target, kv, layout.copies.source)
        if layout.in_place is not None:
            self._attend_in_place(op, step.w, queries[:first], layout.in_place, out[:first])
        if layout.packed is not None:
            window = self._windows.of_layers[op.layer]
            out[first:] = self._attention.packed(queries[first:], kv, layout.packed, window, sinks)

    def _attend_in_place(self, op: Op, w: Weights, queries: torch.Tensor, rows: InPlaceRows, out: torch.Tensor) -> None:
        buffers, pool = self._cache.buffers[op.slot], self._cache.in_place(op.layer)
        absorption, sinks = self._family.absorption, self._family.sinks(w, op.layer)
        if self._absorbed is None or absorption is None:
            self._attention.in_place(queries, pool, buffers.kv, rows, out, sinks=sinks)
            return
        gathered = queries.new_empty((len(queries), absorption.heads.out_size))
        absorbed = absorption.queries(w, op.layer, queries)
        self._absorbed.in_place(absorbed, pool, buffers.activations, rows, gathered, sinks=sinks)
        out.copy_(absorption.values(w, op.layer, gathered))

    def _finish(self, step: Pass, layer: int, batch: DeviceBatch) -> None:
        """Finish the layer for a whole group, of which this is the last mini-batch."""
        group = batch.group
        if group.routed is not None:
            group.hidden = self._family.finish_routed(step.w, layer, group.routed)
            group.routed = None
            return
        group.hidden = self._family.finish_layer(step.w, layer, group.hidden, self._take_attended(step, group))

    def _route(self, step: Pass, layer: int, batch: DeviceBatch) -> None:
        """Choose the layer's experts for a whole group, of which this is the last mini-batch."""
        group = batch.group
        routed = self._family.route(step.w, layer, group.hidden, self._take_attended(step, group))
        if group.choosing is not None:
            chosen = routed.routes.chosen.index_select(0, group.choosing)
            routed = routed._replace(routes=routed.routes._replace(chosen=chosen))
        group.routed, chosen = routed, routed.routes.chosen
        expected = self._prefetcher.expect(layer, len(chosen))
        if expected is not None:
            self._device.send(chosen, expected)

    def _take_attended(self, step: Pass, group: Group) -> torch.Tensor:
        """What attention gave [n, q]; the projections are used for the last time: one group at a time has room."""
        assert group.projected is not None  # PROJECT comes first
        attended, group.projected, step.projected = group.projected.attended, None, None
        return attended

    def _rebuild(self, w: Weights, layer: int, buffers: Buffers, layout: DeviceLayout) -> None:
        """Rebuild K and V of the cached activations where attention reads them; rows of chunks are copied there."""
        total, kv, kv_rows = len(layout.activation_rows), buffers.kv, self._family.kv_rows
        in_front = layout.num_rebuilt if isinstance(kv_rows, ValueRows) else 0
        self.regenerated_tokens += total - layout.num_absorbed
        behind = range(in_front + layout.num_absorbed, total, REGENERATE_ROWS)
        pieces = [*([0] if in_front else []), *behind, total]
        for start, end in pairwise(pieces):
            rows = slice(start, end)
            shape = end - start, kv_rows.shape.width
            out = kv[rows] if start < in_front else torch.empty(shape, dtype=kv_rows.computed, device=kv.device)
            rotation = self._family.rotation(layout.activation_positions[rows])
            self._family.keys_values(w, layer, buffers.activations[rows], rotation, out)
            if start >= in_front:
                kv_rows.put(kv, layout.activation_rows[rows], out)

    def _head(self, step: Pass) -> None:
        sampled = torch.cat([batch.sampled for batch in step.batches])
        step.logits = self._family.logits(self._fixed, sampled[: self.sample_rows])
        step.others = sampled[self.sample_rows :]


def _scores(scores: Scores | None, upload: Upload) -> DeviceScores | None:
    return None if scores is None else DeviceScores(upload(scores.rows), upload(scores.token_ids))


def _on_device(layout: Layout, query_starts: Ints, upload: Upload) -> DeviceLayout:
    return DeviceLayout(
        in_place=_in_place_rows(layout, upload),
        packed=_packed_rows(layout, query_starts, upload),
        num_rebuilt=layout.in_place.num_rebuilt,
        num_absorbed=layout.in_place.num_absorbed,
        absorbed=DeviceRows.of(layout.absorbed, upload),
        new_rows=DeviceRows.of(layout.new_rows, upload),
        activation_rows=upload(layout.activation_rows),
        activation_positions=upload(layout.activation_positions),
        copies=DeviceRows.of(layout.copies, upload),
    )


def _in_place_rows(layout: Layout, upload: Upload) -> InPlaceRows | None:
    rows = layout.in_place
    if not rows.num_requests:
        return None
    key_starts = layout.key_starts[: rows.num_requests + 1]
    return InPlaceRows(
        tables=upload(rows.tables.astype(np.int32)),
        counts=upload(rows.counts.astype(np.int32)),
        skips=None if rows.skips is None else upload(rows.skips.astype(np.int32)),
        key_starts=upload(key_starts.astype(np.int32)),
        rebuilt_starts=upload(rows.rebuilt_starts.astype(np.int32)),
        max_keys=int((rows.num_visible + np.diff(rows.rebuilt_starts) + np.diff(key_starts)).max()),
    )


def _packed_rows(layout: Layout, query_starts: Ints, upload: Upload) -> PackedRows | None:
    first = layout.in_place.num_requests
    if first == len(query_starts) - 1:
        return None
    query_starts, key_starts = query_starts[first:] - first, layout.key_starts[first:]
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
