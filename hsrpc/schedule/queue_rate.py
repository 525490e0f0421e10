"""How fast the queue moves, to tell how long one more request would wait."""

from __future__ import annotations

_HALF_LIFE = 30.0
"""Seconds after which what was seen counts half."""
_MIN_SECONDS = 1.0
_MIN_ADMITTED = 8.0


class QueueRate:
    """How fast a queue moves: prompt tokens admitted per second of the time in which somebody waited."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0
        self._count = 0.0
        self._new_tokens = 0
        self._new_count = 0
        self._since: float | None = None
        """When it was last noted, if somebody waited then."""

    def admit(self, num_tokens: int) -> None:
        """A request of `num_tokens` left the queue; it counts with the next `note`."""
        self._new_tokens += num_tokens
        self._new_count += 1

    def note(self, now: float, *, is_waiting: bool) -> None:
        """Count what was admitted since the last call; called once a step, after admission."""
        if self._since is not None:
            seconds = now - self._since
            kept = 0.5 ** (seconds / _HALF_LIFE)
            self._seconds = self._seconds * kept + seconds
            self._tokens = self._tokens * kept + self._new_tokens
            self._count = self._count * kept + self._new_count
        self._new_tokens = self._new_count = 0
        self._since = now if is_waiting else None

    def seconds_for(self, num_tokens: float) -> float:
        """Predicted time until `num_tokens` are admitted; 0 while too little has been seen to tell."""
        if self._seconds < _MIN_SECONDS or self._count < _MIN_ADMITTED:
            return 0.0
        return num_tokens * self._seconds / self._tokens
