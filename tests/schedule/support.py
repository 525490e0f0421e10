"""Steps of a scheduler without an engine, and what is asserted of them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import numpy as np

from hsrpc.schedule.assemble import Assembler
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import SchedulerLimits
from hsrpc.schedule.step import Scheduled, Step
from hsrpc.schedule.sweep import NOTHING_CARRIED, LayerPlacement

LAYERS = (LayerPlacement(), LayerPlacement(bus_bytes=1000))


class Counting(Request):
    """A request that counts how often any of its attributes is read."""

    __slots__ = ()
    reads = 0

    def __getattribute__(self, name: str) -> object:
        Counting.reads += 1
        return super().__getattribute__(name)


def assemble(scheduled: Scheduled, limits: SchedulerLimits) -> Step:
    """The step of a model of two layers, one of them streamed."""
    assembler = Assembler(
        layers=LAYERS,
        block_size=limits.block_size,
        windows=limits.windows,
        max_queries=limits.buffers.queries,
    )
    return assembler.assemble(scheduled, NOTHING_CARRIED)


def sampled(scheduled: Scheduled) -> list[Request]:
    """Whose next token a step samples, in the order of its rows."""
    return [chunk.request for chunk in scheduled.chunks if chunk.samples]


def assert_same(found: object, wanted: object) -> None:
    """Values, and what has arrays inside, are of the same types and equal."""
    assert type(found) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, tuple | list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif is_dataclass(wanted):
        for item in fields(wanted):
            assert_same(getattr(found, item.name), getattr(wanted, item.name))
    else:
        assert found == wanted
