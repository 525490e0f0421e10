"""Stands in for the tokenizer of a model that has none: requests bring token ids, and output has no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, TypeVarTuple

from hsrpc.errors import InvalidRequestError

R = TypeVar("R")
Args = TypeVarTuple("Args")


class NoTokenizer:
    """Same calls as `Tokenizer`."""

    end_token_ids: Sequence[int] = ()

    async def encode(self, text: str, client: str = "") -> list[int]:
        """Raises InvalidRequestError: there is no tokenizer."""
        raise InvalidRequestError("text", "this model has no tokenizer; give token_ids")

    async def decode(self, token_ids: Sequence[int], client: str = "") -> str:
        return self.decode_now(list(token_ids))

    async def run(self, function: Callable[[*Args], R], *args: *Args) -> R:
        return function(*args)

    def decode_now(self, token_ids: list[int]) -> str:
        return ""

    def close(self) -> None:
        pass
