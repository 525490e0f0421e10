"""A thin, typed client of the service, sync and async. Needs grpcio and protobuf only; loads neither torch nor numpy.

with Client("localhost:50051") as client:
    for delta in client.generate("Once upon a time", max_tokens=64):
        print(delta.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self, Unpack

import grpc
import grpc.aio

from hsrpc.client_channel import NO_RETRIES, Connection, FileName, Option
from hsrpc.client_messages import (
    CallError,
    Completion,
    Settings,
    call_errors,
    check_seconds,
    closing_call,
    generate_request,
    read_delta,
    tokenize_request,
    watch_load_request,
)
from hsrpc.client_proxy import Proxy, proxy_to
from hsrpc.prompt import Chat, Prompt, Text
from hsrpc.request import Delta
from hsrpc.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc, server_pb2, server_pb2_grpc

if TYPE_CHECKING:
    from hsrpc.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from hsrpc.v1.model_pb2_grpc import ModelServiceAsyncStub
    from hsrpc.v1.server_pb2_grpc import ServerServiceAsyncStub

__all__ = ["NO_RETRIES", "AsyncClient", "AsyncStream", "CallError", "Client", "Completion", "Settings", "Stream"]

_POLL_SECONDS = 0.2


class _Output:
    """What both streams do with the responses they get."""

    start: generation_pb2.Start | None = None
    """Facts about the prompt, and the settings in effect; there from the first delta on."""

    def _delta(self, response: generation_pb2.GenerateResponse) -> Delta:
        if response.HasField("start"):
            self.start = response.start
        return read_delta(response)

    def _completion(self, deltas: Sequence[Delta]) -> Completion:
        finish = deltas[-1].finish if deltas else None
        if self.start is None or finish is None:
            raise CallError(grpc.StatusCode.DATA_LOSS, "the stream ended before its last response")
        return Completion(
            start=self.start,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
            finish=finish,
            prompt_logprobs=tuple(logprob for delta in deltas for logprob in delta.prompt_logprobs),
        )


class _Call(Protocol):
    def __next__(self) -> generation_pb2.GenerateResponse: ...
    def cancel(self) -> object: ...


class Stream(_Output, Iterator[Delta]):
    """Deltas of one request as they come; the last one alone has `finish`. Closing it stops the work."""

    def __init__(self, call: _Call, proxy: Proxy | None) -> None:
        self._call = call
        self._proxy = proxy

    def __next__(self) -> Delta:
        with call_errors(self._proxy):
            return self._delta(next(self._call))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._call.cancel()


class AsyncStream(_Output, AsyncIterator[Delta]):
    """Deltas of one request as they come; the last one alone has `finish`. Closing it stops the work."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse],
        proxy: Proxy | None,
    ) -> None:
        self._call = call
        self._proxy = proxy
        self._responses = call.__aiter__()

    async def __anext__(self) -> Delta:
        with call_errors(self._proxy):
            return self._delta(await anext(self._responses))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._call.cancel()


class Client:
    """Calls a server from ordinary code; may be shared by threads."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        tls_ca: FileName | None = None,
        tls_cert: FileName | None = None,
        tls_key: FileName | None = None,
        options: Sequence[Option] = (),
    ) -> None:
        """`target` is host:port; `Connection` says what the others are. Without them nothing is encrypted.

        Raises:
            ValueError, OSError: the settings contradict each other; a file cannot be read.
        """
        connection = Connection(
            credentials=credentials, token=token, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, options=options
        )
        self._metadata = connection.metadata
        self._proxy = proxy_to(target)
        self._channel = connection.channel(target)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)
        self._server = server_pb2_grpc.ServerServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, prompt: Prompt, **settings: Unpack[Settings]) -> Stream:
        """Start a request with text, a Chat or token ids; iterating may raise CallError.

        Raises:
            TypeError, InvalidRequestError: a setting is unknown, or no time where it should be one.
        """
        request = generate_request(prompt, settings)
        call = self._generation.Generate(request, timeout=settings.get("timeout"), metadata=self._metadata)
        return Stream(call, self._proxy)

    def complete(self, prompt: Prompt, **settings: Unpack[Settings]) -> Completion:
        """The whole output.

        Raises:
            CallError: the call did not end well.
        """
        with self.generate(prompt, **settings) as stream:
            return stream._completion(list(stream))

    def abort(self, request_id: str) -> bool:
        """End a live request; False if there is none of that id."""
        request = generation_pb2.AbortRequest(request_id=request_id)
        with call_errors(self._proxy):
            return self._generation.Abort(request, metadata=self._metadata).aborted

    def get_model(self, model: str | None = None) -> model_pb2.GetModelResponse:
        with call_errors(self._proxy):
            return self._model.GetModel(model_pb2.GetModelRequest(model=model), metadata=self._metadata)

    def tokenize(self, prompt: str | Text | Chat) -> list[int]:
        """Token ids that a request with this prompt has."""
        with call_errors(self._proxy):
            return list(self._model.Tokenize(tokenize_request(prompt), metadata=self._metadata).token_ids)

    def render(self, chat: Chat) -> str:
        """The text that the model's template makes of `chat`."""
        with call_errors(self._proxy):
            return self._model.Tokenize(tokenize_request(chat), metadata=self._metadata).text

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        request = model_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        with call_errors(self._proxy):
            return self._model.Detokenize(request, metadata=self._metadata).text

    def get_server_info(self) -> server_pb2.GetServerInfoResponse:
        with call_errors(self._proxy):
            return self._server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=self._metadata)

    def watch_load(self, interval: float = 1.0) -> Iterator[server_pb2.WatchLoadResponse]:
        """The load, at once and then every `interval` seconds (0.1 or more), until the server drains.

        Raises:
            CallError: while iterating; the call did not end well.
            InvalidRequestError: likewise; the interval is no time.
        """
        call = self._server.WatchLoad(watch_load_request(interval), metadata=self._metadata)
        with call_errors(self._proxy), closing_call(call):
            yield from call

    def wait_ready(self, seconds: float) -> None:
        """Return once the server has loaded its model.

        Raises:
            CallError: it has not within that time.
            InvalidRequestError: the seconds are no time.
        """
        deadline = time.monotonic() + check_seconds("seconds", seconds)
        while True:
            try:
                self.get_model()
                return
            except CallError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)


