"""Experts that come on demand: their slots on the device, and the area that all layers share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from hsrpc.plan.sizes import LayerSizes, ModelSizes

_ADDRESS_BYTES = 8
_CHOICE_TABLES = 3
"""Tables of a number for each expert: see `hsrpc.engine.chosen_experts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Where experts lie on the device: rows of `expert_bytes`, first the slots of each layer, then the shared area.

    That has room for all experts of a layer that have no slot: a step of prompts may need them all.
    """

    slots: int
    """Slots of each layer that has as many experts."""
    counts: tuple[int, ...]
    """Experts of each layer; 0: its MLP is dense."""
    k: int
    """Experts that a token takes."""
    expert_bytes: int
    """All weights of one expert, in its row and on the host."""
    ready_bytes: int
    """The same as they are multiplied."""
    decode_traffic: float = 0.0
    """Bytes of device memory that decoding an expert reads and writes; 0: it lies ready in its row."""
    num_tensors: int
    """Weight tensors of all experts: each has its address in a table on the device."""

    def slots_of(self, layer: int) -> int:
        """Slots of a layer."""
        return min(self.slots, self.counts[layer])

    @property
    def first_rows(self) -> tuple[int, ...]:
        """The first slot's row for each layer, then that of the shared area."""
        return tuple(accumulate(map(self.slots_of, range(len(self.counts))), initial=0))

    @property
    def num_rows(self) -> int:
        """Rows on the device."""
        return self.first_rows[-1] + max(self.counts) - min(self.slots, max(self.counts))

    @property
    def device_bytes(self) -> int:
        """Bytes of the rows."""
        return self.num_rows * self.expert_bytes

    @property
    def is_coded(self) -> bool:
        """Whether experts are decoded before they are used."""
        return self.decode_traffic > 0

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the buffer that the experts of a layer are decoded to, all of them; 0: they lie ready."""
        return max(self.counts) * self.ready_bytes if self.is_coded else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of all experts in host memory."""
        return sum(self.counts) * self.expert_bytes

    @property
    def traffic(self) -> float:
        """Bytes of device memory that decoding all experts of all layers reads and writes."""
        return sum(self.counts) * self.decode_traffic

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables of addresses."""
        return self.num_tensors * _ADDRESS_BYTES

    @property
    def num_segments(self) -> int:
        """Parts of a decode step, one behind each layer's choice."""
        return 1 + sum(map(bool, self.counts))

    @property
    def hit_rate(self) -> float:
        """Part of the experts that lies in slots: as often is one there where all are as likely."""
        return self.first_rows[-1] / sum(self.counts)

    @property
    def missed(self) -> float:
        """Part of the experts that has no slot."""
        return 1 - self.hit_rate


def choice_table_bytes(sizes: ModelSizes) -> int:
    """Bytes of the tables that say which of a layer's coded experts are decoded next."""
    counts = [layer.experts.count for layer, _ in sizes.distinct if layer.experts is not None]
    return _CHOICE_TABLES * _ADDRESS_BYTES * max(counts, default=0)


def demand_of(sizes: ModelSizes, budget: int) -> Demand | None:
    """Experts on demand, with as many slots as `budget` bytes hold; None: the model's cannot come so."""
    experts = AlikeExperts.of(sizes)
    return None if experts is None else experts.within(budget)


class _Expert(NamedTuple):
    """One expert, as a `Demand` has it."""

    k: int
    expert_bytes: int
    ready_bytes: int
    decode_traffic: float


@dataclass(frozen=True, slots=True)
class AlikeExperts:
    """A model's experts that may come on demand: all are alike, and their bytes are known before they are read."""

    counts: tuple[int, ...]
    """Those of each layer."""
    one: _Expert
    num_tensors: int

    @classmethod
    def of(cls, sizes: ModelSizes) -> AlikeExperts | None:
        """None: the model has no experts, or they cannot come so."""
        distinct = {layer: _alike(layer) for layer, _ in sizes.distinct if layer.experts is not None}
        found = set(distinct.values())
        if len(found) != 1 or (one := found.pop()) is None:
            return None
        counts = tuple(0 if layer.experts is None else layer.experts.count for layer in sizes.layers)
        return cls(counts, one, sum(len(layer.expert_tensors) * n for layer, n in sizes.distinct))

    @property
    def num_bytes(self) -> int:
        """Bytes of all in their slots, had each one."""
        return sum(self.counts) * self.one.expert_bytes

    def within(self, budget: int) -> Demand:
        """With as many slots as `budget` bytes hold, the same number in each layer."""
        slots = max(0, budget) // (sum(map(bool, self.counts)) * self.one.expert_bytes)
        most, one = max(self.counts), self.one._asdict()
        return Demand(slots=min(slots, most), counts=self.counts, num_tensors=self.num_tensors, **one)


def _alike(layer: LayerSizes) -> _Expert | None:
    """Each expert of a layer; None: some differ, or the bytes of some are expected ones alone."""
    assert layer.experts is not None  # who calls knows that there are some
    count = layer.experts.count
    kinds = Counter(replace(tensor, name="") for tensor in layer.expert_tensors)
    if any(number % count or each.bus_bytes != each.host_bytes for each, number in kinds.items()):
        return None
    one = [each for each, number in kinds.items() for _ in range(number // count)]
    return _Expert(
        k=layer.experts.k,
        expert_bytes=sum(int(each.host_bytes) for each in one),
        ready_bytes=sum(each.device_bytes for each in one),
        decode_traffic=sum(each.decode_traffic for each in one),
    )
