"""The ordered device finds what no event orders, to the byte, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.config import DeviceKind
from hsrpc.device.device import open_device
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.lossless import WORD, Lossless
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.schedule.step import Runs
from hsrpc.testing.access_history import AccessHistory, Actor, Box, RowSet
from hsrpc.testing.ordered_device import OrderedDevice, RaceError, ordered_devices

Example: TypeAlias = Callable[[OrderedDevice, torch.Tensor, bool], None]
"""Two streams at work on memory [8, 6] that is ready; `ordered`: with what orders them."""


def made() -> tuple[OrderedDevice, torch.Tensor]:
    device = OrderedDevice()
    memory = device.empty((8, 6), torch.float32, DeviceUse.MEASUREMENT)
    device.drain()
    return device, memory


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def order(device: OrderedDevice, earlier: object, later: object, ordered: bool) -> None:
    if ordered:
        device.wait(later, device.record(earlier))


def write_after_write(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory.fill_(1.0)
    order(device, device.load, device.compute, ordered)
    with device.on(device.compute):
        memory.zero_()


def read_after_write(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory.fill_(1.0)
    order(device, device.load, device.compute, ordered)
    with device.on(device.compute):
        memory.sum()


def write_after_read(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.store):
        memory.clone()
    order(device, device.store, device.load, ordered)
    with device.on(device.load):
        memory[3, 1:3] = 1.0


def the_event_is_recorded_too_early(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    early = device.record(device.load)
    with device.on(device.load):
        memory.fill_(1.0)
    device.wait(device.compute, device.record(device.load) if ordered else early)
    with device.on(device.compute):
        memory.sum()


def by_way_of_a_third_stream(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory.fill_(1.0)
    order(device, device.load, device.compute, ordered)
    order(device, device.compute, device.store, True)
    with device.on(device.store):
        memory.clone()


def by_way_of_the_host(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory.fill_(1.0)
    event = device.record(device.load)
    if ordered:
        device.synchronize(event)
    with device.on(device.compute):
        memory.sum()


def by_way_of_a_value(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory.fill_(1.0)
        if ordered:
            memory[0, 0].item()
    with device.on(device.compute):
        memory.sum()


def a_stream_inside_another(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.compute):
        memory[0].zero_()
        with device.on(device.load):
            memory[1].fill_(1.0)
        memory[2 if ordered else 1].zero_()


def parts_that_overlap(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory.view(-1)[:20].fill_(1.0)
    with device.on(device.compute):
        memory.view(-1)[20 if ordered else 19 :].zero_()


def columns(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory[:, :3].fill_(1.0)
    with device.on(device.compute):
        memory[:, 3 if ordered else 2 :].sum()


def every_other_row(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory[::2].fill_(1.0)
    with device.on(device.compute):
        memory[1 if ordered else 2 :: 2].zero_()


def bytes_of_one_number(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    data = memory.view(torch.uint8)
    with device.on(device.load):
        data[0, :2] = 1
    with device.on(device.compute):
        data[0, 2 if ordered else 1 : 4] = 1


def sets_of_rows(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    source = torch.ones(8, 6)
    for stream, rows in ((device.store, [5, 1]), (device.compute, [0, 2, 6 if ordered else 5])):
        with device.on(stream):
            device.copy_rows(memory, torch.tensor(rows), source, torch.tensor(rows))


def sets_of_rows_in_one_operation(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory.index_copy_(0, torch.tensor([5, 1]), torch.ones(2, 6))
    with device.on(device.compute):
        memory.index_select(0, torch.tensor([0, 2, 6 if ordered else 5]))


def runs_of_rows(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    source = torch.ones(8, 6)
    with device.on(device.load):
        device.copy_runs(memory, source, Runs(ints(0, 4), ints(0, 6), ints(3, 2)))
    with device.on(device.compute):
        memory[3 if ordered else 2 : 6].zero_()


def row_numbers(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    rows = device.empty((2,), torch.int64, DeviceUse.MEASUREMENT)
    rows.copy_(torch.tensor([1, 2]))
    device.drain()
    with device.on(device.store):
        device.copy_rows(memory, rows, torch.ones(8, 6), rows)
    order(device, device.store, device.load, ordered)
    with device.on(device.load):
        rows.zero_()


def bytes_loaded(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        device.load_bytes(memory.view(torch.uint8).view(-1), device.pinned(40, HostUse.MEASUREMENT).zero_())
    with device.on(device.compute):
        memory.view(-1)[10 if ordered else 9 :].sum()


def weights_decoded(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    packing, values = Lossless(torch.bfloat16).pack(torch.randn(1, WORD, dtype=torch.bfloat16))
    data = device.empty((packing.num_bytes,), torch.uint8, DeviceUse.MEASUREMENT)
    target = device.empty((1, WORD), torch.bfloat16, DeviceUse.MEASUREMENT)
    data.copy_(values)
    device.drain()
    with device.on(device.compute):
        packing.decoding([Encoded(packing, data, target)])()
    order(device, device.compute, device.store, ordered)
    with device.on(device.store):
        target.clone()


def what_is_copied_on_the_way(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.compute), torch.inference_mode():
        memory.t().reshape(-1)  # one operation, whose result could have been a view
    order(device, device.compute, device.load, ordered)
    with device.on(device.load):
        memory.zero_()


def a_stack_of_tensors(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.load):
        memory[2].zero_()
    order(device, device.load, device.compute, ordered)
    with device.on(device.compute):
        torch.cat([memory[0], memory[2]])


def an_argument_to_write_to(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.compute):
        torch.mm(torch.ones(8, 2), torch.ones(2, 6), out=memory)
    order(device, device.compute, device.store, ordered)
    with device.on(device.store):
        memory.clone()


def memory_of_a_result(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.compute):
        result = memory * 2
    order(device, device.compute, device.store, True)
    with device.on(device.store):
        result.clone()
    if ordered:
        device.keep(result, device.store)
    del result
    with device.on(device.compute):
        torch.ones(3)


def memory_that_is_waited_for(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.compute):
        result = memory * 2
    order(device, device.compute, device.store, True)
    with device.on(device.store):
        result.view(-1)[3:].clone()
    del result
    order(device, device.store, device.compute, ordered)
    with device.on(device.compute):
        torch.ones(3)


def memory_of_uploads(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.compute):
        with device.uploads() as upload:
            rows = upload(ints(1, 2))
        if not ordered:
            rows = rows.clone()  # memory of which nobody knows that `store` uses it
    order(device, device.compute, device.store, True)
    with device.on(device.store):
        device.copy_rows(memory, rows, torch.ones(8, 6), rows)
    del rows
    with device.on(device.compute):
        torch.ones(3)


def memory_without_a_stream(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    other = device.empty((4,), torch.float32, DeviceUse.MEASUREMENT)
    if ordered:
        device.drain()
    with device.on(device.load):
        other.sum()


def memory_without_a_stream_is_reused(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    other = device.empty((4,), torch.float32, DeviceUse.MEASUREMENT)
    device.drain()
    with device.on(device.load):
        other.sum()
    if ordered:
        device.synchronize(device.record(device.load))
    del other
    device.empty((4,), torch.float32, DeviceUse.MEASUREMENT)


def a_result_on_the_host(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    with device.on(device.compute):
        fetched = device.fetch(memory * 2)
    device._without = None if ordered else f"host waits for compute in {__name__}.a_result_on_the_host"
    assert fetched().shape == (8, 6)


def what_is_sent_to_the_host(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    target = device.small_pinned(4).view(torch.float32)
    sent = device.record(device.compute)
    with device.on(device.compute):
        device.send(memory[0, :1] * 2, target)
    if ordered:
        sent = device.record(device.compute)
    assert device.arrived(target, sent).shape == (1,)


def what_the_host_sends(device: OrderedDevice, memory: torch.Tensor, ordered: bool) -> None:
    host, target = device.small_memory(4)
    device.drain()
    numbers = host.numpy()
    numbers[:] = 1
    with device.on(device.compute):
        target.copy_(host)
    event = device.record(device.compute)
    if ordered:
        device.synchronize(event)
    numbers[2] = 7
    device.synchronize(event)


EXAMPLES: list[Example] = [
    write_after_write,
    read_after_write,
    write_after_read,
    the_event_is_recorded_too_early,
    by_way_of_a_third_stream,
    by_way_of_the_host,
    by_way_of_a_value,
    a_stream_inside_another,
    parts_that_overlap,
    columns,
    every_other_row,
    bytes_of_one_number,
    sets_of_rows,
    sets_of_rows_in_one_operation,
    runs_of_rows,
    row_numbers,
    bytes_loaded,
    weights_decoded,
    what_is_copied_on_the_way,
    a_stack_of_tensors,
    an_argument_to_write_to,
    memory_of_a_result,
    memory_that_is_waited_for,
    memory_of_uploads,
    memory_without_a_stream,
    memory_without_a_stream_is_reused,
    a_result_on_the_host,
    what_is_sent_to_the_host,
    what_the_host_sends,
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_what_is_not_ordered_is_found_and_nothing_else(example: Example) -> None:
    """Each example without what orders it has one kind of race, and with it none."""
    device, memory = made()
    example(device, memory, True)
    device.check()
    device, memory = made()
    example(device, memory, False)
    assert len(device.races) == 1
    with pytest.raises(RaceError, match="1 kinds of races"):
        device.check()


def test_two_reads_need_no_order() -> None:
    """All streams read the same bytes."""
    device, memory = made()
    for stream in (device.load, device.compute, device.store):
        with device.on(stream):
            memory.sum()
    device.check()


def test_a_stream_runs_in_order() -> None:
    """It waits for nothing of its own, whenever it is entered."""
    device, memory = made()
    for _ in range(2):
        with device.on(device.compute):
            memory.fill_(1.0)
            memory.sum()
    device.check()


def test_a_race_names_the_buffer_both_operations_their_places_and_streams() -> None:
    """Enough to mend it."""
    device, memory = made()
    write_after_write(device, memory, False)
    (race,) = device.races
    place = r"\({}\.write_after_write:\d+\)".format(__name__.replace(".", r"\."))
    assert f"measurement [8, 6] of {__name__}.made" in race
    with pytest.raises(
        RaceError, match=rf"write by aten::zero_ {place} on compute .* write by aten::fill_ {place} on load"
    ):
        device.check()


def twice(device: OrderedDevice) -> None:
    for stream in (device.compute, device.store):
        device.wait(stream, device.record(device.load))
    device.wait(device.compute, device.record(device.store))
    device.wait(device.load, device.record(device.load))


def test_sites_are_named_by_function_and_call() -> None:
    """Not by lines: an edit elsewhere in the file leaves them. A stream that waits for itself is none."""
    device = OrderedDevice()
    twice(device)
    assert device.sites == {
        f"compute waits for load in {__name__}.twice #1",
        f"store waits for load in {__name__}.twice #1",
        f"compute waits for store in {__name__}.twice #2",
    }


def test_one_site_is_left_out() -> None:
    """And no other."""
    memories = []
    for without in (
        None,
        f"compute waits for store in {__name__}.twice #2",
        f"store waits for load in {__name__}.twice #1",
    ):
        device = OrderedDevice(without=without)
        memory = device.empty((4,), torch.float32, DeviceUse.MEASUREMENT)
        device.drain()
        with device.on(device.store):
            memory.fill_(1.0)
        twice(device)
        with device.on(device.compute):
            memory.sum()
        memories.append(len(device.races))
    assert memories == [0, 1, 0]


def test_inside_the_context_the_cpu_is_ordered() -> None:
    """What is opened as the CPU is checked at the end; before and behind it, it is as ever."""
    with ordered_devices() as opened:
        device = open_device(DeviceKind.CPU)
        assert opened == [device]
    assert not isinstance(open_device(DeviceKind.CPU), OrderedDevice)
    with pytest.raises(RaceError):
        race()


def race() -> None:
    with ordered_devices():
        device = open_device(DeviceKind.CPU)
        write_after_write(device, device.empty((8, 6), torch.float32, DeviceUse.MEASUREMENT), False)


_SIZE = 48


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of 48 numbers, of one to three dimensions."""
    shape = draw(st.sampled_from([(48,), (8, 6), (4, 3, 4)]))
    tensor = torch.arange(_SIZE, dtype=torch.float32).view(shape)
    for dim, count in enumerate(shape):
        start = draw(st.integers(0, count - 1))
        stop = draw(st.integers(start + 1, count))
        tensor = tensor[(slice(None),) * dim + (slice(start, stop, draw(st.integers(1, 3))),)]
    return tensor.transpose(0, -1) if draw(st.booleans()) else tensor


