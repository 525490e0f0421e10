"""A Triton kernel that copies rows between pools and buffers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _copy_rows(target, target_rows, source, source_rows, width, source_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(source + tl.load(source_rows + row) * source_stride + columns, mask=inside)
    tl.store(target + tl.load(target_rows + row) * width + columns, values, mask=inside)


def copy_rows(target: torch.Tensor, target_rows: torch.Tensor, source: torch.Tensor, source_rows: torch.Tensor) -> None:
    """`target[target_rows] = source[source_rows]` on the current stream; `target` [*, w] may be pinned host memory.

    Row numbers are int64 [n] on the device; `source` [*, w] has unit stride in its last dimension.
    """
    if not len(source_rows):
        return
    width = target.shape[1]
    grid = (len(source_rows), triton.cdiv(width, _BLOCK))
    _copy_rows[grid](target, target_rows, source, source_rows, width, source.stride(0), BLOCK=_BLOCK)
