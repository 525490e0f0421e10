"""Choices of the weights that stay on the device, and the bytes that follow from each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsrpc.plan.device_memory import Floats
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.sweep import BUFFERS


@dataclass(frozen=True, slots=True)
class ResidentChoices:
    """Choices of the weights that stay on the device, from few to many; parallel."""

    names: tuple[tuple[frozenset[str], ...], ...]
    """For each choice and layer, the packed tensors that stay."""
    resident: Floats
    """Bytes that stay, all layers: each tensor is allocated by itself, without padding."""
    on_bus: Floats
    """Bytes that cross the bus in every step for the others."""
    on_host: Floats
    """Bytes that the others take in host memory, at most."""
    buffers: Floats
    """Bytes of the device buffers for them."""


def resident_choices(sizes: ModelSizes, shares: tuple[float, ...]) -> ResidentChoices:
    """The weights that stay for each of the given shares of all layers' bytes, at most."""
    total = sizes.num_layers * sizes.layer_bytes
    found = {spread_resident(sizes, int(share * total)): None for share in sorted(shares)}
    kept = [[sum(map(sizes.tensor_bytes, layer)) for layer in names] for names in found]
    streamed = np.array([total - sum(layers) for layers in kept], dtype=np.float64)
    resident = [sum(sizes.layer_tensors[name] for layer in names for name in layer) for names in found]
    largest = np.array([sizes.layer_bytes - min(layers) for layers in kept], dtype=np.float64)
    return ResidentChoices(
        names=tuple(found),
        resident=np.array(resident, dtype=np.float64) * sizes.element_bytes,
        on_bus=streamed * sizes.coded_share,
        on_host=np.ceil(streamed * sizes.max_coded_share),
        buffers=(BUFFERS + sizes.codes_weights) * largest,
    )


def spread_resident(sizes: ModelSizes, budget: int) -> tuple[frozenset[str], ...]:
    """Tensors that stay on the device in each layer: at most `budget` bytes in all, spread evenly over the layers.

    Layer by layer, largest first, the tensors stay that keep the running total within the budget's part so far.
    """
    by_size = sorted(((sizes.tensor_bytes(name), name) for name in sizes.layer_tensors), key=lambda item: -item[0])
    chosen: list[frozenset[str]] = []
    spent = 0
    for layer in range(1, sizes.num_layers + 1):
        names = []
        limit = budget * layer // sizes.num_layers
        for size, name in by_size:
            if spent + size <= limit:
                names.append(name)
                spent += size
        chosen.append(frozenset(names))
    return tuple(chosen)
