"""Request ids: which are taken, and whose requests may be ended."""

from __future__ import annotations

import grpc
import pytest

from hsrpc.client import AsyncClient, CallError
from tests.server.conftest import until
from tests.server.secured import serving

ALICE, BOB = "alice-alice-alice-1", "bob-bob-bob-bob-bob"


@pytest.mark.parametrize("request_id", ["a b", "a\nb", "a/b", "é", "<b>", "a\x00", "a" * 129, ""])
async def test_ids_that_cannot_stand_in_a_log_are_refused(server, engine, request_id):
    """INVALID_ARGUMENT for request_id, of Generate and of Abort, before any work."""
    async with AsyncClient(server.address) as client:
        for call in (client.complete("Hi", request_id=request_id), client.abort(request_id)):
            with pytest.raises(CallError) as caught:
                await call
            assert (caught.value.code, set(caught.value.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, {"request_id"})
    assert engine.submitted == []


@pytest.mark.parametrize("request_id", ["a", "0", "5f0c2f2e-1f7b-4c3e-9d3a-3f1b0a", "user:7_b.c", "a" * 128])
async def test_ids_in_common_use_are_taken(server, request_id):
    """UUIDs and names with separators are ids."""
    async with AsyncClient(server.address) as client:
        assert (await client.complete("Hi", request_id=request_id)).start.request_id == request_id


async def test_a_client_ends_only_its_own_requests(tmp_path, engine):
    """Abort of another client's request is PERMISSION_DENIED and ends nothing; of one's own it works."""
    engine.held = True
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {ALICE}\nbob {BOB}\n")
    tokens.chmod(0o600)
    async with (
        serving(engine, auth_tokens=tokens) as server,
        AsyncClient(server.address, token=ALICE) as alice,
        AsyncClient(server.address, token=BOB) as bob,
    ):
        stream = alice.generate("Hi", request_id="r")
        await until(lambda: "r" in engine.live)
        with pytest.raises(CallError) as caught:
            await bob.abort("r")
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_OWNER")
        assert "r" in engine.live
        assert not await bob.abort("nobody")
        assert await alice.abort("r")
        assert [delta async for delta in stream][-1].finish
        assert not await bob.abort("r")
