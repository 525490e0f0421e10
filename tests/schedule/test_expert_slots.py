"""The experts in a layer's slots: what a step needs is there, and who was needed last stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hsrpc.schedule.expert_slots import ExpertLoad, ExpertSlots

NUM_EXPERTS = 12
steps = st.lists(st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True), max_size=30)
sizes = st.integers(0, NUM_EXPERTS)


@given(num_slots=sizes, needs=steps)
def test_what_is_needed_is_there_each_at_a_place_of_its_own(num_slots: int, needs: list[list[int]]) -> None:
    """By what was copied where: every needed expert lies where it is said to lie, and is loaded if it was not there."""
    slots, memory = ExpertSlots(num_slots), dict[int, int]()
    for needed in needs:
        held = slots.held
        loads = slots.bring(needed)
        assert [load.expert for load in loads] == [expert for expert in needed if expert not in held]
        assert len({load.place for load in loads}) == len(loads)
        memory |= {place: expert for expert, place in loads}
        assert [memory[slots.place(expert)] for expert in needed] == needed
        assert {memory[slots.place(expert)] for expert in slots.held} == set(slots.held)
        assert len(slots.held) <= num_slots
        assert {load.place for load in loads} <= set(range(max(num_slots, NUM_EXPERTS)))


@given(num_slots=sizes, needs=steps)
def test_the_least_recently_needed_go_first_and_none_that_is_needed(num_slots: int, needs: list[list[int]]) -> None:
    """Slots are as full as can be; those that stay were needed later than those that went."""
    slots, last, seen = ExpertSlots(num_slots), dict[int, int](), set[int]()
    for number, needed in enumerate(needs):
        before = set(slots.held)
        slots.bring(needed)
        last |= dict.fromkeys(needed, number)
        seen |= set(needed)
        held = slots.held
        assert before & set(needed) <= set(held)
        assert len(held) == min(num_slots, len(before | set(needed)))
        gone = before - set(held)
        assert not gone or max(last[each] for each in gone) <= min(last[each] for each in held)
        assert [last[each] for each in held] == sorted(last[each] for each in held)


@given(num_slots=sizes, needs=steps)
def test_places_beyond_the_slots_are_no_more_than_the_other_experts(num_slots: int, needs: list[list[int]]) -> None:
    """An area of all experts less the slots is large enough, and what lies there is loaded anew each time."""
    slots = ExpertSlots(num_slots)
    for needed in needs:
        beyond = [load for load in slots.bring(needed) if load.place >= num_slots]
        assert len(beyond) == max(0, len(needed) - num_slots)
        assert not {load.expert for load in beyond} & set(slots.held)


def test_an_example() -> None:
    """Two slots: 1 gives way, then 0, and of three at once one finds no slot."""
    slots = ExpertSlots(2)
    assert slots.bring([1, 0]) == [ExpertLoad(1, 0), ExpertLoad(0, 1)]
    assert slots.bring([0, 5]) == [ExpertLoad(5, 0)]
    assert slots.bring([5, 7]) == [ExpertLoad(7, 1)]
    assert slots.bring([7, 2, 3]) == [ExpertLoad(2, 0), ExpertLoad(3, 2)]
    assert (slots.held, slots.place(3)) == ((7, 2), 2)
