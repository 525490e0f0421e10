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

from hsrpc.device.calibration import calibrate, fit_line, sustained_load
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
    """Five of nine reads of memory wait for 50 ms: the rate is that of the others."""
    amax, waits = torch.amax, cycle((0.0, *[0.05] * 5, *[0.0] * 4))

    def disturbed(values: torch.Tensor) -> torch.Tensor:
        time.sleep(next(waits))
        return amax(values)

    monkeypatch.setattr(torch, "amax", disturbed)
    found = calibrate(CpuDevice(), named_spec("opt-125m", torch.float32).sizes, torch.float32)
    assert found.attention_bandwidth > 8 * 1024**2 / 0.05


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
