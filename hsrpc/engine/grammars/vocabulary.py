"""The bytes of each token, as constraints are matched against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import llguidance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "a"
_SPECIAL = b"\xff"
"""Before the name of a token that is no text."""


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: Sequence[int]
) -> llguidance.LLTokenizer:
    """The tokens of a model of `vocab_size`, of which some end a text; those beyond the tokenizer's have no text.

    It holds the interpreter for half a second of 128,000 tokens.

    Raises:
        ValueError: the tokenizer says nothing of its tokens.
    """
    num_tokens, ends = max(vocab_size, len(tokenizer)), list(end_token_ids)
    if tokenizer.is_fast:
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        try:
            return llguidance.LLTokenizer(backend.to_str(), n_vocab=num_tokens, eos_token=ends)
        except ValueError:
            pass  # neither bytes nor a fallback to them
    wrapper = llguidance.TokenizerWrapper(_Decoded(tokenizer, num_tokens, ends[0]))
    return llguidance.LLTokenizer(wrapper, n_vocab=num_tokens, eos_token=ends)


class _Decoded:
    """A tokenizer that has no table of bytes: a token's are those of its text behind another token.

    The names are those that llguidance asks for. A token without text of its own is never allowed.
    """

    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        added = tokenizer.added_tokens_decoder
        self.special_token_ids = [token_id for token_id, token in added.items() if token.special]
        self.tokens = [self._bytes(token_id) for token_id in range(len(tokenizer))]
        self.tokens += [b""] * (num_tokens - len(self.tokens))

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self.special_token_ids:
            return _SPECIAL + str(self._tokenizer.convert_ids_to_tokens(token_id)).encode()
        return self._text(token_id).encode()

    def _text(self, token_id: int) -> str:
        anchor = self(_ANCHOR)
        alone, whole = self._decode(anchor), self._decode([*anchor, token_id])
        text = whole.removeprefix(alone)
        return "" if "\N{REPLACEMENT CHARACTER}" in text or not whole.startswith(alone) else text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
