"""How far the host is ahead: no further than keeps the device busy, nor than memory is planned for."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hsrpc.device.device import CpuDevice, Event, Stream
from hsrpc.engine.pace import Pace
from hsrpc.plan.plan import PENDING_QUERIES

MAX_QUERIES = 10
AHEAD = 8
"""Mini-batches of a layer beside the one that is launched."""


class LazyDevice(CpuDevice):
    """Computes only what the host waits for; an event is its number."""

    def __init__(self) -> None:
        super().__init__()
        self.compute: Any = "compute"
        self.num_recorded = self.num_done = 0

    def record(self, stream: Stream) -> Event:
        assert stream == self.compute
        self.num_recorded += 1
        return self.num_recorded

    def synchronize(self, event: Event) -> None:
        assert self.num_done < event <= self.num_recorded
        self.num_done = event


@given(
    launches=st.lists(st.tuples(st.integers(1, MAX_QUERIES), st.integers(1, 4)), min_size=1, max_size=60),
    largest=st.integers(1, MAX_QUERIES),
)
def test_the_host_waits_as_soon_as_it_must_and_no_sooner(launches: list[tuple[int, int]], largest: int) -> None:
    """Whole mini-batches under way are 8 at most, and with the new one have no more rows than memory is planned for."""
    device = LazyDevice()
    pace, under_way = Pace(device, MAX_QUERIES), deque[int]()
    for number, (queries, num_operations) in enumerate(launches):
        count = min(queries, largest)
        for _ in range(num_operations):  # of one place
            pace.turn(divmod(number, 3), count)
        assert device.num_recorded == number  # the end of each but the last
        while len(under_way) > AHEAD or sum(under_way) + count > PENDING_QUERIES * MAX_QUERIES:
            under_way.popleft()
        assert device.num_recorded - device.num_done == len(under_way)
        under_way.append(count)


def test_a_mini_batch_in_the_next_layer_is_another() -> None:
    """It is told by layer and mini-batch: one mini-batch a layer is paced as well."""
    device = LazyDevice()
    pace = Pace(device, MAX_QUERIES)
    for layer in range(3 * AHEAD):
        pace.turn((layer, 0), 1)
    assert device.num_recorded == 3 * AHEAD - 1
    assert device.num_done == device.num_recorded - AHEAD
