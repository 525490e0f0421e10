"""hsrpc chat: turns that know of each other, commands, what is refused, and Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from hsrpc.cli.chat import Conversation
from hsrpc.client import Client
from hsrpc.engine.engine import Engine
from hsrpc.engine.tokenizer import Tokenizer
from hsrpc.prompt import Message
from hsrpc.request import Delta, Finish, FinishReason, Timings, Usage
from tests.cli.conftest import ROOT, SMALL, TALKING, Ran

STORY = "Tell me a story about a fox."
ASK_NAME = "What was the fox called?"


class Typed(io.StringIO):
    """What somebody types in a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(hsrpc, address, monkeypatch) -> Callable[..., Ran]:
    """`talk("Hello", "/quit", typed=True)`: each of the lines in turn, to the server of the bundled model."""

    def run(*lines: str, typed: bool = False, options: tuple[str, ...] = ()) -> Ran:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", Typed(text) if typed else io.StringIO(text))
        return hsrpc("chat", "--target", address, "--temperature=0", *options)

    return run


def test_each_line_is_a_turn_that_knows_those_before(talk):
    """Without a terminal, an answer a line is all that is printed; the second one has its name from the first."""
    ran = talk(STORY, "", ASK_NAME)
    assert (ran.code, ran.err) == (0, "")
    story, answer = ran.out.splitlines()
    name = story.partition(" fox named ")[2].split()[0]
    assert name in answer


def test_reset_forgets_the_turns(talk):
    """After it the model does not know what it told; the system message stays."""
    options = ("--system", "Your name is Rosa.")
    story, answer, name = talk(STORY, "/reset", ASK_NAME, "What is your name?", options=options).out.splitlines()
    assert story.partition(" fox named ")[2].split()[0] not in answer
    assert "Rosa" in name


def test_system_changes_the_system_message(talk):
    """It holds for the answers that follow, and is none without a text."""
    ask = "What is your name?"
    ran = talk(ask, "/system Your name is Rosa.", ask, "/reset", "/system", ask)
    before, told, after = ran.out.splitlines()
    assert "Rosa" in told
    assert before == after != told


def test_an_engine_in_the_process_says_the_same(hsrpc, talk):
    """--message asks once; what is embedded answers as the server does."""
    ran = hsrpc("chat", *TALKING, "--temperature=0", "--message", STORY)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == talk(STORY).out


def test_a_message_is_no_command(talk):
    """--message sends what it is given, and leaves standard input alone."""
    ran = talk("never read", options=("--message", "/reset"))
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) == 1


def test_quit_leaves(talk):
    """Nothing after it is asked; the end of the input leaves too."""
    ran = talk(STORY, "/quit", STORY, typed=True)
    assert ran.code == 0
    assert ran.out.count("fox named") == 1


def test_what_is_typed_wrong_ends_nothing(talk):
    """In a terminal an unknown command, and a message that no longer fits, are told, and the talk goes on."""
    ran = talk("/nothing", STORY, "so " * 300, ASK_NAME, "/help", typed=True)
    assert ran.code == 0
    unknown, full = ran.err.splitlines()
    assert unknown == "(/nothing: no command; use /reset, /system TEXT, /quit or /help)"
    assert full.startswith("(messages: ")
    assert "at most 383 fit" in full
    assert full.endswith("; /reset begins another conversation)")
    assert "His name was" in ran.out
    assert "/system TEXT  change the system message" in ran.out
    assert ran.out.startswith("storyteller; /help lists commands\n> ")


def test_what_is_wrong_in_a_script_ends_it(talk):
    """Later lines would rely on an answer that is not there."""
    ran = talk("so " * 400, STORY)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("hsrpc: error: messages: ")


def test_an_answer_that_is_cut_off_says_why(talk):
    """By the end of the context, with the way out, or by --max-tokens."""
    full = talk("so " * 350 + STORY, options=("--ignore-eos",)).err
    assert full == "(the context is full, and the answer cut off; /reset begins another conversation)\n"
    assert talk(STORY, options=("--max-tokens=3",)).err == "(cut off by --max-tokens)\n"


def test_template_parameters_reach_the_template(hsrpc, monkeypatch):
    """Each is JSON; the last one of a name counts."""
    chats = []

    async def generate(_, chat, *__, **___):
        chats.append(chat)
        yield Delta("Yes.", finish=Finish(FinishReason.EOS, Usage(1, 1), Timings(0, 0, 0, 0)))

    monkeypatch.setattr(Engine, "generate", generate)
    given = [f"--template-parameter={each}" for each in ("style=1", 'style="a=b"', "enable_thinking=false")]
    assert hsrpc("chat", *SMALL, "--message", "hi", *given).out == "Yes.\n"
    [chat] = chats
    assert chat.template_parameters == {"style": "a=b", "enable_thinking": False}


