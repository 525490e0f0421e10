"""Tensors of quantised matrices by the definitions of AWQ and GPTQ, and as compressed-tensors packs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32

Parts = dict[str, torch.Tensor]
"""Tensors of a checkpoint by what stands behind the name of their module."""
_AWQ_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field of four bits that each of eight rows has in a word."""


@dataclass(frozen=True)
class Groups:
    """A matrix in codes."""

    codes: torch.Tensor
    """[rows, columns], not negative"""
    scales: torch.Tensor
    """float16 [rows, groups]"""
    zeros: torch.Tensor
    """[rows, groups]"""
    groups: torch.Tensor
    """int32 [columns]"""

    @property
    def values(self) -> torch.Tensor:
        groups = self.groups.long()
        return (self.codes - self.zeros[:, groups]).float() * self.scales[:, groups].float()


def in_groups(weight: torch.Tensor, bits: int, size: int, *, symmetric: bool, act_order: bool = False) -> Groups:
    """Codes of a matrix, its columns in groups of `size`, -1 for all; by `act_order` any columns, as they come."""
    columns = weight.shape[1]
    groups = torch.arange(columns) // (columns if size < 0 else size)
    if act_order:
        groups = groups[torch.randperm(columns)]
    limit = (1 << bits) - 1
    parts = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
    if symmetric:
        scales = (torch.maximum(high, -low) / (limit // 2)).half()
        zeros = torch.full(scales.shape, 1 << bits - 1)
    else:
        scales = ((high - low) / limit).half()
        zeros = (-low / scales.float()).round().clamp(0, limit).long()
    codes = ((weight / scales[:, groups].float()).round().long() + zeros[:, groups]).clamp(0, limit)
    return Groups(codes, scales, zeros, groups.int())


def words(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """int32: fields of each row, the lowest first."""
    places = torch.arange(0, 32, bits)
    return (fields.unflatten(-1, (-1, 32 // bits)).long() << places).sum(-1).to(torch.int32)


def gptq(made: Groups, bits: int, *, version: int = 1) -> Parts:
    """GPTQ's tensors; its first version has zero points less one."""
    stored = (made.zeros - 1) % (1 << bits) if version == 1 else made.zeros
    return {
        "qweight": words(made.codes, bits).t().contiguous(),
        "qzeros": words(stored.t(), bits),
        "scales": made.scales.t().contiguous(),
        "g_idx": made.groups,
    }


def awq(made: Groups) -> Parts:
    """Those of AWQ's gemm version."""

    def of_rows(numbers: torch.Tensor) -> torch.Tensor:
        eights = numbers.t().unflatten(-1, (-1, 8))
        fields = torch.empty_like(eights)
        fields[..., list(_AWQ_FIELDS)] = eights
        return words(fields.flatten(-2), 4)

    return {"qweight": of_rows(made.codes), "qzeros": of_rows(made.zeros), "scales": made.scales.t().contiguous()}


def compressed(made: Groups, bits: int) -> Parts:
    """Those of compressed-tensors, with groups of columns as its versions before 0.20 had them."""
    half = 1 << bits - 1
    packed = pack_to_int32((made.codes - half).to(torch.int8), bits)
    return {
        "weight_packed": packed,
        "weight_scale": made.scales,
        "weight_zero_point": pack_to_int32((made.zeros - half).to(torch.int8), bits, packed_dim=0),
        "weight_shape": torch.tensor(made.codes.shape),
        "weight_g_idx": made.groups,
    }


def signed(made: Groups) -> Parts:
    """Those of compressed-tensors where codes are a byte each."""
    return {"weight": (made.codes - 128).to(torch.int8), "weight_scale": made.scales}
