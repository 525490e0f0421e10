"""Prefixes that requests share: the keys of their blocks, and who computes which."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

from hsrpc.schedule.blocks import Key

_KEY_BYTES = 32

Owner = TypeVar("Owner")


class BlockKeys:
    """Keys of the full blocks of a request, made as its tokens come.

    A key is a hash of the block's tokens and of the key before, and the first one's of `salt`: two keys are equal where
    all tokens up to the block's end are, and the salts. 256 bits of BLAKE2b: nobody finds two texts of one key.
    """

    __slots__ = ("_before", "_keys")

    def __init__(self, salt: str) -> None:
        self._before = blake2b(salt.encode(errors="surrogatepass"), digest_size=_KEY_BYTES).digest()
        self._keys: list[Key] = []

    def first(self, count: int, token_ids: Sequence[int], block_size: int) -> list[Key]:
        """The first `count` keys of a request that has these tokens, or more, in blocks of `block_size`."""
        for number in range(len(self._keys), count):
            tokens = array("q", token_ids[number * block_size : (number + 1) * block_size])
            self._before = blake2b(self._before + tokens.tobytes(), digest_size=_KEY_BYTES).digest()
            self._keys.append(self._before)
        return self._keys[:count]


class Claims(Generic[Owner]):
    """Who is about to compute the block of a key."""

    def __init__(self) -> None:
        self._owners: dict[Key, Owner] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def claim(self, keys: Sequence[Key], owner: Owner) -> None:
        """`owner` computes those of `keys` that nobody else does."""
        for key in keys:
            self._owners.setdefault(key, owner)

    def is_others(self, key: Key, owner: Owner) -> bool:
        """Whether another than `owner` computes it."""
        return self._owners.get(key, owner) is not owner

    def drop(self, keys: Sequence[Key], owner: Owner) -> None:
        """`owner` has computed these, or never will."""
        for key in keys:
            if self._owners.get(key) is owner:
                del self._owners[key]
