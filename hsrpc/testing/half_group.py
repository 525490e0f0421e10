"""The first of two GPUs in a process without the second: what that would have loaded comes from memory.

With it one process runs the operations of a rank, in front of whatever checks them; see `ordered_device`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hsrpc.device.device import Device
from hsrpc.device.group import DeviceGroup
from hsrpc.engine import opened_model, startup
from hsrpc.engine.loading import load_weights
from hsrpc.engine.weights import ModelWeights
from hsrpc.model.family import Family
from hsrpc.model.formats.format import WeightSource
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner


class _Half(DeviceGroup):
    """One of two."""

    def __init__(self, rank: int) -> None:
        self.size = 2
        self.rank = rank
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """What this GPU loads, or holds, of each layer, and what the other does."""

    def gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        start, end = self.part(len(whole))
        with _disable_current_modes():
            [other] = [other for mine, other in self.layers if torch.equal(mine, own)]
        own.clone()  # goes to the other
        if own.data_ptr() != whole[start:end].data_ptr():
            whole[start:end].copy_(own)
        whole[end:].copy_(other)

    def meet(self) -> None:
        pass

    def leave(self) -> None:
        pass


@contextmanager
def half_of_two() -> Iterator[None]:
    """Inside it, engines load and compute as the first of two GPUs; `plan_for_half` makes their plans."""
    group = _Half(0)

    def load(
        family: Family, source: WeightSource, plan: Plan, device: Device, stop: threading.Event, **settings: object
    ) -> ModelWeights:
        load = partial(load_weights, family, source, plan, device, stop)
        own, others = load(group=group), load(group=_Half(1))
        group.layers = list(zip(_pieces(own), _pieces(others), strict=True))
        return own

    with (
        patch.object(opened_model, "load_weights", load),
        patch.object(startup, "open_gpu", partial(startup.open_gpu, group=group)),
    ):
        yield


def _pieces(weights: ModelWeights) -> Iterator[torch.Tensor]:
    """What one of them has of each layer: in host memory, and on its device."""
    return (piece for layer in weights.layers for piece in (layer.packed, layer.spread) if piece is not None)


def plan_for_half(planner: Planner) -> Plan:
    """The plan of each of two GPUs, with the budgets of one."""
    return Planner(planner.sizes.on_gpus(2), planner.budgets, planner.hardware, planner.config).plan()
