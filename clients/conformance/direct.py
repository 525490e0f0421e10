"""Direct calls of a server, by the generated stubs alone: what a client's results are compared with."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.json_format import ParseDict

from clients.conformance.result import Json, Logprob, Result
from hsrpc.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc, server_pb2, server_pb2_grpc

_POLL_SECONDS = 0.05
_CALL_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a server asks for; None: nothing."""

    ca: bytes | None = None
    key: bytes | None = None
    certificate: bytes | None = None
    token: str | None = None


class Direct:
    """A channel to one server."""

    def __init__(self, address: str, access: Access) -> None:
        options = [("grpc.enable_http_proxy", 0)]
        if access.ca is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            credentials = grpc.ssl_channel_credentials(access.ca, access.key, access.certificate)
            self._channel = grpc.secure_channel(address, credentials, options)
        self._metadata = (("authorization", f"Bearer {access.token}"),) if access.token else ()
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)
        self._server = server_pb2_grpc.ServerServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def wait_ready(self, seconds: float) -> None:
        """Return once the server has its model.

        Raises:
            TimeoutError: it has none in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self._model.GetModel(model_pb2.GetModelRequest(), metadata=self._metadata, timeout=_CALL_SECONDS)
                return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            time.sleep(_POLL_SECONDS)
        raise TimeoutError

    def tokenize(self, text: str) -> Sequence[int]:
        request = model_pb2.TokenizeRequest(text=text)
        return tuple(self._model.Tokenize(request, metadata=self._metadata, timeout=_CALL_SECONDS).token_ids)

    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and output together."""
        request = model_pb2.GetModelRequest()
        return self._model.GetModel(request, metadata=self._metadata, timeout=_CALL_SECONDS).max_model_len

    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        load = self._info().load
        return load.running_requests, load.queued_requests

    def num_generated_tokens(self) -> int:
        """Tokens generated since the server started."""
        return self._info().measured.generated_tokens

    def generate(self, request: Json) -> Result:
        """What a client must report of `request`."""
        message = ParseDict(request, generation_pb2.GenerateRequest())
        call = self._generation.Generate(message, metadata=self._metadata, timeout=_CALL_SECONDS)
        return _result(list(call))

    def generate_until(self, request: Json, over: threading.Event) -> None:
        """Make a call, and leave it once `over` is set; a refusal ends it too."""
        message = ParseDict(request, generation_pb2.GenerateRequest())
        call = self._generation.Generate(message, metadata=self._metadata, timeout=_CALL_SECONDS)
        try:
            while not over.is_set() and next(call, None) is not None:
                pass
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            time.sleep(_POLL_SECONDS)
        finally:
            call.cancel()

    def _info(self) -> server_pb2.GetServerInfoResponse:
        return self._server.GetServerInfo(
            server_pb2.GetServerInfoRequest(), metadata=self._metadata, timeout=_CALL_SECONDS
        )


def _result(responses: Sequence[generation_pb2.GenerateResponse]) -> Result:
    deltas = [response.delta for response in responses if response.HasField("delta")]
    finish = responses[-1].finish
    return Result(
        text="".join(delta.text for delta in deltas),
        deltas=len(deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(_logprob(each) for delta in deltas for each in delta.logprobs),
        prompt_tokens=finish.usage.prompt_tokens,
        completion_tokens=finish.usage.completion_tokens,
        finish_reason=generation_pb2.FinishReason.Name(finish.reason),
        stop_string=finish.stop_string if finish.HasField("stop_string") else None,
    )


def _logprob(message: generation_pb2.TokenLogprob) -> Logprob:
    top = tuple((each.token_id, each.logprob) for each in message.top)
    return Logprob(message.token_id, message.logprob, message.rank, top)
