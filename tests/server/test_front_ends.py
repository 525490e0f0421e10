"""Another front end than gRPC's: all that one needs, in this file, over the same use case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from hsrpc.errors import QueueFullError
from hsrpc.prompt import Text
from hsrpc.request import Delta, FinishReason, SamplingParams
from hsrpc.server import ServerConfig
from hsrpc.server.caller import Caller
from hsrpc.server.failure import Failure, FieldViolation, Outcome, failure_of
from hsrpc.server.lifecycle import Health, Lifecycle
from hsrpc.server.observation import Arrival, CallObserver, ObservedCall, observed
from hsrpc.server.pacing import choose_pace
from hsrpc.server.service import Service, Submission
from hsrpc.testing.fake_engine import FakeEngine
from tests.server.conftest import until

ALICE, BOB = Caller("alice", "alice", 9.0), Caller("bob", "bob")


class RefusedError(Exception):
    """How this front end says a failure: as it is."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class LocalFrontEnd:
    """Functions for messages, exceptions for statuses; keeps a list of what probes would be told."""

    def __init__(self, service: Service, observers: list[CallObserver]) -> None:
        self._service = service
        self._observers = observers
        self.health: list[Health] = []
        self.attached: list[FakeEngine] = []
        self.is_ready = True
        self.listens = False

    async def start(self) -> None:
        self.listens = True

    async def attach(self, engine: FakeEngine) -> None:
        self.attached.append(engine)

    async def report(self, health: Health) -> None:
        self.health.append(health)

    async def stop(self, seconds: float) -> None:
        self.listens = False

    async def generate(self, caller: Caller, prompt: str, sent: list[Delta] | None = None, **asked) -> list[Delta]:
        """Deltas of at most two tokens, in `sent` as they come."""
        sent = [] if sent is None else sent
        with self._call("Generate", caller), self._service.admit(asked.pop("model", None)) as admitted:
            pace = choose_pace(self._service.config, asked.pop("max_tokens_per_message", 2), None)
            request_id = asked.pop("request_id", None)
            submission = Submission(prompt, SamplingParams(**asked), pace, request_id)
            async with admitted.submit(submission, caller) as stream:
                async for delta in stream:
                    await stream.turn()
                    sent.append(delta)
        return sent

    def abort(self, caller: Caller, request_id: str) -> bool:
        with self._call("Abort", caller):
            return self._service.abort(request_id, caller.name)

    async def tokenize(self, text: str, model: str | None = None) -> list[int]:
        with self._call("Tokenize", BOB):
            return (await self._service.tokenize(model, Text(text), BOB)).token_ids

    @contextmanager
    def _call(self, method: str, caller: Caller) -> Iterator[None]:
        with observed(Arrival(method, caller.client), self._observers) as call:
            try:
                yield
            except Exception as error:
                failure = failure_of(error, method)
                call.fail(failure, error)
                raise RefusedError(failure) from error


class Noted:
    """An observer that keeps the calls that ended."""

    def __init__(self) -> None:
        self.calls: list[ObservedCall] = []

    def started(self, call: ObservedCall) -> None:
        """Kept at its end."""

    def ended(self, call: ObservedCall) -> None:
        self.calls.append(call)


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def service() -> Service:
    return Service(ServerConfig(drain_timeout=0.1))


@pytest.fixture
def front_end(service: Service, noted: Noted) -> LocalFrontEnd:
    return LocalFrontEnd(service, [noted])


@pytest.fixture
async def lifecycle(service: Service, front_end: LocalFrontEnd, engine: FakeEngine) -> AsyncIterator[Lifecycle]:
    """Goes up, and down again after the test."""
    lifecycle = Lifecycle(service, [front_end])
    await lifecycle.start()
    await lifecycle.attach(engine)
    yield lifecycle
    await lifecycle.stop()


@pytest.fixture
def use(lifecycle: Lifecycle, front_end: LocalFrontEnd) -> LocalFrontEnd:
    """The front end of a server that serves."""
    return front_end


async def refusal(call: Awaitable[object]) -> Failure:
    with pytest.raises(RefusedError) as caught:
        await call
    return caught.value.failure


def refused(call: Callable[[], object]) -> Failure:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.failure


async def test_deltas_stream_cut_to_the_pace(use, engine, noted):
    """All the text, in pieces of the size that was asked for, and one finish; observers are told all of it."""
    deltas = await use.generate(ALICE, "Hi", request_id="r", max_tokens=7)
    assert "".join(delta.text for delta in deltas) == "Once upon a time"
    assert [len(delta.token_ids) for delta in deltas] == [2, 2]
    assert [delta.finish.reason if delta.finish else None for delta in deltas] == [None, FinishReason.EOS]
    assert (engine.clients, engine.max_waits) == (["alice"], [9.0])
    assert engine.submitted[0].max_tokens == 7
    [call] = noted.calls
    assert (call.arrival.client, call.request_id, call.outcome) == ("alice", "r", Outcome.OK)
    assert (call.model, call.prompt, call.completion_tokens) == ("fake/model", "Hi", 4)


async def test_a_stream_has_each_delta_as_it_comes(use, engine):
    """The first is there before the second is made."""
    engine.held = True
    sent: list[Delta] = []
    generating = asyncio.ensure_future(use.generate(ALICE, "Hi", sent, request_id="r"))
    await until(lambda: engine.live)
    for words in (["Once"], ["Once", " more"]):
        engine.say("r", words[-1])
        await until(lambda words=words: [delta.text for delta in sent] == words)
    engine.end("r")
    assert (await generating)[-1].finish is not None


