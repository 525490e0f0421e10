"""Bearer tokens: what needs one, and what is said without."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hsrpc.client import AsyncClient, CallError, Client
from hsrpc.server import reloaded_file
from hsrpc.server.grpc.caller import client_name
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1 import generation_pb2, model_pb2, server_pb2
from tests.server.secured import ALONE, Authority, name_of_model, plain, refusal, serving

ALICE, BOB = "alice-alice-alice-1", "bob-bob-bob-bob-bob+/="
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
SERVICES = [module.DESCRIPTOR.services_by_name for module in (generation_pb2, model_pb2, server_pb2)]
METHODS = [
    f"/{service.full_name}/{method.name}"
    for found in SERVICES
    for service in found.values()
    for method in service.methods
]


@pytest.fixture
def tokens(tmp_path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\nalice {ALICE}\n\nbob {BOB}\n")
    path.chmod(0o600)
    return path


async def test_a_known_token_lets_in(tokens):
    """Sync and async clients with a token of the file are answered."""
    async with serving(auth_tokens=tokens) as server:
        assert await name_of_model(server, token=ALICE) == "fake/model"
        assert await name_of_model(server, token=BOB) == "fake/model"


@pytest.mark.parametrize("token", [None, "carol-carol-carol-3", ALICE[:-1], ALICE + "x", "alice"])
async def test_any_other_is_refused(tokens, token):
    """Without a token, or with one that is not in the file, the answer is UNAUTHENTICATED and says what to send."""
    async with serving(auth_tokens=tokens) as server:
        error = await refusal(server, token=token)
    assert (error.code, error.reason) == (UNAUTHENTICATED, "UNAUTHENTICATED")
    assert error.message.startswith("the token is unknown; " if token else "no token; ")
    assert "authorization: Bearer TOKEN" in error.message
    assert (token or "alice") not in error.message


@pytest.mark.parametrize(
    "values", [[ALICE], [f"Basic {ALICE}"], ["Bearer"], ["Bearer "], [f"Bearer {ALICE}", f"Bearer {ALICE}"]]
)
async def test_other_headers_are_no_token(tokens, values):
    """Another scheme, no scheme, nothing after it, or two headers are no token."""
    metadata = [("authorization", value) for value in values]
    async with serving(auth_tokens=tokens) as server, plain(server) as channel:
        call = channel.unary_unary("/hsrpc.v1.ModelService/GetModel")(b"", metadata=metadata)
        assert await call.code() is UNAUTHENTICATED


async def test_the_scheme_is_written_in_any_case(tokens):
    """`bearer` and `BEARER` are Bearer."""
    async with serving(auth_tokens=tokens) as server, plain(server) as channel:
        for scheme in ("bearer", "BEARER"):
            metadata = [("authorization", f"{scheme} {ALICE}")]
            await channel.unary_unary("/hsrpc.v1.ModelService/GetModel")(b"", metadata=metadata)


@pytest.mark.parametrize(
    "method", [*METHODS, f"/{reflection.SERVICE_NAME}/ServerReflectionInfo", "/no.such.Service/Method"]
)
async def test_every_method_but_health_needs_a_token(tokens, method):
    """Services, reflection and methods that do not exist answer strangers alike, before they send anything."""
    async with serving(auth_tokens=tokens) as server, plain(server) as channel:
        assert await channel.stream_stream(method)(timeout=5).code() is UNAUTHENTICATED


async def test_health_needs_none(tokens):
    """Probes ask without a token."""
    async with serving(auth_tokens=tokens) as server, plain(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_services_know_whose_call_it_is(tokens):
    """client_name is the token's, for each call its own, and None where nobody need say who he is."""
    seen = []

    class Engine(FakeEngine):
        async def submit(self, *args, **settings):
            seen.append(client_name.get())
            return await super().submit(*args, **settings)

    async with serving(Engine(), auth_tokens=tokens) as server:
        for token in (ALICE, BOB):
            async with AsyncClient(server.address, token=token) as client:
                await client.complete("Hi")
    async with serving(Engine()) as server, AsyncClient(server.address) as client:
        await client.complete("Hi")
    assert seen == ["alice", "bob", None]


