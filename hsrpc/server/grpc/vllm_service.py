"""VllmEngine: the engine as gateways know it that bring other protocols to vLLM, such as smg."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

from google.protobuf.message import Message
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2

from hsrpc.request import TokenLogprob
from hsrpc.server.errors import NotSupportedError
from hsrpc.server.grpc.caller import client_name, current_caller
from hsrpc.server.grpc.handlers import MakeHandler, Write, streaming, unary
from hsrpc.server.grpc.sending import Sender
from hsrpc.server.grpc.vllm_messages import (
    chunk_message,
    complete_message,
    field_paths,
    input_logprobs_message,
    loads_message,
    model_message,
    read_submission,
    server_message,
)
from hsrpc.server.observation import CallObserver
from hsrpc.server.service import Service
from hsrpc.server.state import Phase
from hsrpc.server.stream import Stream

_TEXT_COMPLETION = "cmpl-"
"""How smg begins the ids of requests to /v1/completions, of which it encodes the prompts, which are texts, without the
special tokens that a prompt has."""
_CHUNK = 1024**2
"""Bytes of an archive in a message."""


class _Archive(NamedTuple):
    data: bytes
    sha256: str


class VllmEngine:
    """Methods of vllm.grpc.engine.VllmEngine; those that it lacks are UNIMPLEMENTED."""

    def __init__(self, service: Service, *, is_for_own_gateway: bool) -> None:
        """`is_for_own_gateway`: requests come by the server's own gateway alone, with the ids that it makes."""
        self._service = service
        self._is_for_own_gateway = is_for_own_gateway
        self._archive: asyncio.Task[_Archive] | None = None

    async def generate(self, request: vllm.GenerateRequest, write: Write[vllm.GenerateResponse]) -> None:
        """Send the token ids that continue the prompt; however this ends, the engine's work for it ends too."""
        with self._service.admit(None) as admitted:
            submission = read_submission(request, self._service.config)
            if self._is_for_own_gateway and request.request_id.startswith(_TEXT_COMPLETION):
                prompt = admitted.engine.tokenizer.with_special_tokens(request.tokenized.input_ids)
                submission = replace(submission, prompt=prompt)
            with field_paths():
                async with admitted.submit(submission, current_caller.get()) as stream:
                    await _send(stream, write, in_chunks=request.stream)

    async def abort(self, request: vllm.AbortRequest) -> vllm.AbortResponse:
        """End live requests of the client; ids of no live request are passed over."""
        for request_id in request.request_ids:
            self._service.abort(request_id, client_name.get())
        return vllm.AbortResponse()

    async def health_check(self, _: vllm.HealthCheckRequest) -> vllm.HealthCheckResponse:
        phase = self._service.state.phase
        return vllm.HealthCheckResponse(healthy=phase is Phase.SERVING, message=phase.value)

    async def get_model_info(self, _: vllm.GetModelInfoRequest) -> vllm.GetModelInfoResponse:
        engine = self._service.engine()
        return model_message(engine, self._service.model_names(engine)[0])

    async def get_server_info(self, _: vllm.GetServerInfoRequest) -> vllm.GetServerInfoResponse:
        is_draining = self._service.state.phase is Phase.DRAINING
        return server_message(self._service.engine(), self._service.uptime, is_draining=is_draining)

    async def get_loads(self, _: vllm.GetLoadsRequest) -> vllm.GetLoadsResponse:
        return loads_message(self._service.engine())

    async def get_tokenizer(
        self, _: common_pb2.GetTokenizerRequest, write: Write[common_pb2.GetTokenizerChunk]
    ) -> None:
        """Send the tokenizer's files as one zip archive, in pieces of which the last has its SHA-256."""
        if self._archive is None or (self._archive.done() and self._archive.exception()):
            self._archive = asyncio.create_task(self._make_archive())
        archive = await asyncio.shield(self._archive)
        for start in range(0, len(archive.data), _CHUNK):
            is_last = start + _CHUNK >= len(archive.data)
            sha256 = archive.sha256 if is_last else ""
            await write(common_pb2.GetTokenizerChunk(data=archive.data[start : start + _CHUNK], sha256=sha256))

    async def _make_archive(self) -> _Archive:
        files = await self._service.engine().tokenizer.files()
        if not files:
            raise NotSupportedError("GetTokenizer of a model without a tokenizer")
        return await asyncio.to_thread(_zip, files)


def vllm_methods(
    service: Service,
    sender: Sender,
    observers: Sequence[CallObserver],
    counters: Sequence[CallObserver],
    *,
    is_for_own_gateway: bool,
) -> dict[str, MakeHandler]:
    """Handlers of the methods, for the server's own gateway alone or for everybody."""
    engine = VllmEngine(service, is_for_own_gateway=is_for_own_gateway)
    return {
        "Generate": streaming(vllm.GenerateRequest, engine.generate, sender, [*counters, *observers]),
        "Abort": unary(vllm.AbortRequest, engine.abort, sender, counters),
        "HealthCheck": unary(vllm.HealthCheckRequest, engine.health_check, sender, counters),
        "GetModelInfo": unary(vllm.GetModelInfoRequest, engine.get_model_info, sender, counters),
        "GetServerInfo": unary(vllm.GetServerInfoRequest, engine.get_server_info, sender, counters),
        "GetLoads": unary(vllm.GetLoadsRequest, engine.get_loads, sender, counters),
        "GetTokenizer": streaming(common_pb2.GetTokenizerRequest, engine.get_tokenizer, sender, counters),
        "Embed": unary(vllm.EmbedRequest, _refuse, sender, counters),
        "FlushCache": unary(common_pb2.FlushCacheRequest, _refuse, sender, counters),
        "StartProfile": unary(common_pb2.StartProfileRequest, _refuse, sender, counters),
        "StopProfile": unary(common_pb2.StopProfileRequest, _refuse, sender, counters),
        "SubscribeKvEvents": streaming(common_pb2.SubscribeKvEventsRequest, _refuse, sender, counters),
    }


async def _refuse(request: Message, *_: object) -> NoReturn:
    raise NotSupportedError(request.DESCRIPTOR.name.removesuffix("Request"))


async def _send(stream: Stream, write: Write[vllm.GenerateResponse], *, in_chunks: bool) -> None:
    """Send the tokens as they come, and all of them at the end; what is told of the prompt goes with the first."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    of_prompt: list[TokenLogprob] | None = None if stream.params.prompt_logprobs is None else []
    async for delta in stream:
        token_ids += delta.token_ids
        if of_prompt is not None:
            of_prompt += delta.prompt_logprobs
        if not in_chunks:
            logprobs += delta.logprobs
        elif delta.token_ids:
            told, of_prompt = _input_logprobs(stream, of_prompt), None
            await stream.turn()
            await write(chunk_message(delta, len(stream.prompt_token_ids), told))
        if delta.finish is not None:
            await stream.turn()
            await write(complete_message(delta.finish, token_ids, logprobs, _input_logprobs(stream, of_prompt)))


def _input_logprobs(stream: Stream, of_prompt: Sequence[TokenLogprob] | None) -> vllm.InputLogProbs | None:
    return None if of_prompt is None else input_logprobs_message(stream.prompt_token_ids, of_prompt)


def _zip(files: Mapping[str, bytes]) -> _Archive:
    """The archive is the same whenever it is made."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return _Archive(data.getvalue(), hashlib.sha256(data.getvalue()).hexdigest())
