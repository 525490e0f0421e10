"""hsrpc chat: a conversation in the terminal, with an embedded engine or a server."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from hsrpc.cli.options import Commands, add_command, add_sampling_options, sampling_settings
from hsrpc.cli.source import Run, add_source_options, running_source
from hsrpc.errors import ConfigError, HsrpcError, InvalidRequestError
from hsrpc.prompt import Chat, Json, Message
from hsrpc.request import FinishReason
from hsrpc.source import Source

_EXAMPLES = """\
  hsrpc chat                                 with the bundled model, which talks about stories
  hsrpc chat --system "Be brief." --temperature 0.7 --max-tokens 200
  hsrpc chat --model ./qwen2.5-7b-instruct --gpu-memory 8GiB
  hsrpc chat --target 10.0.0.7:50051 --message "Tell me a story about a fox."
  printf "Tell me a story about a fox.\\nWhat was the fox called?\\n" | hsrpc chat
"""
_HELP = """\
/reset        forget the conversation, but for the system message
/system TEXT  change the system message; without TEXT there is none
/help         show this
/quit         leave, as Ctrl-D does
Ctrl-C ends the answer that runs; twice, or here, it leaves."""
_RESET = "/reset begins another conversation"


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "chat", "hold a conversation, embedded or with a server", _EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="message that says how to answer (default: none)")
    parser.add_argument(
        "--message",
        metavar="TEXT",
        help="ask this alone, and end (default: what is typed, or each line of standard input)",
    )
    parser.add_argument(
        "--template-parameter",
        action="append",
        type=_template_parameter,
        default=[],
        metavar="NAME=JSON",
        help="of the model's chat template, such as enable_thinking=false; may be repeated",
    )
    add_sampling_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def _template_parameter(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        example = 'such as enable_thinking=false, or style="short" with its quotes'
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=JSON; give one {example}") from None


@dataclass(slots=True)
class Conversation:
    """What was said, and how the model is told of it."""

    system: str | None
    template_parameters: Json
    turns: list[Message] = field(default_factory=list)

    def asking(self, question: str) -> Chat:
        """The prompt for the answer to `question`."""
        begin = [] if self.system is None else [Message("system", self.system)]
        turns = [*begin, *self.turns, Message("user", question)]
        return Chat(turns, template_parameters=self.template_parameters)

    def add(self, question: str, answer: str) -> None:
        self.turns += [Message("user", question), Message("assistant", answer)]


@dataclass(slots=True)
class Answer:
    """What the model said."""

    text: str = ""
    reason: FinishReason | None = None
    """None: Ctrl-C ended it."""


@dataclass(frozen=True, slots=True)
class Talk:
    """Asks the model, and prints what it answers."""

    run: Run[Any]
    source: Source
    conversation: Conversation
    settings: dict[str, Any]

    def ask(self, question: str) -> Answer:
        """The answer, which the conversation has from now on, unless Ctrl-C came before its first word.

        Raises:
            HsrpcError: the request was refused, or failed; the conversation is as before.
            KeyboardInterrupt: a second Ctrl-C came before the first had ended the answer.
        """
        answer: Answer = self.run(self._stream(self.conversation.asking(question)))
        print()
        if answer.reason is not None or answer.text:
            self.conversation.add(question, answer.text)
        if answer.reason is FinishReason.CONTEXT_LENGTH:
            _note(f"the context is full, and the answer cut off; {_RESET}")
        elif answer.reason is FinishReason.MAX_TOKENS:
            _note("cut off by --max-tokens")
        return answer

    async def _stream(self, chat: Chat) -> Answer:
        answer = Answer()
        with suppress(asyncio.CancelledError):  # by the first Ctrl-C
            async with aclosing(self.source.generate(chat, self.settings)) as deltas:
                async for delta in deltas:
                    print(delta.text, end="", flush=True)
                    answer.text += delta.text
                    answer.reason = delta.finish.reason if delta.finish else None
        return answer

    def obey(self, command: str) -> None:
        """Do what a line such as /reset says.

        Raises:
            InvalidRequestError: there is no such command.
        """
        name, _, rest = command.partition(" ")
        match name:
            case "/reset":
                self.conversation.turns.clear()
            case "/system":
                self.conversation.system = rest.strip() or None
            case "/help":
                print(_HELP)
            case _:
                raise InvalidRequestError(name, "no command; use /reset, /system TEXT, /quit or /help")

    def take(self, line: str) -> Answer | None:
        """Obey a command, or ask; None: there was nothing to answer."""
        if line.startswith("/"):
            self.obey(line)
            return None
        return self.ask(line)


def run(options: argparse.Namespace) -> None:
    """Talk until there is no more to say."""
    settings = sampling_settings(options)  # refused before the model is loaded
    conversation = Conversation(options.system, dict(options.template_parameter))
    if options.message is not None:
        conversation.asking(options.message)  # likewise
    elif sys.stdin is None:
        raise InvalidRequestError("standard input", "closed; give --message TEXT")
    with running_source(options) as (run, source):
        name, has_chat_template = run(source.model())
        if not has_chat_template:
            raise _no_template(name, options.target)
        talk = Talk(run, source, conversation, settings)
        if options.message is not None:
            _complete(talk.ask(options.message))
        elif sys.stdin.isatty():
            print(f"{name}; /help lists commands")
            _converse(talk)
        else:
            for line in _lines(_read):
                _complete(talk.take(line))


def _no_template(name: str, target: str | None) -> ConfigError:
    where = "" if target is None else "the server "
    remedy = f"give {where}one with --chat-template FILE, or continue text with `hsrpc generate`"
    return ConfigError("model", name, "has no chat template", remedy)


def _complete(answer: Answer | None) -> None:
    """A script that Ctrl-C interrupts ends."""
    if answer is not None and answer.reason is None:
        raise KeyboardInterrupt


def _converse(talk: Talk) -> None:
    """Goes on after what goes wrong, as long as somebody types."""
    with suppress(ImportError):
        import readline  # noqa: F401  # by which input() edits, and remembers
    for line in _lines(_typed):
        try:
            answer = talk.take(line)
        except InvalidRequestError as error:
            is_long = error.field == "messages" and talk.conversation.turns
            _note(f"{error}; {_RESET}" if is_long else str(error))
        except HsrpcError as error:
            _note(str(error))
        else:
            if answer is not None and answer.reason is None:
                _note("interrupted")


def _lines(read: Callable[[], str]) -> Iterator[str]:
    """Lines with text, until there are no more or one says /quit."""
    with suppress(EOFError):
        while (line := read().strip()) != "/quit":
            if line:
                yield line


def _read(prompt: str = "") -> str:
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        problem = f"byte {error.object[error.start]:#x} is not {error.encoding}"
        raise InvalidRequestError("standard input", f"{problem}; convert it") from None


def _typed() -> str:
    """What is typed; whatever the shell prints next begins a line.

    Raises:
        EOFError, KeyboardInterrupt: Ctrl-D; Ctrl-C.
    """
    try:
        return _read("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        raise


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr)
