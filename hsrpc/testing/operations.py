"""What one of torch's operations reads and writes, by its schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import NamedTuple

import torch

from hsrpc.testing.access_history import Numbers

_BY_ROW = frozenset({"aten::index_copy_", "aten::index_select"})
"""Operations on rows of their first argument; then come the dimension and the row numbers."""
_GIVES_VALUES = frozenset({"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"})


class Role(Enum):
    """What an operation does to an argument."""

    READ = "read"
    WRITE = "write"
    ALIAS = "alias"
    """Nothing, where its result is a view of it."""


class Use(NamedTuple):
    """A tensor in an operation."""

    tensor: torch.Tensor
    role: Role
    rows: Numbers | None = None
    """None: all of it."""


class Schema(NamedTuple):
    """An operation, and the roles of the arguments that may hold tensors."""

    name: str
    """Name of the operator, such as aten::copy_."""
    gives_values: bool
    """Its result is on the host, which waits for it."""
    by_position: tuple[Role | None, ...]
    by_keyword: Mapping[str, Role]

    def uses(self, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Use]:
        """All tensors that the operation is given."""
        found: list[Use] = []
        for value, role in zip(args, self.by_position, strict=False):
            if role is not None:
                found += [Use(tensor, role) for tensor in tensors(value)]
        for name, value in kwargs.items():
            if (role := self.by_keyword.get(name)) is not None:
                found += [Use(tensor, role) for tensor in tensors(value)]
        if self.name in _BY_ROW and args[1] == 0:
            rows = args[2]
            assert isinstance(rows, torch.Tensor)
            found[0] = found[0]._replace(rows=rows.numpy())
        return found


@cache
def schema_of(func: torch._ops.OpOverload) -> Schema:
    """Schema of an operator, read once."""
    name, arguments = func._schema.name, func._schema.arguments
    roles = {each.name: _role(each) for each in arguments if "Tensor" in str(each.type)}
    by_position = tuple(roles.get(each.name) for each in arguments if not each.kwarg_only)
    return Schema(name, name in _GIVES_VALUES, by_position, roles)


def tensors(value: object) -> Sequence[torch.Tensor]:
    """Tensors of a value that is one, or a list of them, or something else."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(_nested(value)) if isinstance(value, (list, tuple)) else ()


def _nested(values: Sequence[object]) -> Iterator[torch.Tensor]:
    for value in values:
        yield from tensors(value)


def _role(argument: torch._C.Argument) -> Role:
    if argument.alias_info is None:
        return Role.READ
    return Role.WRITE if argument.alias_info.is_write else Role.ALIAS
