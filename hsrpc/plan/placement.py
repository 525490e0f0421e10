"""Choices of the weights that stay on the device, and the bytes that follow from each."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hsrpc.plan.sizes import Floats, ModelSizes, StreamedSizes, WeightBuffers
from hsrpc.schedule.sweep import BUFFERS

Resident = tuple[frozenset[str], ...]
"""Names of the packed tensors that stay on the device, for each layer."""


@dataclass(frozen=True, slots=True)
class ResidentChoices:
    """Choices of the weights that stay on the device, from few to many; parallel."""

    names: tuple[Resident, ...]
    resident: Floats
    """Bytes that stay, all layers: each tensor is allocated by itself, without padding."""
    on_bus: Floats
    """Bytes that cross the bus in every step for the others."""
    decode_traffic: Floats
    """Bytes of device memory that decoding these reads and writes in every step."""
    on_host: Floats
    """Bytes that the others take in host memory, at most."""
    buffers: Floats
    """Bytes of the device buffers for them."""


def resident_choices(sizes: ModelSizes, shares: tuple[float, ...]) -> ResidentChoices:
    """The weights that stay for each of the given shares of all layers' bytes, at most."""
    total = sizes.layers_bytes
    names = tuple({spread_resident(sizes, int(share * total)): None for share in sorted(shares)})
    placed = [count_streamed(sizes, each) for each in names]

    def floats(values: list[float]) -> Floats:
        return np.array(values, dtype=np.float64)

    return ResidentChoices(
        names=names,
        resident=floats([resident_bytes(sizes, each) for each in names]),
        on_bus=floats([sum(n * each.bus_bytes for each, n in found.items()) for found in placed]),
        decode_traffic=floats([sum(n * each.decode_traffic for each, n in found.items()) for found in placed]),
        on_host=floats([host_bytes(found) for found in placed]),
        buffers=floats([BUFFERS * each.packed + each.decoded for each in map(WeightBuffers.of, placed)]),
    )


def resident_bytes(sizes: ModelSizes, resident: Resident) -> int:
    """Bytes of the weights that stay: each tensor is allocated by itself, without padding."""
    alike = Counter(zip(sizes.kinds, resident, strict=True))
    return sum(count * sizes.distinct[kind][0].resident_bytes(names) for (kind, names), count in alike.items())


def count_streamed(sizes: ModelSizes, resident: Resident) -> Counter[StreamedSizes]:
    """What streams of each layer, and in how many layers the same does."""
    alike = Counter(zip(sizes.kinds, resident, strict=True))
    found: Counter[StreamedSizes] = Counter()
    for (kind, names), count in alike.items():
        found[sizes.distinct[kind][0].streamed(names)] += count
    return found


def host_bytes(streamed: Counter[StreamedSizes]) -> int:
    """Bytes of all layers' streamed weights in host memory, at most."""
    exact = sum(count * each.host_bytes for each, count in streamed.items())
    return math.ceil(round(exact, 3))  # what is rounded in the last place adds no byte


def spread_resident(sizes: ModelSizes, budget: int) -> Resident:
    """Tensors that stay on the device in each layer: at most `budget` bytes in all, the same part of each layer.

    Layer by layer, largest first, the tensors stay that keep the running total within the budget's part so far.
    """
    chosen: list[frozenset[str]] = []
    spent = passed = 0
    for layer in sizes.layers:
        names = []
        passed += layer.weight_bytes
        limit = budget * passed // sizes.layers_bytes
        for tensor in layer.largest_first:
            if spent + tensor.device_bytes <= limit:
                names.append(tensor.name)
                spent += tensor.device_bytes
        chosen.append(frozenset(names))
    return tuple(chosen)
