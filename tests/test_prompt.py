"""What a conversation may be: errors name the field by its path."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hsrpc import Chat, Message, ToolCall
from hsrpc.errors import InvalidRequestError

HI = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_mappings_become_messages() -> None:
    """As they are written everywhere, arguments as an object or as JSON; templates read them as they were."""
    json_call = CALL | {"function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [HI, {"role": "assistant", "content": None, "tool_calls": [json_call]}]
    turns += [{"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}]
    chat = Chat(turns)
    assert chat.turns[1] == Message("assistant", tool_calls=(ToolCall(id="1", name="add", arguments={"a": 1}),))
    assert [turn.as_dict() for turn in chat.turns] == [HI, {"role": "assistant", "tool_calls": [CALL]}, turns[2]]
    assert Chat(chat.turns) == chat


def test_a_generation_prompt_is_added_unless_a_message_is_continued() -> None:
    assert Chat([HI]).add_generation_prompt is True
    assert Chat([HI], continue_final_message=True).add_generation_prompt is False
    assert Chat([HI], add_generation_prompt=False).add_generation_prompt is False


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        pytest.param([], {}, "messages: empty; give at least one", id="empty"),
        pytest.param(
            [HI, {"role": "bot", "content": ""}], {}, "messages[1].role: 'bot' is none; use one of", id="role"
        ),
        pytest.param([{"content": "Hi"}], {}, "messages[0].role: None is none; use one of system", id="no-role"),
        pytest.param(["Hi"], {}, "messages[0].role: absent of 'Hi'; give a mapping", id="string"),
        pytest.param([{"role": "user"}], {}, "messages[0].content: absent; give text", id="no-content"),
        pytest.param([HI | {"content": ["Hi"]}], {}, "messages[0].content: list; give a string", id="parts"),
        pytest.param([HI | {"text": ""}], {}, "messages[0].text: unknown; use role, content", id="unknown"),
        pytest.param([HI | {"tool_calls": [CALL]}], {}, "messages[0].tool_calls: of role 'user'", id="calls"),
        pytest.param([HI | {"tool_call_id": "1"}], {}, "messages[0].tool_call_id: of role 'user'", id="call-id"),
        pytest.param(
            [HI, {"role": "assistant", "tool_calls": [CALL, {"function": {"name": "f", "arguments": "[1]"}}]}],
            {},
            "messages[1].tool_calls[1].arguments: a JSON list; give an object",
            id="arguments",
        ),
        pytest.param(
            [{"role": "assistant", "tool_calls": [{"name": "f"}]}], {}, "messages[0].tool_calls[0].function", id="call"
        ),
        pytest.param(
            [HI],
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message: not together with add_generation_prompt; leave one of them out",
            id="both",
        ),
        pytest.param(
            [{"role": "assistant", "tool_calls": [CALL]}],
            {"continue_final_message": True},
            "continue_final_message: the last message has no content",
            id="nothing-to-continue",
        ),
        pytest.param([HI], {"tools": ["add"]}, "tools[0]: str; give a JSON object", id="tool"),
        pytest.param([HI], {"tools": [{"x": HI.keys}]}, "tools: no JSON can be made of it", id="no-json"),
        pytest.param([HI] * 4097, {}, "messages: 4097 entries, at most 4096", id="many"),
        pytest.param([HI | {"content": "a\ud800"}], {}, "messages: a lone surrogate U+D800", id="surrogate"),
    ],
)
def test_a_wrong_field_is_named(messages: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        Chat(messages, **settings)
