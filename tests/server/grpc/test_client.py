"""The Python clients against a real server."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import grpc
import pytest

from hsrpc.client import AsyncClient, CallError, Client, Settings
from hsrpc.constraint import Choice, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import InvalidRequestError
from hsrpc.request import Delta, FinishReason, SamplingParams, Timings, Usage
from hsrpc.server import Server
from hsrpc.testing.stub_engine import stub_logprobs
from hsrpc.v1 import generation_pb2 as v1
from tests.server.conftest import until

R = TypeVar("R")


async def with_client(server: Server, use: Callable[[Client], R]) -> R:
    """What `use` makes of a sync client, on a thread, so that the server's loop stays free."""

    def work() -> R:
        with Client(server.address) as client:
            return use(client)

    return await asyncio.to_thread(work)


def test_import_is_light():
    """The client loads neither torch nor numpy nor transformers."""
    code = "import sys, hsrpc.client; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_base_install_is_enough():
    """Without google.rpc a call error still has its code and message."""
    code = (
        "import sys; sys.modules['google.rpc'] = None; import grpc; from hsrpc.client import CallError; "
        "e = CallError(grpc.StatusCode.UNAVAILABLE, 'loading', b'x'); print(e, e.fields, e.reason)"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "UNAVAILABLE: loading {} None"


def test_settings_are_those_of_the_service():
    """Every setting of the engine and the service can be given to the client."""
    output = set(v1.Output.DESCRIPTOR.fields_by_name)
    expected = set(SamplingParams.__dataclass_fields__) | output | {"request_id", "cache_salt", "model", "timeout"}
    assert set(Settings.__annotations__) == expected


async def test_the_prompts_logprobs_are_those_of_the_engine(server):
    """All of them, in order, whatever messages they come in; the parts of a stream have them too."""
    asked = {"prompt_logprobs": 2, "max_tokens": 0, "max_tokens_per_message": 3}
    whole = await with_client(server, lambda client: client.complete([65] * 9, **asked))
    assert whole.prompt_logprobs == stub_logprobs([65] * 9, 2)
    assert (whole.token_ids, whole.finish.reason) == ((), FinishReason.EOS)
    deltas = await with_client(server, lambda client: list(client.generate([65] * 9, **asked)))
    assert [len(delta.prompt_logprobs) for delta in deltas] == [3, 3, 2]


async def test_generate_yields_deltas(server):
    """The sync client yields the same deltas as an embedded engine."""
    deltas = await with_client(server, lambda client: list(client.generate("Hi", return_token_ids=True)))
    assert "".join(delta.text for delta in deltas) == "Once upon a time"
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [4, 5, 2, 5]
    assert all(isinstance(delta, Delta) for delta in deltas)
    finish = deltas[-1].finish
    assert finish is not None
    assert (finish.reason, finish.usage) == (FinishReason.EOS, Usage(3, 4, 1, drafted_tokens=6, accepted_tokens=3))
    assert finish.timings == Timings(queue=0.5, prefill=1.0, decode=2.0, first_token=1.5)


@pytest.mark.parametrize(
    "constraint",
    [
        JsonSchema({"type": "integer"}),
        JsonObject(),
        Regex("a+"),
        Grammar('start: "a"'),
        Choice(("a", "b")),
        None,
    ],
    ids=lambda each: type(each).__name__,
)
async def test_a_constraint_is_the_engines(server, engine, constraint):
    """Whatever its kind; a schema comes as its text."""
    await with_client(server, lambda client: client.complete("Hi", constraint=constraint))
    found = engine.submitted[0].constraint
    assert type(found) is type(constraint)
    assert constraint is None or found.text == constraint.text


async def test_complete_returns_the_whole(server, engine):
    """complete gives text, finish and the settings in effect; settings of every type arrive."""
    completion = await with_client(
        server,
        lambda client: client.complete(
            [72, 105],
            temperature=0,
            stop=["x"],
            logit_bias={3: 1.0},
            time_limit=2.5,
            max_message_delay=0.01,
            request_id="mine",
            priority=2,
        ),
    )
    assert (completion.text, completion.start.request_id, completion.start.prompt_tokens) == (
        "Once upon a time",
        "mine",
        2,
    )
    [params] = engine.submitted
    assert (params.temperature, params.stop, params.logit_bias, params.time_limit, params.priority) == (
        0.0,
        ("x",),
        {3: 1.0},
        2.5,
        2,
    )


async def test_errors_name_the_field(server):
    """A refused request raises CallError with the code and the field."""
    with pytest.raises(CallError, match=r"INVALID_ARGUMENT: sampling\.top_p") as caught:
        await with_client(server, lambda client: client.complete("Hi", top_p=2.0))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(caught.value.fields) == {"sampling.top_p"}


async def test_an_unknown_setting_is_refused(server):
    """A misspelt setting is a TypeError before anything is sent."""
    with pytest.raises(TypeError, match="'temprature' is no setting"):
        await with_client(server, lambda client: client.complete("Hi", temprature=1.0))


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1.0, 1e300, 10**400])
async def test_a_time_that_is_none_is_refused_by_its_name(server, seconds):
    """Before anything is sent, in every argument that is a time, of both clients."""
    async with AsyncClient(server.address) as client:
        with Client(server.address) as sync:
            calls = {
                "time_limit": lambda: sync.generate("Hi", time_limit=seconds),
                "max_message_delay": lambda: client.generate("Hi", max_message_delay=seconds),
                "timeout": lambda: sync.generate("Hi", timeout=seconds),
                "interval": lambda: next(iter(sync.watch_load(seconds))),
                "seconds": lambda: sync.wait_ready(seconds),
            }
            for name, call in calls.items():
                with pytest.raises(InvalidRequestError, match=f"{name}: .* is no time to wait; give seconds, 0 to 1e"):
                    call()
        waits = {"seconds": client.wait_ready(seconds), "interval": anext(client.watch_load(seconds))}
        for name, waiting in waits.items():
            with pytest.raises(InvalidRequestError, match=name):
                await waiting


