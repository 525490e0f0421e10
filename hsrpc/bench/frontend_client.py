"""The other end of the front-end measurement, in a process of its own: reads streams as fast as they come."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import grpc.aio

from hsrpc.client_messages import Settings, generate_request
from hsrpc.v1 import generation_pb2 as v1

_METHOD = "/hsrpc.v1.GenerationService/Generate"
_CHANNELS = 4


@dataclass(frozen=True, slots=True)
class Job:
    """Streams to read at once, to their end."""

    streams: int
    tokens: int
    """Of each stream."""
    settings: Settings


@dataclass(frozen=True, slots=True)
class Received:
    """What came over all streams."""

    messages: int
    tokens: int
    seconds: float


def answer_jobs(connection: Connection, address: str) -> None:
    """Do the jobs that come over `connection`, until it has a None."""
    while (job := connection.recv()) is not None:
        connection.send(asyncio.run(_read_streams(job, address)))


async def _read_streams(job: Job, address: str) -> Received:
    request = generate_request([1], {**job.settings, "max_tokens": job.tokens, "ignore_eos": True})
    data = request.SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(min(_CHANNELS, job.streams))]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    started = time.perf_counter()
    found = await asyncio.gather(*(_read(channels[i % len(channels)], data) for i in range(job.streams)))
    seconds = time.perf_counter() - started
    await asyncio.gather(*(channel.close() for channel in channels))
    return Received(sum(messages for messages, _ in found), sum(tokens for _, tokens in found), seconds)


async def _read(channel: grpc.aio.Channel, request: bytes) -> tuple[int, int]:
    """Messages and tokens. Only the last message is parsed: this process must not be what is measured."""
    messages, last = 0, b""
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_METHOD)
    async for data in method(request):
        messages, last = messages + 1, data
    return messages, v1.GenerateResponse.FromString(last).finish.usage.completion_tokens