class _AsyncStubs:
    """The services over a channel that belongs to the event loop on which it was opened."""

    def __init__(self, open_channel: Callable[[], grpc.aio.Channel]) -> None:
        self.loop = asyncio.get_running_loop()
        self.channel = channel = open_channel()
        self.generation: GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
        self.model: ModelServiceAsyncStub = model_pb2_grpc.ModelServiceStub(channel)
        self.server: ServerServiceAsyncStub = server_pb2_grpc.ServerServiceStub(channel)


class AsyncClient:
    """Calls a server from asyncio code. May be made anywhere; belongs to the event loop of its first call."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        tls_ca: FileName | None = None,
        tls_cert: FileName | None = None,
        tls_key: FileName | None = None,
        options: Sequence[Option] = (),
    ) -> None:
        """`target` is host:port; `Connection` says what the others are. Without them nothing is encrypted.

        Raises:
            ValueError, OSError: the settings contradict each other; a file cannot be read.
        """
        connection = Connection(
            credentials=credentials, token=token, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, options=options
        )
        self._metadata = connection.metadata
        self._proxy = proxy_to(target)
        self._open_channel = connection.aio_opener(target)
        self._opened: _AsyncStubs | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls; a later one fails."""
        await self._stubs.channel.close()

    @property
    def _stubs(self) -> _AsyncStubs:
        """Opened by the first call.

        Raises:
            RuntimeError: no event loop runs, or another than that of the first call.
        """
        if self._opened is None:
            self._opened = _AsyncStubs(self._open_channel)
        if self._opened.loop is not asyncio.get_running_loop():
            raise RuntimeError("AsyncClient: its first call was on another event loop; make a client for each loop")
        return self._opened

    def generate(self, prompt: Prompt, **settings: Unpack[Settings]) -> AsyncStream:
        """Start a request with text, a Chat or token ids; iterating may raise CallError.

        Raises:
            TypeError, InvalidRequestError: a setting is unknown, or no time where it should be one.
        """
        request = generate_request(prompt, settings)
        call = self._stubs.generation.Generate(request, timeout=settings.get("timeout"), metadata=self._metadata)
        return AsyncStream(call, self._proxy)

    async def complete(self, prompt: Prompt, **settings: Unpack[Settings]) -> Completion:
        """The whole output.

        Raises:
            CallError: the call did not end well.
        """
        async with self.generate(prompt, **settings) as stream:
            return stream._completion([delta async for delta in stream])

    async def abort(self, request_id: str) -> bool:
        """End a live request; False if there is none of that id."""
        request = generation_pb2.AbortRequest(request_id=request_id)
        with call_errors(self._proxy):
            return (await self._stubs.generation.Abort(request, metadata=self._metadata)).aborted

    async def get_model(self, model: str | None = None) -> model_pb2.GetModelResponse:
        with call_errors(self._proxy):
            return await self._stubs.model.GetModel(model_pb2.GetModelRequest(model=model), metadata=self._metadata)

    async def tokenize(self, prompt: str | Text | Chat) -> list[int]:
        """Token ids that a request with this prompt has."""
        return list((await self._tokenize(prompt)).token_ids)

    async def render(self, chat: Chat) -> str:
        """The text that the model's template makes of `chat`."""
        return (await self._tokenize(chat)).text

    async def _tokenize(self, prompt: str | Text | Chat) -> model_pb2.TokenizeResponse:
        with call_errors(self._proxy):
            return await self._stubs.model.Tokenize(tokenize_request(prompt), metadata=self._metadata)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        request = model_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        with call_errors(self._proxy):
            return (await self._stubs.model.Detokenize(request, metadata=self._metadata)).text

    async def get_server_info(self) -> server_pb2.GetServerInfoResponse:
        with call_errors(self._proxy):
            return await self._stubs.server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=self._metadata)

    async def watch_load(self, interval: float = 1.0) -> AsyncIterator[server_pb2.WatchLoadResponse]:
        """The load, at once and then every `interval` seconds (0.1 or more), until the server drains.

        Raises:
            CallError: while iterating; the call did not end well.
            InvalidRequestError: likewise; the interval is no time.
        """
        call = self._stubs.server.WatchLoad(watch_load_request(interval), metadata=self._metadata)
        with call_errors(self._proxy), closing_call(call):
            async for response in call:
                yield response

    async def wait_ready(self, seconds: float) -> None:
        """Return once the server has loaded its model.

        Raises:
            CallError: it has not within that time.
            InvalidRequestError: the seconds are no time.
        """
        deadline = time.monotonic() + check_seconds("seconds", seconds)
        while True:
            try:
                await self.get_model()
                return
            except CallError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_POLL_SECONDS)
