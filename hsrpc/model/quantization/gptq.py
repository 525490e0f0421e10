"""Weights as GPTQ has them: words of neighbours along the columns, which may be of any group (act-order)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.codes import CodedMatrix
from hsrpc.model.quantization.groups import (
    CODES,
    SCALES,
    WORD_BITS,
    check_groups,
    group_sizes,
    read_bits,
    read_group_size,
    rows_at_once,
    words_for,
)
from hsrpc.model.quantization.reader import Quantized, Stored, WeightTensors
from hsrpc.model.quantization.section import REMEDY, one_of
from hsrpc.model.quantization.words import gptq_codes, gptq_zeros

_FORMATS = ("gptq", "gptq_v2")
"""Where zero points are stored less one, and where they are stored as they are."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """Reads them. What holds of some modules alone (`dynamic`) may hold of any: the shapes of its tensors say."""

    bits: tuple[int, ...]
    sizes: tuple[int, ...]
    """Columns of a group"""
    symmetric: bool
    """All zero points are in the middle."""
    act_order: bool
    """Columns of a group need be no neighbours."""
    less_one: bool
    """Zero points are stored so."""

    @classmethod
    def read(cls, section: ConfigFile) -> Gptq:
        """As `quantization_config` says.

        Raises:
            CheckpointError: codes are of other bits, or of another format.
        """
        key = "checkpoint_format" if section.has("checkpoint_format") else "format"
        version = one_of(section, key, _FORMATS) if section.has(key) else _FORMATS[0]
        if section.flag("is_marlin_format", False):
            raise section.refuse("is_marlin_format", "false", REMEDY)
        if section.has("pack_dtype"):
            one_of(section, "pack_dtype", ("int32",))
        rules = list(_rules(section))
        return cls(
            bits=tuple({read_bits(rule, "bits"): None for rule in rules}),
            sizes=tuple({read_group_size(rule, "group_size"): None for rule in rules}),
            symmetric=all(rule.flag("sym", True) for rule in rules),
            act_order=any(rule.flag("desc_act", False) for rule in rules),
            less_one=version == _FORMATS[0],
        )

    def find(self, weight: WeightTensors) -> Quantized | None:
        codes = weight.find("qweight")
        if codes is None:
            return None
        bits = self._bits(weight, codes)
        scales, size = self._scales(weight)
        zeros = weight.need("qzeros").check(("I32",), (scales.shape[0], words_for(weight.rows, bits)))
        groups = weight.need("g_idx") if self.act_order else weight.find("g_idx")
        if groups is not None:
            groups.check(("I32",), (weight.columns,))
        matrix = CodedMatrix(
            rows=weight.rows,
            columns=weight.columns,
            code=CODES[bits],
            block=(1, size),
            scale=SCALES[scales.dtype],
            zero=1 << bits - 1 if self.symmetric else None,
            has_groups=self.act_order and size < weight.columns,
        )
        read_zeros = partial(_read_zeros, zeros, bits, weight.rows, self.less_one)
        checks = list[Callable[[], None]]()
        if matrix.zero is not None:
            checks.append(partial(_check_symmetric, zeros, read_zeros, matrix.zero))
        if groups is not None and not matrix.has_groups:
            checks.append(partial(_check_neighbours, groups, size))
        return Quantized(
            matrix,
            scales,
            codes=partial(_fill_codes, codes, tuple(checks)),
            scales=partial(fill_transposed, scales),
            zeros=partial(_fill_zeros, read_zeros) if matrix.zero is None else None,
            groups=None if groups is None or not matrix.has_groups else partial(_fill_groups, groups, matrix.grid[1]),
        )

    def _bits(self, weight: WeightTensors, codes: Stored) -> int:
        """Bits of a code, as the shape of their tensor says."""
        filled = [bits for bits in self.bits if weight.columns * bits % WORD_BITS == 0]
        if not filled:
            raise codes.refuse(f"columns that fill words of {WORD_BITS} bits, not {weight.columns}", REMEDY)
        shapes: dict[tuple[int, ...], int]
        shapes = {(words_for(weight.columns, bits), weight.rows): bits for bits in filled}
        return shapes[codes.check(("I32",), *shapes).shape]

    def _scales(self, weight: WeightTensors) -> tuple[Stored, int]:
        """The scales, and how many columns share one, as their shape says."""
        scales = weight.need("scales")
        sizes = group_sizes(scales, weight.columns, self.sizes)
        scales.check(tuple(SCALES), *((count, weight.rows) for count in sizes))
        return scales, sizes[scales.shape[0]]


def fill_transposed(stored: Stored, out: torch.Tensor) -> None:
    """Copy a matrix whose dimensions are exchanged in the file."""
    out.copy_(stored.load().t())


def _rules(section: ConfigFile) -> Iterator[ConfigFile]:
    """What holds of most modules, and what holds of those that match a pattern, each whole."""
    yield section
    dynamic = section.section("dynamic")
    if dynamic is None:
        return
    for pattern in dynamic.values:
        rule = dynamic.section(pattern)
        if rule is not None and not pattern.startswith("-:"):  # which leaves modules as they are
            yield ConfigFile(rule.file, {**section.values, **rule.values})


def _fill_codes(stored: Stored, checks: tuple[Callable[[], None], ...], out: torch.Tensor) -> None:
    for check in checks:
        check()
    for first, words in rows_at_once(stored):
        gptq_codes(words, out[:, 4 * first : 4 * (first + len(words))])


def _read_zeros(stored: Stored, bits: int, rows: int, less_one: bool) -> torch.Tensor:
    return gptq_zeros(stored.load(), bits, rows, less_one=less_one)


def _fill_zeros(read: Callable[[], torch.Tensor], out: torch.Tensor) -> None:
    out.copy_(read())


def _check_symmetric(stored: Stored, read: Callable[[], torch.Tensor], zero: int) -> None:
    """Check that all zero points are that one."""
    others = (zeros := read())[zeros != zero]
    if len(others):
        expected = f"zero points that are {zero}, as `sym` in config.json says"
        remedy = "set `sym` to false there, or fetch the checkpoint again"
        raise stored.file.refuse(expected, int(others[0]), remedy, stored.name)


def _check_neighbours(stored: Stored, size: int) -> None:
    """Check that columns of a group are neighbours."""
    groups = stored.load()
    if not torch.equal(groups, torch.arange(len(groups), dtype=groups.dtype) // size):
        expected = f"groups of {size} columns one after the other, as `desc_act` in config.json says"
        remedy = "set `desc_act` to true there, or fetch the checkpoint again"
        raise stored.file.refuse(expected, "columns in another order", remedy, stored.name)


def _fill_groups(stored: Stored, count: int, out: torch.Tensor) -> None:
    stored.fill(out)
    check_groups(stored, out, count)
