"""Experts that come on demand: their slots on the device, and the area that all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from hsrpc.plan.sizes import ModelSizes

_ADDRESS_BYTES = 8


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
    """All weights of one expert, on the device and on the host."""
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
    def host_bytes(self) -> int:
        """Bytes of all experts in host memory."""
        return sum(self.counts) * self.expert_bytes

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


def demand_of(sizes: ModelSizes, budget: int) -> Demand | None:
    """Experts on demand, with as many slots as `budget` bytes hold; None: the model's cannot come so.

    They can where all are alike and lie on the host as they are used: coded ones would have to be decoded first.
    """
    experts = [layer.experts for layer in sizes.layers]
    alike = {(each.device_bytes, each.k) for each in experts if each is not None}
    tensors = [tensor for layer, _ in sizes.distinct if layer.experts for tensor in layer.expert_tensors]
    if len(alike) != 1 or any(tensor.decoded_bytes for tensor in tensors):
        return None
    ((size, k),), counts = alike, tuple(0 if each is None else each.count for each in experts)
    slots = max(0, budget) // (sum(map(bool, counts)) * size)
    num_tensors = sum(len(each.names) for each in experts if each is not None)
    return Demand(slots=min(slots, max(counts)), counts=counts, k=k, expert_bytes=size, num_tensors=num_tensors)
