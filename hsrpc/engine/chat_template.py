"""Conversations to text, by the model's own template: a program that others wrote, in a sandbox and within bounds."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.exceptions import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hsrpc.engine.plain_words import PlainWords
from hsrpc.errors import ConfigError, InvalidRequestError
from hsrpc.prompt import Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_LINES = 3_000_000
"""Lines and calls of Python that a template may take: a second or two, and hundreds for each of the most messages."""
_COMPILED = "<template>"
"""File name of compiled templates."""
_MAIN = "root"
"""The generator in it whose strings, one after the other, are the text."""
_OF_TRAINING = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
"""A tag that transformers adds to the language."""
_MAX_TOLD = 300
"""Characters that are told of what a template says is wrong."""
_MARKERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that are never characters."""
_REMEDY = "send text, or start the server with --chat-template FILE"


def read_template(path: str) -> str:
    """The template in a file of its own.

    Raises:
        ConfigError: the file cannot be read, or is no template.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_OF_TRAINING.sub("", text))
    except OSError as error:
        raise ConfigError("chat_template", path, f"{error.strerror}", "give a file that can be read") from None
    except (UnicodeDecodeError, TemplateSyntaxError) as error:
        raise ConfigError("chat_template", path, f"no template ({error})", "correct it") from None
    return text


class ChatTemplate:
    """The chat template of a tokenizer; its methods may be called on several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_characters: int) -> None:
        self._tokenizer = tokenizer
        self._max_characters = max_characters
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
        self._reserved -= {"documents", "kwargs"}
        self._plain_words = lru_cache(self._make_plain_words)

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render(self, chat: Chat) -> str:
        """The text that `chat` becomes.

        Raises:
            InvalidRequestError: the model has no template, or its template refuses the conversation.
        """
        return "".join(self._pieces(chat, self._choose(chat)))

    def encode(self, chat: Chat) -> list[int]:
        """Token ids of that text, in which words of `chat` are never special tokens.

        Raises:
            InvalidRequestError: as `render`.
        """
        template = self._choose(chat)
        return self._plain_words(template).encode(self._pieces(chat, template))

    def _choose(self, chat: Chat) -> str:
        """The template for `chat`; of several, as transformers has it."""
        found = self._tokenizer.chat_template
        if isinstance(found, dict):
            name = "tool_use" if chat.tools and "tool_use" in found else "default"
            found = found.get(name)
            if found is None:
                raise InvalidRequestError("messages", f"the model has no chat template named {name!r}; {_REMEDY}")
        if not found:
            raise InvalidRequestError("messages", f"the model has no chat template; {_REMEDY}")
        return str(found)

    def _pieces(self, chat: Chat, template: str) -> list[str]:
        """The text in pieces for `PlainWords`."""
        for name in chat.template_parameters:
            if name in self._reserved:
                raise InvalidRequestError("template_parameters", f"{name!r} is hsrpc's own; leave it out")
        marking = _Marking(chat, self._plain_words(template), self._plain_words(template, of_model=True))
        return marking.pieces(self._apply(template, marking.marked(chat)))

    def _apply(self, template: str, chat: Chat) -> str:
        try:
            with _Bounds(_MAX_LINES, self._max_characters):
                text = self._tokenizer.apply_chat_template(
                    [turn.as_dict() for turn in chat.turns],
                    tools=list(chat.tools) or None,
                    chat_template=template,
                    add_generation_prompt=chat.add_generation_prompt,
                    continue_final_message=chat.continue_final_message,
                    tokenize=False,
                    **chat.template_parameters,
                )
        except _BoundsError as error:
            raise InvalidRequestError("messages", f"the model's chat template {error}; send less") from None
        except Exception as error:  # the template is a program that others wrote: it may raise anything
            told = (str(error) or type(error).__name__).splitlines()[0][:_MAX_TOLD]
            raise InvalidRequestError("messages", f"the model's chat template refuses them: {told}") from None
        return str(text)

    def _make_plain_words(self, template: str, of_model: bool = False) -> PlainWords:
        """For the special tokens, and for others that the template writes; but blanks are words to it.

        What the model said may hold those that come in pairs, such as <think> and </think>: they end no turn.
        """
        added = self._tokenizer.added_tokens_decoder.values()
        contents = {token.content for token in added}
        written = {text for text in contents if text in template and not text.isspace()}
        if of_model:
            written -= {text for text in written if _is_of_pair(text, contents)}
        return PlainWords(self._tokenizer, {token.content for token in added if token.special} | written)


