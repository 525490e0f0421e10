"""Token ids to text, piece by piece, without ever sending half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character has at most 3 bytes, each of which a decoder may show as one U+FFFD.
_MAX_UNFINISHED = 3
_MAX_CHARACTER_TOKENS = 4
# With each so many tokens the window is cut, if it can be: a token's cost does not grow with the output.
_GROWTH = 12
# Tokens that it is cut to: few where they are words, more where they are bytes.
_KEPT = (*range(6, 10), *range(24, 28))


class Detokenizer:
    """Text of one request's output tokens, as they come.

    The pieces concatenated are `decode(context + output)` without `decode(context)`; for a byte-level tokenizer this
    holds for any output. SentencePiece's byte fallback turns a whole run of bytes into U+FFFD once one of them is
    invalid; characters of such a run that were already sent stay as they were.

    `decode` maps token ids to text, special tokens left out; it is called on a window of the last tokens only.
    `context`: the prompt's last tokens, where the output's first space depends on them; empty: the output alone.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-_GROWTH:])
        self._grown = len(self._window)
        self._text = decode(self._window) if self._window else ""
        # The part of the window's text that needs no sending any more: always its beginning.
        self._sent = self._text
        self._unsent_tokens = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; "" while the last character is unfinished."""
        # One by one: with byte fallback the text of several tokens would depend on how they came together.
        return "".join([self._push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The text held back, with U+FFFD for characters that were never finished."""
        if not self._text.startswith(self._sent):
            self._forget_sent()
        rest = self._text[len(self._sent) :]
        self._window, self._text, self._sent, self._unsent_tokens = [], "", "", 0
        return rest

    def _push(self, token_id: int) -> str:
        text = self._decode([*self._window, token_id])
        if text == self._text and not self._decode([token_id, token_id]):
            return ""  # A special token. Were it kept, a run of them would make the window grow without end.
        self._window.append(token_id)
        self._grown += 1
        self._text = text
        self._unsent_tokens += 1
        if not text.startswith(self._sent):
            if self._unsent_tokens < _MAX_CHARACTER_TOKENS:
                return ""
            self._forget_sent()
        return self._send()

    def _send(self) -> str:
        """Sends all but the U+FFFD at the end that may still become a character."""
        done = max(len(self._text.rstrip(_REPLACEMENT)), len(self._text) - _MAX_UNFINISHED)
        new = self._text[len(self._sent) : done]
        if new:
            self._sent = self._text[:done]
            self._unsent_tokens = 0
            self._shrink()
        return new

    def _forget_sent(self) -> None:
        """Decodes the unsent tokens alone, after a decoder changed text that was already sent."""
        self._window = self._window[-self._unsent_tokens :]
        self._text = self._decode(self._window)
        self._sent = ""

    def _shrink(self) -> None:
        """Drops tokens from the front of the window where that changes neither the unsent text nor what follows.

        A UTF-8 decoder that starts inside a character is back in step after 3 bytes: the window may start anywhere
        if its unsent text and the 4 characters before are right. One of 4 neighbouring starts is no middle of a
        character, which matters to decoders with byte fallback. Where none is right the window stays as it is.
        """
        if self._grown < _GROWTH:
            return
        self._grown = 0
        unsent = len(self._text) - len(self._sent)
        tail = self._text[-(unsent + 4) :]
        for kept in _KEPT:
            text = self._decode(self._window[-kept:])
            if len(text) >= unsent + 4 and text.endswith(tail):
                self._window, self._text, self._sent = self._window[-kept:], text, text[: len(text) - unsent]
                return
