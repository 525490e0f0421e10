"""The rates that the planner builds on."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from hsrpc.device.calibration import calibrate
from hsrpc.device.device import CpuDevice
from hsrpc.model.spec import named_spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_positive_and_finite(dtype: torch.dtype) -> None:
    """Whatever the machine: bus both ways, memory and GEMM."""
    rates = asdict(calibrate(CpuDevice(), named_spec("opt-125m", dtype).sizes, dtype))
    measured = [rates[name] for name in ("load_bandwidth", "store_bandwidth", "gemm_rate", "memory_bandwidth")]
    assert all(math.isfinite(rate) and rate > 0 for rate in measured)


def test_pinned_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration holds no memory afterwards."""
    released: list[int] = []
    monkeypatch.setattr(CpuDevice, "release_pinned", lambda device: released.append(1))
    calibrate(CpuDevice(), named_spec("opt-125m", torch.float32).sizes, torch.float32)
    assert released == [1]