@given(
    accesses=st.lists(st.tuples(views(), st.sampled_from(list(Actor)), st.booleans()), min_size=1, max_size=8),
    last=views(),
)
def test_a_history_is_exact(accesses: list[tuple[torch.Tensor, Actor, bool]], last: torch.Tensor) -> None:
    """As one that keeps a list for each number would say it."""
    history, naive = AccessHistory(4 * _SIZE), {}
    for number, (view, actor, writes) in enumerate(accesses, start=1):
        history.add(Box.of(view), actor, number, writes=writes)
        naive |= {(int(i), actor, writes): number for i in view.reshape(-1)}
    for writes in (False, True):
        found = {
            (c.actor, c.writes): c.number
            for c in history.unordered(Box.of(last), Actor.HOST, [0] * len(Actor), writes=writes)
        }
        expected: dict[tuple[Actor, bool], int] = {}
        for (index, actor, wrote), number in naive.items():
            if index in last and actor is not Actor.HOST and (wrote or writes):
                expected[actor, wrote] = max(number, expected.get((actor, wrote), 0))
        assert found == expected


@given(rows=st.lists(st.integers(0, 7), min_size=1, max_size=8), view=views())
def test_a_set_of_rows_is_exact(rows: list[int], view: torch.Tensor) -> None:
    """Half of each row, from a tensor with an offset."""
    history = AccessHistory(4 * _SIZE)
    right = torch.arange(_SIZE, dtype=torch.float32).view(8, 6)[:, 3:]
    history.add(RowSet.of(right, ints(*rows)), Actor.LOAD, 1, writes=True)
    found = list(history.unordered(Box.of(view), Actor.COMPUTE, [0] * len(Actor), writes=False))
    written = {int(i) for i in right[rows].reshape(-1)}
    assert bool(found) == (not written.isdisjoint(int(i) for i in view.reshape(-1)))
