"""Decodes tensors of a GGUF file, some rows at a time, into a tensor of the type that is written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from hsrpc.model.gguf.file import GgufTensor, decode
from hsrpc.model.gguf.weights import LatentTarget, Piece, Target
from hsrpc.model.tensor import dtype_name

_CHUNK_ELEMENTS = 1 << 18
"""Decoded at once: fastest by far, of 2**14 to 2**22."""


def read_values(target: Target | LatentTarget, dtype: torch.dtype) -> torch.Tensor:
    """The values of a tensor, in its shape: products in float32, rounded once to `dtype`.

    Raises:
        CheckpointError: one is too large for `dtype`.
    """
    if isinstance(target, LatentTarget):
        return _latent(target, dtype)
    rows = sum(piece.stop - piece.start for piece in target.pieces)
    out = torch.empty((rows, -(-torch.Size(target.shape).numel() // rows)), dtype=dtype)
    places = None if target.order is None else target.order.argsort()
    start = 0
    for tensor, chunk in _chunks(target.pieces):
        values = _rounded(tensor, chunk - target.offset if target.offset else chunk, dtype)
        stop = start + len(values)
        out[slice(start, stop) if places is None else places[start:stop]] = values
        start = stop
    shaped = out.view(target.shape)
    return shaped.transpose(-1, -2).contiguous() if target.transposed else shaped


def _chunks(pieces: tuple[Piece, ...]) -> Iterator[tuple[GgufTensor, torch.Tensor]]:
    """Rows of the pieces in order: float32 [n, columns]."""
    for tensor, first, last in pieces:
        columns = torch.Size(tensor.shape).numel() // len(tensor.rows)
        step = max(1, _CHUNK_ELEMENTS // columns)
        for start in range(first, last, step):
            rows = tensor.rows[start : min(start + step, last)]
            values = decode(np.ascontiguousarray(rows).reshape(1, -1), tensor.type)
            yield tensor, torch.from_numpy(np.require(values, requirements="W")).view(len(rows), columns)


def _rounded(tensor: GgufTensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = values.to(dtype)
    if dtype == torch.float16 and not rounded.isfinite().all() and values.isfinite().all():
        largest = torch.finfo(dtype).max
        expected = f"at most {largest:.4g}, the largest {dtype_name(dtype)}"
        raise tensor.refuse(expected, f"{values.abs().max().item():.4g}", "convert it with --dtype bfloat16")
    return rounded


def _latent(target: LatentTarget, dtype: torch.dtype) -> torch.Tensor:
    whole = partial(_whole, dtype=dtype)
    keys, values = whole(target.keys).transpose(1, 2), whole(target.values)
    return torch.cat((keys, values), dim=1).view(target.shape)


def _whole(tensor: GgufTensor, dtype: torch.dtype) -> torch.Tensor:
    piece = Piece(tensor, 0, len(tensor.rows))
    return read_values(Target(name=tensor.name, shape=tensor.shape, pieces=(piece,)), dtype)
