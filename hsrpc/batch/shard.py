"""A part of an input, for one of several runs that share it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """The lines `index + 1`, `index + 1 + count` and so on of an input: each line is of one shard of `count`.

    Raises:
        ValueError: on construction, there is no such shard.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"there is no shard {self.index} of {self.count}")

    def __contains__(self, number: int) -> bool:
        """Whether it has the line `number`, of which 1 is the first."""
        return (number - 1) % self.count == self.index


WHOLE = Shard()
"""All lines."""
