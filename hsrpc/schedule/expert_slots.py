"""Which experts of a layer lie in its slots on the device: those used last, as plain ints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ExpertLoad(NamedTuple):
    """An expert on its way to the device."""

    expert: int
    place: int
    """A slot of the layer; from the number of slots on, a place of the area that all layers share."""


class ExpertSlots:
    """The experts in the slots of one layer, and those that a step needs beyond them.

    What finds no slot goes to an area that all layers share: it is there until another layer, or this one, loads next.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: dict[int, int] = {}
        """Slot of each expert, the least recently needed first."""
        self._beyond: dict[int, int] = {}
        """Places in the shared area of the experts needed last, as far as they found no slot."""

    @property
    def held(self) -> tuple[int, ...]:
        """Experts in slots, the least recently needed first."""
        return tuple(self._slots)

    def bring(self, needed: Sequence[int]) -> list[ExpertLoad]:
        """Give each of the `needed` experts, all different, a place; those to load, the others are in slots.

        The least recently needed give way, never one that is needed now.
        """
        slots, missing = self._slots, list[int]()
        for expert in needed:
            if expert in slots:
                slots[expert] = slots.pop(expert)  # to the end: it is needed now
            else:
                missing.append(expert)
        room = self.num_slots - len(needed) + len(missing)
        for expert in missing[:room]:
            self._slots[expert] = self._free_slot()
        self._beyond = {expert: self.num_slots + number for number, expert in enumerate(missing[room:])}
        return [ExpertLoad(expert, self.place(expert)) for expert in missing]

    def _free_slot(self) -> int:
        """One that nothing lies in, or that of the expert that was needed least recently."""
        num_held = len(self._slots)
        return num_held if num_held < self.num_slots else self._slots.pop(next(iter(self._slots)))

    def place(self, expert: int) -> int:
        """Where an expert lies that was needed last."""
        return self._slots[expert] if expert in self._slots else self._beyond[expert]
