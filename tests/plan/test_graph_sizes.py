"""Sizes of decode graphs: few, and no batch is padded by more than half."""

from __future__ import annotations

import pytest

from hsrpc.plan.graph_sizes import graph_sizes, num_segment_graphs


@pytest.mark.parametrize("num_segments", [1, 5])
def test_no_batch_is_padded_by_more_than_half(num_segments: int) -> None:
    """The largest size is the largest batch; steps in segments have the fewer sizes."""
    assert graph_sizes(20, 1) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert graph_sizes(20, 5) == [1, 2, 4, 8, 16, 20]
    for max_batch in range(1, 70):
        sizes = graph_sizes(max_batch, num_segments)
        assert sizes == sorted({*sizes})
        assert sizes[-1] == max_batch
        padded = {batch: next(size for size in sizes if size >= batch) for batch in range(1, max_batch + 1)}
        assert padded[1] == 1
        assert all(size < 2 * batch for batch, size in padded.items())


def test_drafts_add_a_few_widths() -> None:
    """Up to all drafts of a whole batch, which is a size of its own with them and without."""
    assert graph_sizes(20, 1, 3) == [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 80]
    assert graph_sizes(20, 5, 3) == [1, 2, 4, 8, 16, 20, 32, 64, 80]


@pytest.mark.parametrize("drafts", [0, 1, 2, 7])
def test_graphs_are_counted_as_they_are_made(drafts: int) -> None:
    """A graph for each size and segment; steps of one graph, and plans without graphs, have none of them."""
    for max_batch in range(1, 70):
        assert num_segment_graphs(max_batch, 5, drafts) == 5 * len(graph_sizes(max_batch, 5, drafts))
    assert num_segment_graphs(8, 1) == num_segment_graphs(0, 5) == 0
