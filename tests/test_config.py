"""Sizes and rates as people read them."""

from __future__ import annotations

import pytest

from hsrpc.config import format_rate


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.0, "0.00 B/s"),
        (0.4, "0.400 B/s"),
        (999.4, "999 B/s"),
        (999.6, "1.00 kB/s"),
        (3.1e8, "310 MB/s"),
        (1.5e9, "1.50 GB/s"),
        (5.31e10, "53.1 GB/s"),
        (6.8e14, "680 TB/s"),
        (1.28e15, "1.28 PB/s"),
    ],
)
def test_a_rate_has_the_unit_that_fits(rate, expected):
    """Three digits in any case: no slow machine has 0 GB/s."""
    assert format_rate(rate, "B/s") == expected
