"""Conversations, options of text, and special tokens over the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest

from hsrpc import Chat, Message, Text, ToolCall
from hsrpc.client import AsyncClient
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1.model_pb2 import DetokenizeRequest, TokenizeRequest
from hsrpc.v1.model_pb2_grpc import ModelServiceStub
from hsrpc.v1.prompt_pb2 import Chat as ChatMessage
from hsrpc.v1.prompt_pb2 import Message as Turn
from hsrpc.v1.prompt_pb2 import TextOptions
from hsrpc.v1.prompt_pb2 import ToolCall as Call
from tests.server.grpc.test_status import details, failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hsrpc.server import Server
    from hsrpc.testing.fake_engine import FakeEngine

HI = Turn(role="user", content="Hi")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"minimum": 1}}}
CHAT = Chat(
    [
        Message("system", "Count."),
        Message("user", "1 + 1?"),
        Message("assistant", tool_calls=[ToolCall(id="7", name="add", arguments={"a": 1, "b": "1"})]),
        Message("tool", "2", tool_call_id="7", name="add"),
    ],
    tools=[TOOL],
    template_parameters={"enable_thinking": False, "budget": 512, "share": 0.5, "names": ["a", None], "in": {"x": 1}},
)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as client:
        yield client


@pytest.fixture
def model(server: Server, channel: grpc.aio.Channel) -> ModelServiceStub:
    return ModelServiceStub(channel)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(CHAT, id="chat"),
        pytest.param(Chat([Message("assistant", "Once")], continue_final_message=True), id="continued"),
        pytest.param(Chat([Message("user", "")], add_generation_prompt=False), id="no-generation-prompt"),
        pytest.param(Text("Hi"), id="text"),
        pytest.param(Text("Hi", add_special_tokens=False, parse_special=False), id="text-options"),
    ],
)
async def test_a_prompt_comes_to_the_engine_as_it_was_sent(
    client: AsyncClient, engine: FakeEngine, prompt: Chat | Text
) -> None:
    """Every field; whole numbers as integers."""
    await client.complete(prompt, skip_special_tokens=False)
    assert engine.prompts == [prompt]
    assert [params.skip_special_tokens for params in engine.submitted] == [False]
    if prompt is CHAT:
        assert type(engine.prompts[0].template_parameters["budget"]) is int


async def test_start_says_whether_special_tokens_are_shown(client: AsyncClient) -> None:
    assert (await client.complete("Hi")).start.output.skip_special_tokens
    assert not (await client.complete("Hi", skip_special_tokens=False)).start.output.skip_special_tokens


async def test_tokenize_gives_the_text_of_a_conversation(client: AsyncClient, model: ModelServiceStub) -> None:
    """Beside its ids; of mere text there is none."""
    chat = Chat([Message("user", "Hi")])
    assert await client.render(chat) == "user: Hi\n"
    assert await client.tokenize(chat) == list(map(ord, "user: Hi\n"))
    assert await client.tokenize(Text("Hi")) == [72, 105]
    assert not (await model.Tokenize(TokenizeRequest(text="Hi"))).HasField("text")


async def test_the_prompt_is_echoed(client: AsyncClient) -> None:
    """A conversation as what it becomes."""
    assert (await client.complete(Chat([Message("user", "Hi")]), echo_prompt=True)).text.startswith("user: Hi\nOnce")
    assert (await client.complete(Text("Hi "), echo_prompt=True)).text.startswith("Hi Once")


async def test_the_model_has_a_chat_template(client: AsyncClient) -> None:
    assert (await client.get_model()).has_chat_template


NUMBER = ChatMessage(messages=[HI])
NUMBER.template_parameters.update({"x": "y" * 70_000})


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (ChatMessage(), "chat.messages"),
        (ChatMessage(messages=[HI, Turn(role="bot", content="")]), "chat.messages[1].role"),
        (ChatMessage(messages=[Turn(role="user")]), "chat.messages[0].content"),
        (
            ChatMessage(messages=[Turn(role="assistant", tool_calls=[Call(name="f", arguments="{")])]),
            "chat.messages[0].tool_calls[0].arguments",
        ),
        (ChatMessage(messages=[HI], tools=["{}", "[]"]), "chat.tools[1]"),
        (ChatMessage(messages=[HI], tools=["[" * 100_000]), "chat.tools[0]"),
        (ChatMessage(messages=[HI] * 4097), "chat.messages"),
        (NUMBER, "chat.template_parameters"),
        (
            ChatMessage(messages=[HI], add_generation_prompt=True, continue_final_message=True),
            "chat.continue_final_message",
        ),
        (ChatMessage(messages=[Turn(role="user", content="x" * 64 * 256)]), "chat.messages"),
    ],
)
async def test_a_wrong_conversation_is_named_by_its_path(
    stub, model: ModelServiceStub, chat: ChatMessage, field: str
) -> None:
    """In Generate and in Tokenize alike."""
    calls = [model.Tokenize(TokenizeRequest(chat=chat))]
    if "x" * 64 * 256 not in str(chat):  # the fake engine takes a prompt of any length
        calls.append(stub.Generate(v1.GenerateRequest(chat=chat)))
    for call in calls:
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in details(error, BadRequest).field_violations] == [field]


async def test_what_contradicts_the_input_is_refused(stub, model: ModelServiceStub) -> None:
    """Options of text without text; text and a conversation."""
    options, chat = TextOptions(parse_special=False), ChatMessage(messages=[HI])
    for call, field in (
        (stub.Generate(v1.GenerateRequest(chat=chat, text_options=options)), "text_options"),
        (stub.Generate(v1.GenerateRequest(token_ids=v1.TokenIds(ids=[1]), text_options=options)), "text_options"),
        (model.Tokenize(TokenizeRequest(chat=chat, text_options=options)), "text_options"),
        (model.Tokenize(TokenizeRequest(chat=chat, text="Hi")), "text"),
    ):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in details(error, BadRequest).field_violations] == [field]


async def test_fields_that_the_server_does_not_know_are_refused_in_lists_too(stub) -> None:
    """A setting of one message of many is not ignored."""
    turn = Turn.FromString(HI.SerializeToString() + b"\x98\x06\x01")  # field 99
    error = await failure(stub.Generate(v1.GenerateRequest(chat=ChatMessage(messages=[HI, turn]))))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "field 99 of hsrpc.v1.Message" in error.details()


async def test_detokenize_shows_special_tokens(model: ModelServiceStub, engine: FakeEngine, monkeypatch) -> None:
    """Where it is asked to."""
    asked = []

    async def decode(token_ids, client="", skip_special_tokens=True) -> str:
        asked.append(skip_special_tokens)
        return ""

    monkeypatch.setattr(engine.tokenizer, "decode", decode)
    await model.Detokenize(DetokenizeRequest(token_ids=[72]))
    await model.Detokenize(DetokenizeRequest(token_ids=[72], skip_special_tokens=False))
    assert asked == [True, False]
