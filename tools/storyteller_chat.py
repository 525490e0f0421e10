"""Writes small dialogues about small stories without end: how the bundled model learns to take turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from string import Formatter

import storyteller_chat_grammar as grammar
from storyteller import Storyteller, paragraphs
from storyteller_chat_grammar import Exchange
from storyteller_grammar import COMMON_WORDS


@dataclass(frozen=True)
class Turn:
    """What one of the two says; of an assistant's turn also what `kind` it is and the `key` of a right answer."""

    role: str
    content: str
    kind: str = ""
    key: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether another answer says the same, by its key."""
        return self.key.lower() in answer.lower()

    def message(self) -> dict[str, str]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content}


class Dialogue:
    """One conversation, written turn by turn: who takes part, the story that was told last, and the turns so far."""

    def __init__(self, writer: Storyteller) -> None:
        self.writer = writer
        self.rng = writer.rng
        self.story = ""
        self.slots = writer.slots()
        self.user = self.bot = ""
        self.is_brief = False
        self.turns: list[Turn] = []

    def write(self) -> list[Turn]:
        """A system message or none, perhaps a greeting, a story with questions or only talk, perhaps a farewell."""
        self.instruct()
        if self.rng.random() < 0.35:
            self.greet()
        if self.rng.random() < 0.75:
            self.tell(grammar.REQUESTS)
            self.ask(self.rng.randint(0, 4))
            if self.rng.random() < 0.12:
                self.tell((*grammar.REQUESTS, *grammar.AGAIN * 8))
                self.ask(self.rng.randint(0, 2))
        else:
            self.ask(self.rng.randint(1, 3))
        if self.rng.random() < 0.25:
            self.exchange(self.rng.choice(self.fitting(grammar.FAREWELLS)))
        return self.turns

    def instruct(self) -> None:
        """The system message: who the storyteller is, who the user is, how long the answers shall be; any may lack."""
        self.is_brief = self.rng.random() < 0.2
        self.user = self.person() if self.rng.random() < 0.2 else ""
        self.bot = self.person() if self.rng.random() < 0.2 else ""
        wanted = [
            *(grammar.OWN_NAME if self.bot else grammar.PERSONA if self.rng.random() < 0.3 else ()),
            *(grammar.USER_NAME if self.user else ()),
            *(grammar.BRIEF if self.is_brief else ()),
        ]
        if wanted:
            self.turns.append(Turn("system", " ".join(self.fill(text) for text in wanted)))

    def person(self) -> str:
        return self.writer.name(self.rng.choice(("she", "he")))

    def greet(self) -> None:
        if not self.user and self.rng.random() < 0.5:
            self.user = self.person()
            self.exchange(grammar.INTRODUCTION)
        else:
            self.exchange(self.rng.choice(self.fitting(grammar.GREETINGS)))

    def tell(self, requests: Sequence[str]) -> None:
        """A request and a story that has all that the request names."""
        is_short = self.is_brief or self.rng.random() < 0.1
        self.slots, self.story = self.told(is_short)
        asks_short = is_short and (not self.is_brief or self.rng.random() < 0.2)
        extra = {"short": "short " if asks_short else "", "end": self.rng.choice((".", ".", ".", "!", "?", ""))}
        possible = [text for text in requests if self.names_only_what_is_told(text, extra)]
        if asks_short:
            possible = [text for text in possible if "{short}" in text]
        request = self.writer.fill(self.rng.choice(possible), self.slots | extra)
        self.turns += Turn("user", request), Turn("assistant", self.story, "story", self.slots["kind"])

    def told(self, is_short: bool) -> tuple[dict[str, str], str]:
        """Slots and text of a story that says of what kind its hero is."""
        while True:
            slots = self.writer.slots()
            story = self.short_story(slots) if is_short else self.writer.story(slots)
            if re.search(rf"\b{slots['kind']}\b", story):
                return slots, story

    def short_story(self, slots: dict[str, str]) -> str:
        opening = self.writer.fill(self.rng.choice(grammar.BRIEF_OPENINGS), slots)
        return (
            f"{opening} {self.writer.fill(grammar.SUMMARIES[self.writer.plot(slots)] + grammar.BRIEF_ENDINGS, slots)}"
        )

    def names_only_what_is_told(self, request: str, extra: dict[str, str]) -> bool:
        values = [self.slots[slot] for slot in slots_of(request) - set(extra)]
        return all(value and re.search(rf"\b{re.escape(value)}\b", self.story, re.IGNORECASE) for value in values)

    def ask(self, num_questions: int) -> None:
        """Questions about the story, each once, and between them about other things."""
        about_story = self.fitting(grammar.FOLLOW_UPS) if self.story else [grammar.NO_STORY]
        self.rng.shuffle(about_story)
        if self.rng.random() < 0.5:
            about_story.sort(key=grammar.PLOT_FOLLOW_UPS.__contains__)
        for _ in range(num_questions):
            if about_story and self.rng.random() < (0.75 if self.story else 0.2):
                self.exchange(about_story.pop())
            else:
                self.exchange(self.rng.choice(self.fitting(grammar.TALK)))

    def fitting(self, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """Those whose slots all have a value and whose evidence is in the story."""
        known = self.known()
        return [exchange for exchange in exchanges if self.fits(exchange, known)]

    def fits(self, exchange: Exchange, known: dict[str, str]) -> bool:
        used = slots_of(exchange.question + exchange.answer + exchange.brief)
        lacking = {slot.removesuffix("less") for slot in used if slot.endswith("less")}
        needed = {slot[0].lower() + slot[1:] for slot in used if not slot.endswith("less")}
        if any(known[slot] for slot in lacking) or not all(known[slot] for slot in needed):
            return False
        return bool(re.search(self.writer.fill(exchange.evidence, known), self.story, re.IGNORECASE))

    def exchange(self, exchange: Exchange) -> None:
        known = self.known()
        answer = (self.is_brief and exchange.brief) or exchange.answer
        question, said, key = (self.writer.fill(text, known) for text in (exchange.question, answer, exchange.key))
        self.turns += Turn("user", question), Turn("assistant", said, exchange.kind, key)

    def fill(self, text: str) -> str:
        return self.writer.fill(text, self.known())

    def known(self) -> dict[str, str]:
        """All values of slots. Those that say that something lacks are empty: they only mark where a text fits."""
        word, word2 = self.rng.choices(COMMON_WORDS, k=2)
        slots = self.slots | {"user": self.user, "bot": self.bot, "word": word, "word2": word2, "end": "."}
        unknown = self.writer.fill(self.rng.choice(paragraphs(grammar.UNKNOWN)[0]), slots)
        marks = {"userless": "", "botless": "", "nameless": ""}
        return slots | marks | {"unknown": unknown, "noise": self.writer.noise().strip() or "?"}


@cache
def slots_of(text: str) -> frozenset[str]:
    """Names of the slots in a text."""
    return frozenset({slot for _, slot, _, _ in Formatter().parse(text) if slot})