@pytest.mark.parametrize("text", ["style", "style=", "style=short"])
def test_a_template_parameter_is_json(hsrpc, text):
    """What is none is a wrong use."""
    ran = hsrpc("chat", "--template-parameter", text)
    assert ran.code == 2
    assert f"{text!r} is not NAME=JSON; give one such as enable_thinking=false" in ran.err


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "not UTF-8"])
def test_standard_input_that_cannot_be_read(hsrpc, monkeypatch, address, closed):
    """It is one line that says what to do."""
    stdin = None if closed else io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    ran = hsrpc("chat", "--target", address)
    expected = "closed; give --message TEXT" if closed else "byte 0xff is not utf-8; convert it"
    assert (ran.code, ran.err) == (1, f"hsrpc: error: standard input: {expected}\n")


def test_a_model_without_a_template(hsrpc, monkeypatch):
    """It is told at once, with what to do."""
    monkeypatch.setattr(Tokenizer, "has_chat_template", False)
    ran = hsrpc("chat", *SMALL, "--message", "hi")
    remedy = "give one with --chat-template FILE, or continue text with `hsrpc generate`"
    assert (ran.code, ran.err) == (1, f"hsrpc: error: model='storyteller': has no chat template; {remedy}\n")


def test_a_conversation_is_what_was_said():
    """The system message comes first, turns alternate, the question is last."""
    conversation = Conversation("Be brief.", {})
    conversation.add("Hi", "Hello")
    roles = [turn.role for turn in conversation.asking("Bye").turns]
    assert roles == ["system", "user", "assistant", "user"]
    assert conversation.turns == [Message("user", "Hi"), Message("assistant", "Hello")]


@pytest.fixture
def silent() -> Iterator[Client]:
    """A client of a server whose engine takes requests and says nothing; `silent.target` is its address."""
    command = [sys.executable, "-m", "tests.server.serve_fake"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with Client(address) as client:
                client.wait_ready(60)
                client.target = address
                yield client
        finally:
            process.kill()


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.output = b""
        self._pid, self._fd = pty.fork()
        if not self._pid:
            os.execv(sys.executable, [sys.executable, *command])

    def read_to(self, text: bytes) -> None:
        """Read until it is there; fail where the program ends before."""
        while text not in self.output:
            self.output += os.read(self._fd, 1024)
        self.output = self.output.partition(text)[2]

    def write(self, text: bytes) -> None:
        os.write(self._fd, text)

    def close(self, again: bytes = b"") -> int:
        """Its exit code. `again` is typed whenever a second is silent: Python's readline can miss one interrupt."""
        with suppress(OSError):  # which Linux raises at the end
            while True:
                if again and not select.select([self._fd], [], [], 1.0)[0]:
                    self.write(again)
                elif not os.read(self._fd, 1024):
                    break
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def until_running(client: Client, count: int) -> None:
    """Wait until so many requests run on the server; fail after ten seconds."""
    end = time.monotonic() + 10
    while client.get_server_info().load.running_requests != count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ctrl_c_ends_the_answer_and_then_the_talk(silent):
    """The request leaves the server and the prompt is back; there Ctrl-C leaves."""
    terminal = Terminal("-m", "hsrpc.cli.main", "chat", "--target", silent.target)
    terminal.read_to(b"> ")
    for _ in range(2):
        terminal.write(b"Hello\n")
        until_running(silent, 1)
        terminal.write(b"\x03")
        terminal.read_to(b"(interrupted)")
        until_running(silent, 0)
        terminal.read_to(b"> ")
    terminal.write(b"\x03")
    assert terminal.close(again=b"\x03") == 130


def test_ctrl_c_ends_a_script(silent):
    """One that asks a single question has nothing to go on with."""
    terminal = Terminal("-m", "hsrpc.cli.main", "chat", "--target", silent.target, "--message", "Hello")
    until_running(silent, 1)
    terminal.write(b"\x03")
    assert terminal.close() == 130
    until_running(silent, 0)


def test_ctrl_d_leaves(silent):
    """As one who has said all."""
    terminal = Terminal("-m", "hsrpc.cli.main", "chat", "--target", silent.target)
    terminal.read_to(b"> ")
    terminal.write(b"\x04")
    assert terminal.close() == 0
