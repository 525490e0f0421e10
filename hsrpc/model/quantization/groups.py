"""What AWQ, GPTQ and compressed-tensors share: codes that are whole numbers, and groups of columns with a scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from hsrpc.model.bounds import MAX_WIDTH
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.codes import Code
from hsrpc.model.quantization.reader import Stored
from hsrpc.model.quantization.section import REMEDY

CODES = {4: Code.UINT4, 8: Code.UINT8}
"""By their bits."""
SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Element types that scales of groups may have."""
WORD_BITS = 32
_READ_AT_ONCE = 1 << 18
"""Words: 1 MiB, which stay in a core's cache until they are turned."""
_LEAST_ROWS = 16
"""Rows of words that are read at once, at least: turned ones are written so many together."""


def read_bits(section: ConfigFile, key: str) -> int:
    """Bits of a code.

    Raises:
        CheckpointError: they are neither 4 nor 8.
    """
    bits = section.values.get(key)
    if type(bits) is not int or bits not in CODES:
        raise section.refuse(key, " or ".join(map(str, CODES)), REMEDY)
    return bits


def read_group_size(section: ConfigFile, key: str) -> int:
    """Columns that share a scale; -1 stands for all of them, and comes out as more than there are.

    Raises:
        CheckpointError: it is no number of columns.
    """
    size = section.values.get(key)
    if type(size) is not int or not (size == -1 or 1 <= size <= MAX_WIDTH):
        raise section.refuse(key, f"a whole number from 1 to {MAX_WIDTH}, or -1", REMEDY)
    return size if size > 0 else MAX_WIDTH


def group_sizes(scales: Stored, columns: int, sizes: Iterable[int]) -> dict[int, int]:
    """The size of groups by how many of them there are in `columns`, where groups may have any of these `sizes`.

    Where two make as many of different columns, none is right.

    Raises:
        CheckpointError: that leaves none.
    """
    found: dict[int, set[int]] = {}
    for size in sizes:
        fitting = min(size, columns)
        found.setdefault(-(-columns // fitting), set()).add(fitting)
    clear = {count: fitting.pop() for count, fitting in found.items() if len(fitting) == 1}
    if not clear:
        expected = f"{columns} columns to be parted in as many groups by one size in config.json alone"
        raise scales.refuse(expected, REMEDY)
    return clear


def words_for(numbers: int, bits: int) -> int:
    """Words that so many codes fill, each of `bits` bits."""
    return -(-numbers * bits // WORD_BITS)


def check_groups(stored: Stored, groups: torch.Tensor, count: int) -> None:
    """Check that columns are of groups that there are.

    Raises:
        CheckpointError: one is not.
    """
    low, high = (int(bound) for bound in groups.aminmax())
    if low < 0 or high >= count:
        expected = f"groups from 0 to {count - 1}, as there are scales"
        raise stored.file.refuse(expected, f"{low if low < 0 else high}", tensor=stored.name)


def rows_at_once(stored: Stored, together: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of a matrix of words, some at once, and the number of the first of them: int32 [n, its columns].

    Each comes in the memory of the one before; n is a multiple of `together`, as all rows are.
    """
    count, width = stored.shape
    most = max(_LEAST_ROWS, _READ_AT_ONCE // max(1, width) // together) * together
    memory = torch.empty(min(most, count), width, dtype=torch.int32)
    for first in range(0, count, most):
        rows = memory[: count - first]
        stored.file.read(stored.name, rows.view(-1), stored.first + first * width)
        yield first, rows
