"""The rates that the planner builds on."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from hsrpc.device.calibration import _read_width, calibrate, fit_line, sustained_load
from hsrpc.device.device import CpuDevice
from hsrpc.model.spec import named_spec
from hsrpc.testing.ordered_device import OrderedDevice

ROWS = (1024, 2048, 4096, 8192)
POSITIVE = st.floats(1e-9, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_positive_and_finite(dtype: torch.dtype) -> None:
    """Whatever the machine: bus both ways and at once, memory, GEMM and launches."""
    rates = asdict(calibrate(CpuDevice(), named_spec("opt-125m", dtype).sizes, dtype))
    assert rates.pop("gemm_overhead") >= 0
    assert 0 < rates.pop("duplex_share") <= 1
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())


def test_what_is_measured_is_in_order() -> None:
    """No copy or product runs before what it reads is there."""
    device = OrderedDevice()
    calibrate(device, named_spec("opt-125m", torch.float32).sizes, torch.float32)
    sustained_load(device)
    device.check()


def test_pinned_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration holds no memory afterwards."""
    released: list[int] = []
    monkeypatch.setattr(CpuDevice, "release_pinned", lambda device: released.append(1))
    calibrate(CpuDevice(), named_spec("opt-125m", torch.float32).sizes, torch.float32)
    assert released == [1]
    sustained_load(CpuDevice())
    assert released == [1, 1]


def test_what_the_bus_keeps_up_counts_what_disturbs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 8 MiB that now and then wait for 20 ms: the time of all counts, not that of the fast ones."""
    copy, waits = torch.Tensor.copy_, cycle((0.02, 0.0, 0.0, 0.0))

    def disturbed(target: torch.Tensor, source: torch.Tensor, **options: bool) -> torch.Tensor:
        time.sleep(next(waits))
        return copy(target, source, **options)

    undisturbed = sustained_load(CpuDevice())
    monkeypatch.setattr(torch.Tensor, "copy_", disturbed)
    assert 0 < sustained_load(CpuDevice()) <= min(undisturbed, 4 * 8 * 1024**2 / 0.02)


def test_a_disturbance_of_most_times_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of nine reads of memory wait for 10 ms: the rate is that of the others."""
    amax, waits = torch.amax, cycle((0.0, *[0.01] * 5, *[0.0] * 4))

    def disturbed(values: torch.Tensor) -> torch.Tensor:
        time.sleep(next(waits))
        return amax(values)

    monkeypatch.setattr(torch, "amax", disturbed)
    found = calibrate(CpuDevice(), named_spec("opt-125m", torch.float32).sizes, torch.float32)
    assert found.attention_bandwidth > 8 * 1024**2 / 0.01


@pytest.mark.parametrize(("name", "width"), [("opt-125m", 3072), ("olmoe", 64 * 1024)])
def test_weights_of_experts_are_read_together(name: str, width: int) -> None:
    """Those of one token's are so few that reading them says little of a launch that reads all."""
    layer = named_spec(name, torch.float32).sizes.commonest
    assert _read_width(layer, max_width=1 << 20) == width
    assert _read_width(layer, max_width=1) == layer.ffn_size


@pytest.mark.parametrize(("name", "most"), [("layer_norm", 30), ("linear", 45)])
def test_a_busy_machine_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    """Each kernel waits for 50 ms, as it does for a thread that does not get its core: few are launched."""
    kernel, calls = getattr(functional, name), []

    def delayed(*args: object, **options: object) -> torch.Tensor:
        calls.append(args)
        time.sleep(0.05)
        return kernel(*args, **options)

    monkeypatch.setattr(functional, name, delayed)
    calibrate(CpuDevice(), named_spec("opt-125m", torch.float32).sizes, torch.float32)
    assert 4 <= len(calls) <= most


@pytest.mark.parametrize(("slow", "chosen"), [(2, 1), (1, 2)])
def test_one_thread_measures_where_two_are_slower(monkeypatch: pytest.MonkeyPatch, slow: int, chosen: int) -> None:
    """Copies by one number of threads take 20 ms, by the other 1 ms. Afterwards torch has as many as before."""
    used, before = [], torch.get_num_threads()

    def copy(target: torch.Tensor, source: torch.Tensor, **options: bool) -> torch.Tensor:
        used.append(torch.get_num_threads())
        time.sleep(0.02 if used[-1] == slow else 0.001)
        return target

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    torch.set_num_threads(2)
    try:
        calibrate(CpuDevice(), named_spec("opt-125m", torch.float32).sizes, torch.float32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert used[-1] == chosen


@given(slope=POSITIVE, overhead=st.just(0.0) | POSITIVE)
def test_a_line_is_found(slope: float, overhead: float) -> None:
    """Times that lie on a line give its slope and where it begins."""
    found = fit_line(ROWS, [overhead + slope * rows for rows in ROWS])
    assert found[0] == pytest.approx(slope, rel=1e-3, abs=overhead * 1e-6)
    assert found[1] == pytest.approx(overhead, rel=1e-3, abs=slope * 0.1)


@given(seconds=st.lists(POSITIVE, min_size=4, max_size=4))
def test_a_fit_never_goes_backwards(seconds: list[float]) -> None:
    """Whatever noise there is, more rows take longer and no rows take no less than nothing."""
    slope, overhead = fit_line(ROWS, seconds)
    assert slope > 0
    assert overhead >= 0