async def test_a_refused_request_costs_the_engine_nothing(tokens, engine):
    """The engine never hears of a request without a token."""
    async with serving(engine, auth_tokens=tokens) as server, AsyncClient(server.address) as client:
        with pytest.raises(CallError, match="UNAUTHENTICATED"):
            await client.complete("Hi")
    assert engine.submitted == []


async def test_the_file_is_read_again_when_it_changes(tokens, monkeypatch, caplog):
    """New tokens let in, removed ones no more; one with a mistake or without tokens changes nothing and is logged."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 0.0)
    async with serving(auth_tokens=tokens) as server:
        tokens.write_text("carol carol-carol-carol-3\n")
        assert await name_of_model(server, token="carol-carol-carol-3") == "fake/model"
        assert (await refusal(server, token=ALICE)).code is UNAUTHENTICATED
        tokens.write_text(f"alice {ALICE}\nnonsense {ALICE} {ALICE}\n")
        assert await name_of_model(server, token="carol-carol-carol-3") == "fake/model"
        assert (await refusal(server, token=ALICE)).code is UNAUTHENTICATED
        assert "what was read before stays" in caplog.text
        tokens.write_text("")
        assert await name_of_model(server, token="carol-carol-carol-3") == "fake/model"
    assert ALICE not in caplog.text


async def test_a_token_grants_a_priority(tokens, engine, monkeypatch):
    """Its line's max-priority counts instead of the server's, more urgent or less, and a change of it within a call."""
    monkeypatch.setattr(reloaded_file, "CHECK_SECONDS", 0.0)
    found = []
    async with serving(engine, auth_tokens=tokens) as server:
        for lines in ("alice {} max-priority=-20\nbob {} max-priority=0\n", "alice {} max-priority=-3\nbob {}\n"):
            tokens.write_text(lines.format(ALICE, BOB))
            for token in (ALICE, BOB):
                async with AsyncClient(server.address, token=token) as client:
                    found.append((await client.complete("Hi", priority=-1000)).start.priority)
    assert found == [-20, 0, -3, -8]


async def test_tokens_and_tls_go_together(tokens, tmp_path):
    """A client with both is answered, sync too; one that trusts the server and brings no token is not."""
    authority = Authority(tmp_path)
    async with serving(auth_tokens=tokens, **authority.issue()) as server:
        assert await name_of_model(server, tls_ca=authority.roots, token=BOB) == "fake/model"
        assert (await refusal(server, tls_ca=authority.roots)).code is UNAUTHENTICATED


async def test_the_sync_client_brings_its_token_everywhere(tokens):
    """Every method of the sync client works with a token."""

    def use(address: str) -> str:
        with Client(address, token=ALICE, options=ALONE) as client:
            client.get_model()
            client.get_server_info()
            client.abort("nobody")
            assert client.detokenize(client.tokenize("Hi")) == "Hi"
            return client.complete("Hi").text

    async with serving(auth_tokens=tokens) as server:
        assert await asyncio.to_thread(use, server.address) == "Once upon a time"


async def test_refusals_are_logged_in_few_lines(tokens, caplog):
    """A thousand refused calls are one line until some seconds have passed."""
    async with serving(auth_tokens=tokens) as server:
        for _ in range(5):
            await refusal(server)
    assert caplog.text.count("refused for want of a known token") == 1


async def test_the_prompts_of_others_are_not_found(tokens):
    """Who proves who he is has a share of his own, whatever salt he gives; others have that of their salt."""
    engine, salts = FakeEngine(), ("", "x", "bob")
    async with serving(engine, auth_tokens=tokens) as server:
        for token in (ALICE, BOB):
            async with AsyncClient(server.address, token=token) as client:
                for salt in salts:
                    await client.complete("Hi", cache_salt=salt)
    assert len(set(engine.salts)) == 6
    async with serving(engine) as server, AsyncClient(server.address) as client:
        for salt in salts:
            await client.complete("Hi", cache_salt=salt)
    assert engine.salts[6:] == list(salts)
    assert not set(engine.salts[:6]) & set(salts)