async def test_a_full_queue_says_when_to_come_back(use, engine, noted):
    """The failure has the delay and what there is too much of, and none of the engine's words."""
    engine.refusal = QueueFullError("secret", retry_after=6.4)
    failure = await refusal(use.generate(ALICE, "Hi"))
    assert (failure.kind, failure.retry_delay) == (Outcome.RESOURCE_EXHAUSTED, 7)
    assert failure.quota is not None
    assert "secret" not in repr(failure)
    assert noted.calls[0].outcome is Outcome.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens_per_message": 0}, "max_tokens_per_message"),
        ({"request_id": "a b"}, "request_id"),
        ({"prompt": "x" * 300}, "text"),
    ],
)
async def test_a_bad_field_is_named(use, engine, asked, field):
    """Whether the settings, the pace, the service or the engine refuses it; nothing is started."""
    failure = await refusal(use.generate(ALICE, asked.pop("prompt", "Hi"), **asked))
    assert failure.kind is Outcome.INVALID_ARGUMENT
    assert isinstance(failure.violation, FieldViolation)
    assert failure.violation.field == field
    assert not engine.live


async def test_an_unknown_model_is_not_found(use, engine):
    """By name; the loaded one's name, or none, is found."""
    failure = await refusal(use.generate(ALICE, "Hi", model="other"))
    assert (failure.kind, failure.info.reason) == (Outcome.NOT_FOUND, "MODEL_NOT_FOUND")
    with pytest.raises(RefusedError):
        await use.tokenize("Hi", model="other")
    assert await use.tokenize("Hi", model="fake/model") == await use.tokenize("Hi") == [72, 105]
    assert not engine.submitted


async def test_only_the_owner_may_end_a_request(use, engine):
    """Another client is refused and ends nothing; the owner's stream ends with ABORTED."""
    engine.held = True
    reading = asyncio.ensure_future(use.generate(ALICE, "Hi", request_id="r"))
    await until(lambda: engine.live)
    failure = refused(lambda: use.abort(BOB, "r"))
    assert (failure.kind, failure.info.reason) == (Outcome.PERMISSION_DENIED, "NOT_OWNER")
    assert "r" in engine.live
    assert use.abort(ALICE, "r")
    assert (await reading)[-1].finish.reason is FinishReason.ABORTED
    assert not use.abort(BOB, "r")


async def test_a_cancelled_call_ends_its_request(use, engine, service, noted):
    """The engine's work stops, nobody owns the id any more, and observers hear of a cancelled call."""
    engine.held = True
    reading = asyncio.ensure_future(use.generate(ALICE, "Hi", request_id="r"))
    await until(lambda: engine.live)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert engine.aborted == ["r"]
    assert service.state.live == 0
    assert noted.calls[-1].outcome is Outcome.CANCELLED
    assert not use.abort(BOB, "r")


async def test_a_stream_without_an_end_is_a_failure(use, engine):
    """A generation that just stops never looks like a success."""
    engine.held = True
    reading = asyncio.ensure_future(refusal(use.generate(ALICE, "Hi", request_id="r")))
    await until(lambda: engine.live)
    engine.live["r"].close()
    assert (await reading).kind is Outcome.INTERNAL


async def test_it_goes_up_and_down_with_the_server(lifecycle, front_end, engine):
    """RefusedError while loading and draining; what is left when draining takes too long ends; probes are told."""
    other = LocalFrontEnd(Service(ServerConfig()), [])
    assert (await refusal(other.generate(ALICE, "Hi"))).info.reason == "LOADING"
    engine.held = True
    late = asyncio.ensure_future(refusal(front_end.generate(ALICE, "Hi", request_id="r")))
    await until(lambda: engine.live)
    await lifecycle.drain()
    assert (await asyncio.wait_for(late, 5)).info.reason == "DRAINING"
    assert (await refusal(front_end.generate(ALICE, "Hi"))).info.reason == "DRAINING"
    assert front_end.health == [Health.DOWN, Health.SERVING, Health.DOWN]
    assert front_end.listens
    await lifecycle.stop()
    assert not front_end.listens


async def test_a_server_is_ready_when_all_its_front_ends_are(service, engine):
    """Requests are taken all the same; each front end is told of the engine before it has to be ready."""
    one, two = LocalFrontEnd(service, []), LocalFrontEnd(service, [])
    two.is_ready = False
    lifecycle = Lifecycle(service, [one, two])
    await lifecycle.start()
    await lifecycle.attach(engine)
    assert (one.attached, two.attached) == ([engine], [engine])
    assert await one.generate(ALICE, "Hi")
    two.is_ready = True
    await lifecycle.report()
    two.is_ready = False
    await lifecycle.report()
    await lifecycle.stop()
    assert one.health == two.health == [Health.DOWN, Health.UNREADY, Health.SERVING, Health.UNREADY, Health.DOWN]


async def test_two_front_ends_share_owners_and_health(service, engine):
    """A request that came by one is live, and owned, for the other."""
    one, two = LocalFrontEnd(service, []), LocalFrontEnd(service, [])
    lifecycle = Lifecycle(service, [one, two])
    await lifecycle.start()
    await lifecycle.attach(engine)
    engine.held = True
    reading = asyncio.ensure_future(one.generate(ALICE, "Hi", request_id="r"))
    await until(lambda: engine.live)
    assert refused(lambda: two.abort(BOB, "r")).info.reason == "NOT_OWNER"
    assert (await refusal(two.generate(BOB, "Hi", request_id="r"))).kind is Outcome.ALREADY_EXISTS
    assert two.abort(ALICE, "r")
    assert (await reading)[-1].finish.reason is FinishReason.ABORTED
    await lifecycle.stop()
    assert one.health == two.health
