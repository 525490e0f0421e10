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


class _Schema(NamedTuple):
    """Roles of the arguments that may hold tensors."""

    name: str
    by_position: tuple[Role | None, ...]
    by_keyword: Mapping[str, Role]


def operation_name(func: torch._ops.OpOverload) -> str:
    """Such as aten::copy_."""
    return _schema(func).name


def gives_values(func: torch._ops.OpOverload) -> bool:
    """Its result is on the host, which waits for it."""
    return _schema(func).name in _GIVES_VALUES


def uses(func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Use]:
    """All tensors that an operation is given."""
    schema = _schema(func)
    found = [
        Use(tensor, role)
        for value, role in zip(args, schema.by_position, strict=False)
        if role is not None
        for tensor in tensors(value)
    ]
    for name, value in kwargs.items():
        if (role := schema.by_keyword.get(name)) is not None:
            found += [Use(tensor, role) for tensor in tensors(value)]
    if schema.name in _BY_ROW and args[1] == 0:
        rows = args[2]
        assert isinstance(rows, torch.Tensor)
        found[0] = found[0]._replace(rows=rows.numpy())
    return found


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Those of a value that is a tensor, or a list of them, or something else."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


@cache
def _schema(func: torch._ops.OpOverload) -> _Schema:
    arguments = func._schema.arguments
    roles = {each.name: _role(each) for each in arguments if "Tensor" in str(each.type)}
    by_position = tuple(roles.get(each.name) for each in arguments if not each.kwarg_only)
    return _Schema(func._schema.name, by_position, roles)


def _role(argument: torch._C.Argument) -> Role:
    if argument.alias_info is None:
        return Role.READ
    return Role.WRITE if argument.alias_info.is_write else Role.ALIAS
