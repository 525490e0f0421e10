"""The numbers of rows for which decode steps are captured as graphs, and how many graphs that makes.

A row is a query that reads in place: one of each request, and one of each token that it has drafted.
"""

from __future__ import annotations

import numpy as np

from hsrpc.plan.sizes import Number


def graph_sizes(max_batch: int, num_segments: int, max_drafts: int = 0) -> list[int]:
    """Rows up to those of `max_batch` requests that draft `max_drafts` tokens each, for steps of so many graphs each.

    1, 2, 3, 4, 6, 8, 12, 16, ...: no step is padded by more than half, and one of a whole batch not at all, neither
    without drafts nor with all of them. Of steps in several segments the powers of two alone: each size takes as long
    to capture as some steps, and padding costs them little.
    """
    factors, most = (1, 3) if num_segments == 1 else (1,), max_batch * (1 + max_drafts)
    smaller = {n * 2**power for power in range(most.bit_length()) for n in factors if n * 2**power < most}
    return sorted(smaller | {max_batch, most})


def num_segment_graphs(max_batch: Number, num_segments: Number, max_drafts: Number = 0) -> Number:
    """Graphs of steps in several segments, for all their sizes; 0 where `max_batch` is 0, or steps are one graph."""
    batch = np.maximum(max_batch, 1)
    sizes = np.ceil(np.log2(batch * (1 + np.asarray(max_drafts)))) + 1
    is_between = (np.asarray(max_drafts) > 0) & (np.log2(batch) % 1 > 0)
    sizes = sizes + is_between
    found: Number = np.where((np.asarray(num_segments) > 1) & (np.asarray(max_batch) > 0), sizes * num_segments, 0)
    return found
