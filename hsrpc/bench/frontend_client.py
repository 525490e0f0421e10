"""The other end of measurements through gRPC, in a process of its own: reads streams as fast as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection

import grpc
import grpc.aio

from hsrpc.client_channel import DIRECT
from hsrpc.client_messages import Settings, generate_request
from hsrpc.errors import HsrpcError
from hsrpc.v1 import generation_pb2 as v1

_METHOD = "/hsrpc.v1.GenerationService/Generate"
_CHANNELS = 4


class ClientProcessError(HsrpcError):
    """The client's streams did not all end well."""


@dataclass(frozen=True, slots=True)
class Job:
    """Streams to read at once, to their end."""

    streams: int
    tokens: int
    """Output tokens of each stream."""
    settings: Settings
    prompts: Sequence[Sequence[int]] = ((1,),)
    """Token ids; the streams take them in turn."""


@dataclass(frozen=True, slots=True)
class Received:
    """What came over all streams."""

    messages: int
    tokens: int
    began: float
    """The first request, by `time.monotonic`, which the processes of a machine share."""
    ended: float
    """The end of the last stream, by the same clock."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def ask(client: Connection, job: Job) -> Received:
    """What the process behind `client`, which runs `answer_jobs`, received; waits for it.

    Raises:
        ClientProcessError: a stream ended with an error, or the process is gone.
    """
    try:
        client.send(job)
        answer = client.recv()
    except (EOFError, ConnectionError):
        raise ClientProcessError("the client process has ended; its messages are on standard error") from None
    if isinstance(answer, Received):
        return answer
    raise ClientProcessError(f"a stream of the client process ended with {answer}")


def answer_jobs(connection: Connection, address: str) -> None:
    """Do the jobs that come over `connection`, until it has a None. Answers with Received, or the error as text."""
    while (job := connection.recv()) is not None:
        try:
            connection.send(asyncio.run(_read_streams(job, address)))
        except grpc.aio.AioRpcError as error:
            connection.send(f"{error.code().name}: {error.details()}")


async def _read_streams(job: Job, address: str) -> Received:
    requests = [_request(job, prompt) for prompt in islice(cycle(job.prompts), job.streams)]
    options = [("grpc.use_local_subchannel_pool", 1), *DIRECT]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(min(_CHANNELS, job.streams))]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    began = time.monotonic()
    found = await asyncio.gather(*map(_read, cycle(channels), requests))
    ended = time.monotonic()
    await asyncio.gather(*(channel.close() for channel in channels))
    return Received(sum(messages for messages, _ in found), sum(tokens for _, tokens in found), began, ended)


def _request(job: Job, prompt: Sequence[int]) -> bytes:
    request = generate_request(prompt, {**job.settings, "max_tokens": job.tokens, "ignore_eos": True})
    return request.SerializeToString()


async def _read(channel: grpc.aio.Channel, request: bytes) -> tuple[int, int]:
    """Messages and tokens. Only the last message is parsed: this process must not be what is measured."""
    messages, last = 0, b""
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_METHOD)
    async for data in method(request):
        messages, last = messages + 1, data
    return messages, v1.GenerateResponse.FromString(last).finish.usage.completion_tokens
