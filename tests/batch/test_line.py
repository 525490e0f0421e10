"""Lines of an input: what is read of them, and what is wrong with others."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsrpc.batch.line import Endpoint, Line, read_line, too_long
from hsrpc.batch.refusal import Fault
from tests.batch.support import chat, completion


def read(value: object, number: int = 1) -> Line:
    return read_line(number, value if isinstance(value, bytes) else json.dumps(value).encode())


def test_a_line_has_an_endpoint_and_a_body():
    """As it is, whatever stands around it."""
    line = read(b"\xef\xbb\xbf" + json.dumps(chat("a", n=2)).encode() + b"\r\n")
    assert (line.custom_id, line.number) == ("a", 1)
    endpoint, body = line.content
    assert (endpoint, body["n"]) == (Endpoint.CHAT, 2)


def test_an_id_is_that_of_the_line():
    """In every run and at every place; of no other line."""
    ids = [read(line, number).id for number, line in ((1, chat("a")), (7, chat("a")), (1, chat("a", n=2)))]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0].startswith("batch_req_")


@pytest.mark.parametrize(
    ("line", "code", "param", "message"),
    [
        (b"oops", "invalid_json_line", None, "line 4: not JSON (Expecting value"),
        (b'{"a": \xff}', "invalid_json_line", None, "line 4: not JSON ('utf-8' codec"),
        (b"[" * 100_000, "invalid_json_line", None, "line 4: not JSON ("),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json_line", None, "line 4: not JSON ("),
        ([], "invalid_json_line", None, "line 4: a JSON list; give an object"),
        ({}, "missing_required_parameter", "custom_id", "line 4: custom_id: absent"),
        ({"custom_id": 7}, "missing_required_parameter", "custom_id", "line 4: custom_id: 7; give each line a string"),
        ({"custom_id": ""}, "missing_required_parameter", "custom_id", "line 4: custom_id: ''"),
        ({"custom_id": "\ud800"}, "invalid_value", "custom_id", "line 4: custom_id: a lone surrogate U+D800"),
        ({**chat("a"), "method": "GET"}, "invalid_method", "method", "line 4: method: 'GET'; give \"POST\""),
        ({**chat("a"), "url": "/v1/embeddings"}, "invalid_url", "url", "line 4: url: '/v1/embeddings' is not served"),
        ({**chat("a"), "url": ["x"]}, "invalid_url", "url", "line 4: url: ['x'] is not served"),
        ({**chat("a"), "body": None}, "missing_required_parameter", "body", "line 4: body: absent; give an object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_a_line(line, code, param, message):
    """Names the line and the field, and gives a remedy."""
    found = read(line, 4).content
    assert isinstance(found, Fault)
    assert (found.code, found.param, found.line) == (code, param, 4)
    assert found.message.startswith(message)
    assert len(found.message) < 250


def test_lines_without_a_custom_id_are_told_apart_by_their_place():
    """Two alike are two lines."""
    one, other = read(b"oops", 1), read(b"oops", 2)
    assert one.key != other.key
    assert too_long(3, 10).key != too_long(4, 10).key


def test_a_custom_id_is_no_key_of_another_line():
    """Whatever it says."""
    assert read(completion(read(b"oops").id)).key != read(b"oops").key


@given(st.binary(max_size=60))
def test_any_bytes_are_a_line_or_a_fault(data):
    """Nothing else is raised."""
    assert read_line(1, data).number == 1