def _is_of_pair(text: str, contents: Collection[str]) -> bool:
    """Whether it is <x> or </x>, and the other is there too."""
    return text.startswith("<") and ("<" + text[2:] if text.startswith("</") else "</" + text[1:]) in contents


class _Marking:
    """Marks around the special tokens that a conversation spells: they tell them from those that the template writes.

    A conversation that spells none stays as it is, and so do the template's tests of it.
    """

    def __init__(self, chat: Chat, words: PlainWords, words_of_model: PlainWords) -> None:
        self._words = words
        self._words_of_model = words_of_model
        said = [turn.as_dict() for turn in chat.turns], chat.tools, chat.template_parameters
        text = json.dumps(said, ensure_ascii=False)
        free = [marker for marker in _MARKERS if marker not in text]
        if len(free) < 2:
            raise InvalidRequestError(
                "messages", "they hold all of U+FDD0 to U+FDEF, which are no characters; leave one out"
            )
        self._begin, self._end = free[:2]
        self._cut = re.compile(f"{self._begin}([^{self._begin}{self._end}]*){self._end}|[{self._begin}{self._end}]")

    def marked(self, chat: Chat) -> Chat:
        """`chat` with marks."""
        return Chat(
            [self._marked_message(turn) for turn in chat.turns],
            tools=[self._marked(tool, self._words) for tool in chat.tools],
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            template_parameters=self._marked(chat.template_parameters, self._words),
        )

    def pieces(self, text: str) -> list[str]:
        """`text` cut at the marks, without them; where the template took one of a pair away, the other only cuts."""
        return [piece or "" for piece in self._cut.split(text)]

    def _marked_message(self, turn: Message) -> Message:
        words = self._words_of_model if turn.role == "assistant" else self._words
        return Message.read(self._marked(turn.as_dict(), words))

    def _marked(self, value: Any, words: PlainWords) -> Any:
        if isinstance(value, str):
            pieces = words.pieces(value)
            pieces[1::2] = [f"{self._begin}{piece}{self._end}" for piece in pieces[1::2]]
            return "".join(pieces)
        if isinstance(value, Mapping):
            return {self._marked(name, words): self._marked(item, words) for name, item in value.items()}
        if isinstance(value, Sequence):
            return [self._marked(item, words) for item in value]
        return value


class _BoundsError(Exception):
    """A template took more than it may."""


class _Bounds:
    """Ends the templates that run on this thread in the block where they take too many lines, or write too much.

    What one expression takes is not bounded: the sandbox bounds `range`, but not how often a string is repeated.
    """

    def __init__(self, max_lines: int, max_characters: int) -> None:
        self._lines = max_lines
        self._characters = self._max_characters = max_characters
        self._traced = (_COMPILED, str(Path(jinja2.__file__).parent))
        self._previous: Any = None

    def __enter__(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self._trace_call)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(self._previous)

    def _trace_call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        self._count()
        return self._trace if frame.f_code.co_filename.startswith(self._traced) else None

    def _trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            self._count()
        elif event == "return" and isinstance(argument, str) and frame.f_code.co_name == _MAIN:
            self._characters -= len(argument)
            if self._characters < 0:
                raise _BoundsError(f"makes more than {self._max_characters} characters of them")
        return self._trace

    def _count(self) -> None:
        self._lines -= 1
        if self._lines < 0:
            raise _BoundsError("goes on without end")
