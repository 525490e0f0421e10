"""Experts that are decoded once they are chosen: those alone that a step's tokens take, each once in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from hsrpc.device.device import Device
from hsrpc.plan.memory_use import DeviceUse


class ChosenExperts:
    """Tables on the device that say which experts are decoded next, of one layer after the other.

    All is launched on the compute stream, which decodes a layer's experts before it comes to the next layer.
    """

    def __init__(self, device: Device, num_experts: int) -> None:
        """`num_experts`: those of a layer, at most."""
        shape = (num_experts,)
        self.moves = device.empty(shape, torch.int64, DeviceUse.WORKSPACE)
        """int64 [E]: see `Packing.decoding`."""
        self.in_place = device.empty(shape, torch.int64, DeviceUse.WORKSPACE).zero_()
        """int64 [E]: the places of experts that lie where their tensors say."""
        self._decoded = device.empty(shape, torch.int64, DeviceUse.WORKSPACE)
        """int64 [E]: 1 for those of the layer that are decoded already, for a group before."""

    def mark(self, chosen: torch.Tensor, places: torch.Tensor, *, is_first: bool) -> None:
        """Let those of the `chosen` [n, k] be decoded next that are not yet; `is_first`: none of the layer is.

        `places` (int64 [E]): how many bytes behind what its tensors say each expert lies.
        """
        moves, decoded = self.moves[: len(places)], self._decoded[: len(places)]
        if moves.is_cuda:
            from hsrpc.model.kernels import experts as kernels  # loads Triton

            kernels.mark(chosen, places, moves, decoded, is_first=is_first)
            return
        wanted = torch.zeros_like(decoded).index_fill_(0, chosen.reshape(-1), 1)
        before = torch.zeros_like(decoded) if is_first else decoded.clone()
        decoded.copy_(wanted | before)
        moves.copy_(torch.where(wanted > before, places, -1))


class ExpertDecoding(NamedTuple):
    """Decodes a layer's experts."""

    tables: ChosenExperts
    places: torch.Tensor
    """int64 [E]"""
    decodings: tuple[Callable[[], None], ...]
    """Each decodes those of the experts' tensors that are packed in one way, as far as `tables` say."""

    def run(self, chosen: torch.Tensor, *, is_first: bool) -> None:
        """Decode those of the `chosen` [n, k] that are not decoded yet; `is_first`: the step decodes none before."""
        self.tables.mark(chosen, self.places, is_first=is_first)
        for decode in self.decodings:
            decode()
