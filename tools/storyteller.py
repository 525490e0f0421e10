"""Writes small stories without end, the same for the same seed: the training text of the bundled model."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import storyteller_grammar as grammar

CHOICE = re.compile(r"\[([^\[\]]*)\]")
NEEDS_AN = re.compile(r"\b([Aa]) (?=[aeiou])")


def paragraphs(text: str) -> list[list[str]]:
    """Beats of a grammar text, each a list of the ways to tell it."""
    return [beat.splitlines() for beat in text.strip().split("\n\n")]


@dataclass(frozen=True)
class Character:
    """One who acts in a story; `name` is empty where only the kind is told."""

    name: str
    kind: str
    trait: str
    gender: str

    def slots(self, role: str, prefix: str) -> dict[str, str]:
        """Values for the slots of this character: reference, introductions and pronouns."""
        kind = f"{self.trait} {self.kind}"
        called = f" named {self.name}" if self.name else ""
        pronouns = {prefix + slot: word for slot, word in grammar.PRONOUNS[self.gender].items()}
        return pronouns | {
            role: self.name or f"the {self.kind}",
            f"a_{role}": f"a {kind}{called}",
            f"the_{role}": f"the {kind}",
            f"{prefix}a_kind": f"a {kind}",
            f"{prefix}kind": self.kind,
            f"{prefix}name": self.name,
            f"{prefix}call": self.name or "my friend",
        }


class Values(dict[str, str]):
    """Values of slots; with a capital letter for the name of a slot with a capital letter."""

    def __missing__(self, slot: str) -> str:
        if slot[0].islower():
            raise KeyError(slot)
        text = self[slot[0].lower() + slot[1:]]
        return text[:1].upper() + text[1:]


class Storyteller:
    """Endless texts of the grammar, the same for the same seed."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)

    def text(self) -> str:
        slots = self.slots()
        kind = self.rng.random()
        if kind < 0.04:
            return self.fill(self.rng.choice(grammar.FACTS), slots)
        if kind < 0.08:
            return " ".join(self.fill(self.rng.choice(beat), slots) for beat in paragraphs(grammar.HELLO))
        return self.frame(self.story(slots), slots)

    def frame(self, story: str, slots: dict[str, str]) -> str:
        """The story with a title, a request or noise before it, or from its middle on; most often as it is."""
        chance = self.rng.random()
        if chance < 0.05:
            return self.fill(grammar.TITLES, slots) + "\n\n" + story
        if chance < 0.12:
            return self.fill(grammar.REQUESTS, slots) + "\n\n" + story
        if chance < 0.17:
            return self.noise() + self.rng.choice(" \n") + story
        if chance < 0.30:
            return story[story.index(" ", len(story) * self.rng.randrange(60) // 100) + 1 :]
        return story

    def noise(self) -> str:
        """Characters or words without sense, so that the model finds back to a story after any prompt."""
        if self.rng.random() < 0.4:
            return "".join(self.rng.choices(grammar.JUNK, k=self.rng.randint(1, 24)))
        words = self.rng.choices([*grammar.COMMON_WORDS, self.name("she")], k=self.rng.randint(1, 12))
        text = " ".join(words) + self.rng.choice(["", ".", "?", ":", "!", ","])
        return text.capitalize() if self.rng.random() < 0.6 else text

    def plot(self, slots: dict[str, str]) -> str:
        """Name of a plot that can happen there; most often one that time, place and hero hint at."""
        plots = [plot for plot in grammar.STORIES if plot != "a storm" or slots["place"] != "the moon"]
        scene = grammar.words(f"{slots['when']} {slots['a_kind']} {slots['where']}")
        suited = [plot for plot in plots if not set(scene).isdisjoint(grammar.CUES[plot])]
        return self.rng.choice(suited if suited and self.rng.random() < 0.6 else plots)

    def story(self, slots: dict[str, str]) -> str:
        beats = paragraphs(grammar.STORIES[self.plot(slots)])
        lines = [self.rng.choice(beat) for beat in beats]
        told = [*self.opening(lines[0], slots), *(self.fill(line, slots) for line in lines[1:])]
        if self.rng.random() < 0.5:
            told.append(self.fill(self.rng.choice(grammar.ENDINGS.strip().splitlines()), slots))
        if self.rng.random() < 0.15:
            last = told.pop()
            told[-1] += "\n\n" + last
        return " ".join(told)

    def opening(self, first: str, slots: dict[str, str]) -> list[str]:
        """The introduction and the first line of the story, which may introduce the hero itself."""
        way = self.rng.random()
        one_day = f"One {slots['when']}, "
        if way < 0.25 and "{hero}" in first:
            return [self.fill(first.replace("{hero}", "{a_hero}", 1), slots | {"one_day": one_day})]
        if way < 0.45:
            scene = self.rng.choice(grammar.MOMENTS.strip().splitlines())
            return [self.introduce(scene, slots), self.fill(first, slots | {"one_day": ""})]
        scene = self.rng.choice(grammar.OPENINGS.strip().splitlines())
        return [self.introduce(scene, slots), self.fill(first, slots | {"one_day": one_day})]

    def introduce(self, scene: str, slots: dict[str, str]) -> str:
        """The scene, followed by the hero's name or kind where it left that out."""
        text = self.fill(scene, slots)
        if not slots["name"] or slots["a_hero"].removeprefix("a ") in text:
            return text
        if slots["name"] not in text:
            return text + self.fill(" {His} name was {hero}.", slots)
        return text + self.fill("[| {Hero} was {a_kind}.]", slots)

    def fill(self, template: str, slots: dict[str, str]) -> str:
        """Decides the choices, innermost first, fills the slots and puts `an` where it belongs."""
        while match := CHOICE.search(template):
            template = template[: match.start()] + self.rng.choice(match[1].split("|")) + template[match.end() :]
        text = NEEDS_AN.sub(r"\1n ", template.format_map(Values(slots)))
        return text[:1].upper() + text[1:] if template.startswith("{") else text

    def slots(self) -> dict[str, str]:
        hero = self.character()
        friend = self.character(hero)
        elder = self.character(hero, friend, old=True)
        (where, place, spots), (_, place2, spots2) = self.rng.sample(grammar.PLACES, 2)
        (food, dish), (food2, _) = self.rng.sample(grammar.FOODS, 2)
        invention, gadget = self.rng.choice(grammar.INVENTIONS)
        question, answer = self.rng.choice(grammar.WONDERS)
        texts = {
            "where": where,
            "place": place,
            "place2": place2,
            "spot": spots,
            "spot2": spots,
            "spot_there": spots2,
            "when": grammar.CALM if place == "the moon" else grammar.WEATHER,
            "thing": self.rng.choice(grammar.THINGS),
            "food_a": "a " + food,
            "dish": dish,
            "food2_a": "a " + food2,
            "invention": invention,
            "gadget": gadget,
            "question": question,
            "answer": answer,
            "skill": self.rng.choice(grammar.SKILLS),
        }
        people = hero.slots("hero", "") | friend.slots("friend", "friend_") | elder.slots("elder", "elder_")
        return (
            people
            | {"who": people["a_hero"], "own_name": hero.name or self.name(hero.gender)}
            | {slot: self.fill(text, {}) for slot, text in texts.items()}
        )

    def character(self, *others: Character, old: bool = False) -> Character:
        """A character of another kind and name than the others; an old one is an animal without a name."""
        gender = self.rng.choice(("she", "he"))
        people, child = (grammar.WOMEN, "girl") if gender == "she" else (grammar.MEN, "boy")
        groups = (grammar.ANIMALS, people, [child], ["robot"])
        group = groups[0 if old else self.rng.choices((0, 1, 2, 3), (60, 26, 8, 6))[0]]
        taken = {other.kind for other in others}
        kind = self.rng.choice([kind for kind in group if kind not in taken] or ["cat"])
        if kind == "robot":
            gender = "it"
        traits = ["old"] if old else [*grammar.TRAITS, *["old"] * (4 if group is people else 0)]
        name = self.name(gender) if not old and self.rng.random() < 0.7 else ""
        if name in {other.name for other in others}:
            name = ""
        return Character(name, kind, self.rng.choice(traits), gender)

    def name(self, gender: str) -> str:
        """A common name, or now and then a new one, so that the model learns to copy names it never saw."""
        if self.rng.random() < 0.85:
            return self.rng.choice(grammar.NAMES[gender])
        return "".join(self.rng.choices(grammar.SYLLABLES, k=self.rng.randint(2, 3))).capitalize()
