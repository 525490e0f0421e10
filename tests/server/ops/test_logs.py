"""The log: one line a request, as text or JSON, without prompts."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from hsrpc.client import AsyncClient
from hsrpc.errors import RequestFailedError
from hsrpc.server import Server, ServerConfig
from hsrpc.server.observation import Arrival, ObservedCall
from hsrpc.server.ops.logs import JsonFormatter, LogFormat, RequestLog, TextFormatter, set_up_logs
from hsrpc.server.security import SecurityConfig
from hsrpc.v1 import generation_pb2 as v1
from tests.server.conftest import until

PROMPT = "A secret wish"


class Written(io.BytesIO):
    """What the log's thread has written, all of it."""

    def text(self) -> str:
        for handler in logging.getLogger().handlers:
            handler.flush()
        return self.getvalue().decode()


@pytest.fixture
def level() -> str:
    return "info"


@pytest.fixture
def log(level: str) -> Iterator[Written]:
    """What is logged, as JSON."""
    root, ours, written = logging.getLogger(), logging.getLogger("hsrpc"), Written()
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()
    set_up_logs(LogFormat.JSON, level, lambda: None, written.write)
    yield written
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def prompts() -> bool:
    return False


@pytest.fixture
async def loading_server(log: Written, prompts: bool) -> AsyncIterator[Server]:
    server = Server(ServerConfig(port=0), observers=[RequestLog(prompts=prompts)])
    await server.start()
    yield server
    await server.stop()


def requests(log: Written) -> list[dict[str, object]]:
    entries = [json.loads(line) for line in log.text().splitlines()]
    return [entry for entry in entries if entry["logger"] == "hsrpc.request"]


async def test_one_line_a_request(log, stub):
    """It has who, what, how much, how it ended and how long it took, and no text."""
    assert [_ async for _ in stub.Generate(v1.GenerateRequest(text=PROMPT, request_id="r"))]
    [entry] = requests(log)
    told = {"request_id": "r", "client": "127.0.0.1", "model": "fake/model", "prompt_tokens": len(PROMPT)}
    told |= {"completion_tokens": 4, "status": "OK", "finish": "EOS", "queue_seconds": 0.5, "preemptions": 1}
    assert told.items() <= entry.items()
    assert 0 <= entry["ttft_seconds"] <= entry["total_seconds"] < 10
    assert PROMPT not in log.text()


async def test_a_failure_has_the_error_id(log, stub, engine):
    """The id that the client gets finds the request's line, and the one with the reason."""
    engine.refusal = RequestFailedError("inner reason")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(v1.GenerateRequest(text=PROMPT)).read()
    [entry] = requests(log)
    assert (entry["status"], entry["level"]) == ("INTERNAL", "ERROR")
    assert entry["error_id"] in caught.value.details()
    cause = next(entry for entry in map(json.loads, log.text().splitlines()) if "exception" in entry)
    assert entry["error_id"] in cause["message"]
    assert "inner reason" in cause["exception"]
    assert PROMPT not in log.text()


async def test_a_client_with_a_name_is_logged_by_it(log, engine, tmp_path):
    """The name that a token stands for, and never the token."""
    tokens, token = tmp_path / "tokens", "0123456789abcdef"
    tokens.write_text(f"alice {token}\n")
    tokens.chmod(0o600)
    server = Server(ServerConfig(port=0, security=SecurityConfig(auth_tokens=tokens)), observers=[RequestLog()])
    await server.start()
    await server.attach(engine)
    async with AsyncClient(server.address, token=token) as client:
        await client.complete("Hi")
    await server.stop()
    assert requests(log)[0]["client"] == "alice"
    assert token not in log.text()


async def test_a_cancelled_call_has_its_line(log, stub, engine):
    """What a client gives up is CANCELLED, without a finish."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(text=PROMPT))
    await until(lambda: engine.live)
    call.cancel()
    await until(lambda: requests(log))
    [entry] = requests(log)
    assert entry["status"] == "CANCELLED"
    assert "finish" not in entry


@pytest.mark.parametrize("prompts", [True])
async def test_prompts_are_written_where_asked_for(log, stub):
    """Only --log-prompts brings the text into the log."""
    assert [_ async for _ in stub.Generate(v1.GenerateRequest(text=PROMPT))]
    assert requests(log)[0]["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("level", "ours", "libraries"),
    [
        ("debug", ["DEBUG", "INFO", "WARNING", "ERROR"], ["WARNING", "ERROR"]),
        ("info", ["INFO", "WARNING", "ERROR"], ["WARNING", "ERROR"]),
        ("warning", ["WARNING", "ERROR"], ["WARNING", "ERROR"]),
        ("error", ["ERROR"], ["ERROR"]),
    ],
)
def test_the_level_is_ours_alone(log, ours, libraries):
    """Libraries are heard from WARNING on, and no lower than the level."""
    for name in ("hsrpc.any.module", "grpc._cython.cygrpc", "asyncio", "httpx", "a.library"):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(number, "said")
        entries = [json.loads(line) for line in log.text().splitlines()]
        found = [entry["level"] for entry in entries if entry["logger"] == name]
        assert found == (ours if name.startswith("hsrpc") else libraries), name


@pytest.mark.parametrize("level", ["debug"])
async def test_debug_has_no_lines_of_libraries(log, stub):
    """A server that serves calls at --log-level debug says what hsrpc has to say, and nothing else."""
    for _ in range(3):
        assert [_ async for _ in stub.Generate(v1.GenerateRequest(text=PROMPT))]
    assert {entry["logger"].split(".")[0] for entry in map(json.loads, log.text().splitlines())} == {"hsrpc"}


def test_text_is_one_line_of_key_and_value():
    """A request id of a client's making cannot forge a second line or field."""
    record = logging.LogRecord("hsrpc.request", logging.INFO, "", 0, "request", (), None)
    record.request = {"request_id": "a\nb status=OK", "client": "::1", "empty": ""}
    line = TextFormatter().format(record)
    assert line.endswith(r'INFO hsrpc.request: request request_id="a\nb status=OK" client=::1 empty=""')
    record.request |= {"request_id": "\u2028"}
    assert json.loads(JsonFormatter().format(record))["request_id"] == "\u2028"


def test_an_observer_that_fails_ends_no_call(log):
    """What watches a call must not end it; the fault is logged."""

    class Broken:
        def started(self, call: ObservedCall) -> None:
            raise ZeroDivisionError

        def ended(self, call: ObservedCall) -> None:
            raise ZeroDivisionError

    call = ObservedCall(Arrival("Generate", "here"), [Broken()])
    call.start()
    call.end()
    assert log.text().count("an observer of calls failed") == 2
