"""Stop strings: found in text that arrives in pieces, so that no piece of one is ever sent."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until the first stop string, and holds back whatever may still become one.

    The first stop string is the one that ends first; of those that end together, the longest, which starts first.
    The result is the same however the text is cut into pieces. The longest tail held back is one character shorter
    than the longest stop string.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        # Longest first, so that of two strings that end together the longer one is found.
        self._stops = [(text, _borders(text)) for text in sorted(set(stop), key=len, reverse=True)]
        # _progress[i]: how many characters of stop i the text read so far ends with.
        self._progress = [0] * len(self._stops)
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be sent now, and the stop string once it has matched; after that all text is dropped."""
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        seen = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            matched = self._advance(character)
            if matched is not None:
                return self._finish(seen, end, matched), matched
        split = len(seen) - max(self._progress)
        self._held = seen[split:]
        return seen[:split], None

    def flush(self) -> str:
        """The text held back: no more will come, so it is no stop string."""
        rest, self._held = self._held, ""
        self._progress = [0] * len(self._stops)
        return rest

    def _finish(self, seen: str, end: int, matched: str) -> str:
        self._matched, self._held = matched, ""
        return seen[:end] if self._include_stop else seen[: end - len(matched)]

    def _advance(self, character: str) -> str | None:
        """Reads one character; returns the stop string that ends with it (Knuth, Morris and Pratt, 1977)."""
        found = None
        for index, (stop, borders) in enumerate(self._stops):
            length = self._progress[index]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            self._progress[index] = length
            if length == len(stop) and found is None:
                found = stop
        return found


def _borders(text: str) -> list[int]:
    """For each prefix of `text`: the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return borders
