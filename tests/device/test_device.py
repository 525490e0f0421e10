"""The CPU as a device, which defines what the copies mean, and what memory a program may take."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.config import DeviceKind
from hsrpc.device.device import CpuDevice, open_device
from hsrpc.device.host_pages import HostPages
from hsrpc.device.uploads import Uploads
from hsrpc.errors import ConfigError
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.schedule.step import Runs

SLOTS, ROWS, WIDTH = 40, 30, 6


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@st.composite
def runs(draw: st.DrawFn) -> Runs:
    """Runs whose targets do not overlap."""
    pieces, row = [], 0
    while row < ROWS and draw(st.booleans()):
        row += draw(st.integers(0, 3))
        count = draw(st.integers(0, max(0, min(8, ROWS - row))))
        pieces.append((draw(st.integers(0, SLOTS - count)), row, count))
        row += count
    return Runs(*(ints(*(piece[i] for piece in pieces)) for i in range(3)))


@given(copies=runs(), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_copy_runs_copies_row_by_row(copies: Runs, dtype: torch.dtype) -> None:
    """As a loop over single rows would; all other rows stay as they are."""
    device = CpuDevice()
    source = device.pinned(SLOTS * WIDTH * dtype.itemsize, HostUse.CACHE_BLOCKS).view(dtype).view(SLOTS, WIDTH)
    source.copy_(torch.randn(SLOTS, WIDTH))
    target = device.empty((ROWS, WIDTH), dtype, DeviceUse.CACHE_BUFFERS)
    target.fill_(-7)
    wanted = target.clone()
    for start, row, count in zip(copies.source, copies.target, copies.count, strict=True):
        for i in range(count):
            wanted[row + i] = source[start + i]
    device.copy_runs(target, source, copies)
    assert torch.equal(target, wanted)


@given(data=st.data())
def test_copy_rows_scatters_and_gathers(data: st.DataObject) -> None:
    """`target[target_rows] = source[source_rows]`, also from a strided source, as the projections give it."""
    device = CpuDevice()
    source = torch.randn(SLOTS, 2 * WIDTH)[:, WIDTH:]
    target = torch.zeros(ROWS, WIDTH)
    target_rows = data.draw(st.lists(st.integers(0, ROWS - 1), unique=True))
    source_rows = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=len(target_rows), max_size=len(target_rows)))
    wanted = target.clone()
    for to, start in zip(target_rows, source_rows, strict=True):
        wanted[to] = source[start]
    device.copy_rows(target, device.upload(ints(*target_rows)), source, device.upload(ints(*source_rows)))
    assert torch.equal(target, wanted)


def test_work_on_the_cpu_is_done_when_the_call_returns() -> None:
    """Streams and events are nothing, and waiting for them is harmless."""
    device = CpuDevice()
    assert device.load is device.compute is device.store is None
    with device.on(device.compute):
        event = device.record(device.compute)
    device.wait(device.load, event)
    device.synchronize(event)
    device.keep(torch.empty(1), device.store)
    device.drain()
    assert device.memory == (0, 0)
    assert (device.name, device.uuid) == ("CPU", "")


def test_pinned_memory_comes_filled() -> None:
    """What is to be written into it is there when it comes; a fault in writing it goes through."""
    assert CpuDevice().pinned(3, HostUse.STREAMED_WEIGHTS, lambda memory: memory.fill_(7)).tolist() == [7, 7, 7]
    with pytest.raises(ZeroDivisionError):
        CpuDevice().pinned(3, HostUse.STREAMED_WEIGHTS, lambda memory: memory.fill_(1 // 0))


def test_pages_are_given_and_go_back() -> None:
    """They are there before they are asked for, filled or not; what is not kept is not the program's any more."""
    filled = HostPages(3, lambda memory: memory.fill_(7))
    assert filled.tensor.tolist() == [7, 7, 7]
    assert filled.num_bytes == mmap.PAGESIZE
    before = _resident_bytes()
    pages = HostPages(2**26 + 1)
    assert _resident_bytes() > before + 0.9 * 2**26
    pages.tensor[: 2**20] = 3
    pages.shorten(2**20)
    assert _resident_bytes() < before + 0.2 * 2**26
    assert len(pages.tensor) == pages.num_bytes == 2**20
    assert pages.tensor.sum() == 3 * 2**20
    with pytest.raises(ConfigError, match=r"host_memory='1024\.0 TiB'.*lower host_memory"):
        HostPages(2**50)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_that_cannot_be_had_is_a_setting_to_change() -> None:
    """ConfigError names host_memory, its size and the remedy."""
    with pytest.raises(ConfigError, match=r"host_memory='1024\.0 TiB'.*lower host_memory"):
        CpuDevice().pinned(2**50, HostUse.CACHE_BLOCKS)


def test_opening_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA where it is asked for and missing is an error; `auto` takes the CPU then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device(DeviceKind.AUTO), CpuDevice)
    assert isinstance(open_device(DeviceKind.CPU), CpuDevice)
    with pytest.raises(ConfigError, match="use device=cpu") as caught:
        open_device(DeviceKind.CUDA)
    assert caught.value.field == "device"


@given(data=st.data())
def test_uploads_arrive_as_they_are(data: st.DataObject) -> None:
    """Arrays of any sizes and both types, through chunks that most do not fit, and after a first sending."""
    sizes, given_arrays = [], []

    def allocate(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(size)
        return torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hsrpc.device.uploads._CHUNK_BYTES", 64)
        uploads = Uploads(allocate)
        for _ in range(2):
            shapes = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
            for shape in shapes:
                dtype = data.draw(st.sampled_from([np.int32, np.int64]))
                array = np.arange(100, 100 + shape[0] * shape[1], dtype=dtype).reshape(shape).T
                given_arrays.append((array, uploads(array)))
            uploads.send()
    for array, tensor in given_arrays:
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
    assert len(sizes) <= len(given_arrays)


def test_a_steps_arrays_travel_together() -> None:
    """Many small arrays take one chunk, and hold what they should once the context is left."""
    device = CpuDevice()
    with device.uploads() as upload:
        tensors = [upload(ints(*range(count))) for count in range(50)]
    assert [tensor.tolist() for tensor in tensors] == [list(range(count)) for count in range(50)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors if len(tensor)}) == 1
