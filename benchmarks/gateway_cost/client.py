"""The other end, in a process of its own: reads streams by any door, and as little of each message as it can."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection

import grpc
import grpc.aio
from smg_grpc_proto import vllm_engine_pb2 as vllm

from hsrpc.client_channel import DIRECT
from hsrpc.v1 import generation_pb2 as v1

PROMPT = "Once upon a time there was"
MODEL = "stub"
_CHANNELS = 4


class Way(StrEnum):
    """The doors."""

    V1 = "hsrpc.v1"
    VLLM = "VllmEngine"
    OPENAI = "OpenAI port"


@dataclass(frozen=True, slots=True)
class Job:
    """Streams to read at once, to their end."""

    way: Way
    address: str
    streams: int
    tokens: int
    """Tokens that each stream asks for."""


@dataclass(frozen=True, slots=True)
class Received:
    """What came."""

    seconds: float
    tokens: int
    first: Sequence[float]
    """Seconds to the first token of each stream."""


def ask(client: Connection, job: Job) -> Received:
    """What the process behind `client` received; waits for it.

    Raises:
        RuntimeError: a stream did not end well.
    """
    client.send(job)
    answer = client.recv()
    if not isinstance(answer, Received):
        raise RuntimeError(f"a stream by {job.way} ended with {answer}")
    return answer


def answer_jobs(connection: Connection) -> None:
    """Do the jobs that come, until there is a None."""
    while (job := connection.recv()) is not None:
        try:
            connection.send(asyncio.run(_read_streams(job)))
        except (grpc.aio.AioRpcError, OSError, ValueError, IndexError) as error:
            connection.send(repr(error))


async def _read_streams(job: Job) -> Received:
    return await (_read_http(job) if job.way is Way.OPENAI else _read_grpc(job))


async def _read_grpc(job: Job) -> Received:
    options = [("grpc.use_local_subchannel_pool", 1), *DIRECT]
    channels = [grpc.aio.insecure_channel(job.address, options) for _ in range(min(_CHANNELS, job.streams))]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    method, request = _grpc_request(job)

    async def read(channel: grpc.aio.Channel) -> tuple[float, int]:
        began, first, last = time.monotonic(), 0.0, b""
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
        async for data in call(request):
            first, last = first or time.monotonic() - began, data
        return first, _grpc_tokens(job.way, last)

    began = time.monotonic()
    found = await asyncio.gather(*(read(channels[number % len(channels)]) for number in range(job.streams)))
    seconds = time.monotonic() - began
    await asyncio.gather(*(channel.close() for channel in channels))
    return Received(seconds, sum(tokens for _, tokens in found), [first for first, _ in found])


def _grpc_request(job: Job) -> tuple[str, bytes]:
    if job.way is Way.V1:
        request = v1.GenerateRequest(text=PROMPT, stopping=v1.Stopping(max_tokens=job.tokens))
        return "/hsrpc.v1.GenerationService/Generate", request.SerializeToString()
    params = vllm.SamplingParams(max_tokens=job.tokens)
    asked = vllm.GenerateRequest(text=PROMPT, sampling_params=params, stream=True)
    return "/vllm.grpc.engine.VllmEngine/Generate", asked.SerializeToString()


def _grpc_tokens(way: Way, last: bytes) -> int:
    """Tokens that a stream has brought, by its last message."""
    if way is Way.V1:
        return v1.GenerateResponse.FromString(last).finish.usage.completion_tokens
    return int(vllm.GenerateResponse.FromString(last).complete.completion_tokens)


async def _read_http(job: Job) -> Received:
    host, _, port = job.address.rpartition(":")
    ends = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(job.streams)))
    request = _http_request(job)

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[float, int]:
        began, first, usage = time.monotonic(), 0.0, b""
        writer.write(request)
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: "):
                first = first or (time.monotonic() - began if b'"text":""' not in line else 0.0)
                usage = line if b'"completion_tokens"' in line else usage
        writer.close()
        return first, int(json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])

    began = time.monotonic()
    found = await asyncio.gather(*(read(*each) for each in ends))
    return Received(time.monotonic() - began, sum(tokens for _, tokens in found), [first for first, _ in found])


def _http_request(job: Job) -> bytes:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": job.tokens, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {job.address}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
