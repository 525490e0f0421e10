"""Text in which the spelling of a special token is plain words, and not that token."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlainWords:
    """Finds where text spells one of `tokens`, and encodes it as words. May be called on several threads at once.

    Text comes in pieces: those at odd places are words, the others may hold tokens. What spells no token at all has one
    piece, and its ids are those that the tokenizer gives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._spelt = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        added = tokenizer.added_tokens_decoder.values()
        self._is_normalized = any(token.normalized and token.content in tokens for token in added)

    def pieces(self, text: str) -> list[str]:
        """`text` cut at the tokens that it spells, which are at odd places."""
        pieces = self._spelt.split(text)
        return pieces if len(pieces) > 1 or not self._hides_token(text) else ["", text, ""]

    def encode(self, pieces: list[str]) -> list[int]:
        """Token ids of pieces one after the other, without those that the tokenizer adds to a text."""
        words = {piece: self._inside([piece], self._words_of_all)[0] for piece in {*pieces[1::2]}}
        texts = self._inside(pieces[2::2], self._encode_all)
        token_ids = self._encode_all(pieces[:1])[0]
        for piece, text_ids in zip(pieces[1::2], texts, strict=True):
            token_ids += words[piece] + text_ids
        return token_ids

    def _hides_token(self, text: str) -> bool:
        """Whether a token is spelt only once the tokenizer has normalised the text, as full-width letters may be."""
        normalizer = self._backend.normalizer if self._is_normalized and self._backend is not None else None
        return normalizer is not None and self._spelt.search(normalizer.normalize_str(text)) is not None

    def _inside(self, pieces: list[str], encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        """Ids of pieces within a text: what a tokenizer puts in front of a text goes in front of a newline."""
        newline, *found = encode(["\n", *(f"\n{piece}" for piece in pieces)])
        return [
            token_ids[len(newline) :] if token_ids[: len(newline)] == newline else encode([piece])[0]
            for piece, token_ids in zip(pieces, found, strict=True)
        ]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]
        return [self._tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]

    def _words_of_all(self, texts: list[str]) -> list[list[int]]:
        return [self._words(text) for text in texts]

    def _words(self, text: str) -> list[int]:
        token_ids = self._untokened(text)
        spelt = {self._tokenizer.convert_tokens_to_ids(token) for token in self._spelt.findall(text)}
        if spelt.isdisjoint(token_ids) or len(text) < 2:
            return token_ids
        middle = len(text) // 2  # a vocabulary may have the token as a word too: its halves are none
        return self._words(text[:middle]) + self._words(text[middle:])

    def _untokened(self, text: str) -> list[int]:
        """Ids by the tokenizer's model alone: `encode_special_tokens` would be a state that threads share."""
        backend = self._backend
        if backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        splits = [text]
        if backend.pre_tokenizer is not None:
            splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for split in splits for token in backend.model.tokenize(split)]
