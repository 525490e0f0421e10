"""The batch sizes for which decode steps are captured as graphs, and how many graphs that makes."""

from __future__ import annotations

import numpy as np

from hsrpc.plan.sizes import Number


def graph_sizes(max_batch: int, num_segments: int) -> list[int]:
    """Batch sizes up to `max_batch`, which is included, for steps of so many graphs each.

    1, 2, 3, 4, 6, 8, 12, 16, ...: no batch is padded by more than half. Of steps in several segments the powers of two
    alone: each size takes as long to capture as some steps, and padding costs them little.
    """
    factors = (1, 3) if num_segments == 1 else (1,)
    smaller = {n * 2**power for power in range(max_batch.bit_length()) for n in factors if n * 2**power < max_batch}
    return sorted(smaller | {max_batch})


def num_segment_graphs(max_batch: Number, num_segments: Number) -> Number:
    """Graphs of steps in several segments, for all their sizes; 0 where `max_batch` is 0, or steps are one graph."""
    sizes = np.ceil(np.log2(np.maximum(max_batch, 1))) + 1
    found: Number = np.where((np.asarray(num_segments) > 1) & (np.asarray(max_batch) > 0), sizes * num_segments, 0)
    return found