async def test_the_longest_times_are_carried(server):
    """A time limit is the server's to bound, a timeout of thirty years no trouble."""
    async with AsyncClient(server.address) as client:
        assert (await client.complete("Hi", timeout=1e9)).text == "Once upon a time"
    assert (await with_client(server, lambda sync: sync.complete("Hi", timeout=1e9))).text == "Once upon a time"


async def test_leaving_the_block_stops_the_work(server, engine):
    """A stream closed early aborts the request."""
    engine.held = True

    def use(client: Client) -> None:
        with client.generate("Hi", request_id="r"):
            while not engine.live:
                pass

    await with_client(server, use)
    await until(lambda: engine.aborted == ["r"])


async def test_other_calls(server):
    """Model, tokenizer, server and abort calls give plain values."""

    def use(client: Client) -> tuple[str, list[int], str, str, bool]:
        return (
            client.get_model().name,
            client.tokenize("Hi"),
            client.detokenize([72, 105]),
            client.get_server_info().model,
            client.abort("nobody"),
        )

    assert await with_client(server, use) == ("fake/model", [72, 105], "Hi", "fake/model", False)


async def test_wait_ready_outlasts_loading(loading_server, engine):
    """wait_ready returns once the model is loaded, and gives up with the server's own words."""
    async with AsyncClient(loading_server.address) as client:
        with pytest.raises(CallError, match="the model is loading") as caught:
            await client.wait_ready(0.1)
        assert caught.value.reason == "LOADING"
        assert caught.value.retry_after == 1.0
        waiting = asyncio.ensure_future(client.wait_ready(5))
        await loading_server.attach(engine)
        await waiting
    await with_client(loading_server, lambda sync: sync.wait_ready(5))


async def test_the_async_client_does_the_same(server, engine):
    """Every method of the async client, and its early end."""
    async with AsyncClient(server.address) as client:
        deltas = [delta async for delta in client.generate("Hi", logprobs=0)]
        assert "".join(delta.text for delta in deltas) == "Once upon a time"
        assert (await client.complete("Hi")).text == "Once upon a time"
        assert (await client.get_model()).name == "fake/model"
        assert await client.detokenize(await client.tokenize("Hi")) == "Hi"
        assert (await client.get_server_info()).model == "fake/model"
        assert not await client.abort("nobody")
        engine.held = True
        async with client.generate("Hi", request_id="r"):
            await until(lambda: engine.live)
        await until(lambda: engine.aborted == ["r"])
        with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
            await client.complete("Hi", timeout=0.05)


async def test_an_async_client_may_be_made_before_the_loop_runs(server):
    """At the top of a module, before asyncio.run, or on another thread: it opens its channel with its first call."""
    client = await asyncio.to_thread(AsyncClient, server.address)

    async def use() -> str:
        async with client:
            return (await client.complete("Hi")).text

    assert await asyncio.to_thread(asyncio.run, use()) == "Once upon a time"


async def test_an_async_client_on_two_loops_says_what_to_do(server):
    """Calls, streams and its end belong to the loop of the first call."""
    async with AsyncClient(server.address) as client:
        await client.get_model()

        async def use(method: Callable[[], object]) -> None:
            found = method()
            if asyncio.iscoroutine(found):
                await found

        for method in (client.get_model, lambda: client.generate("Hi"), client.close):
            with pytest.raises(RuntimeError, match="another event loop; make a client for each loop"):
                await asyncio.to_thread(asyncio.run, use(method))
        assert (await client.get_model()).name == "fake/model"


def test_an_async_client_without_a_loop():
    """A stream begins in a coroutine."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("127.0.0.1:1").generate("Hi")


def test_files_are_read_as_a_client_is_made(tmp_path):
    """Not with its first call."""
    for kind in (Client, AsyncClient):
        with pytest.raises(FileNotFoundError):
            kind("127.0.0.1:1", tls_ca=tmp_path / "none.pem")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "me.pem"}, "tls_cert, tls_key: one without the other"),
        ({"tls_ca": "ca.pem", "credentials": grpc.ssl_channel_credentials()}, "credentials: given together with TLS"),
        ({"token": "token\n"}, "token: empty, or not printable ASCII"),
        ({"token": ""}, "token: empty, or not printable ASCII"),
    ],
)
def test_settings_of_a_connection_that_contradict_each_other(settings, message):
    """They are refused before anything is sent."""
    with pytest.raises(ValueError, match=message):
        Client("127.0.0.1:1", **settings)
