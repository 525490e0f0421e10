"""Stands in for the tokenizer of a model that has none: requests bring token ids, and output has no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, TypeVarTuple

from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import Chat, Text, field_of

R = TypeVar("R")
Args = TypeVarTuple("Args")


class NoTokenizer:
    """Same calls as `Tokenizer`."""

    end_token_ids: Sequence[int] = ()
    has_chat_template = False

    def special_token_id(self, text: str) -> int | None:
        return None

    async def encode(self, prompt: str | Text | Chat, client: str = "") -> list[int]:
        """Raises InvalidRequestError: there is no tokenizer."""
        raise InvalidRequestError(field_of(prompt), "this model has no tokenizer; give token_ids")

    async def render(self, chat: Chat, client: str = "") -> str:
        """Raises InvalidRequestError: there is no tokenizer."""
        raise InvalidRequestError(field_of(chat), "this model has no tokenizer; give token_ids")

    async def decode(self, token_ids: Sequence[int], client: str = "", skip_special_tokens: bool = True) -> str:
        return self.decode_now(list(token_ids), skip_special_tokens)

    async def run(self, function: Callable[[*Args], R], *args: *Args) -> R:
        return function(*args)

    def with_special_tokens(self, token_ids: Sequence[int]) -> list[int]:
        return list(token_ids)

    async def files(self) -> dict[str, bytes]:
        return {}

    def decode_now(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return ""

    def close(self) -> None:
        pass
