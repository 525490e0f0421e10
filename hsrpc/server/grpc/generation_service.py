"""GenerationService: one request in, a stream of its output back."""

from __future__ import annotations

from hsrpc.prompt import Text
from hsrpc.server.grpc.caller import client_name, current_caller
from hsrpc.server.grpc.handlers import Write
from hsrpc.server.grpc.messages import add_delta, field_paths, model_of, read_submission, start_message
from hsrpc.server.service import Admitted, Service, Submission
from hsrpc.server.stream import Stream
from hsrpc.v1 import generation_pb2 as v1


class GenerationService:
    """Methods of hsrpc.v1.GenerationService."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def generate(self, request: v1.GenerateRequest, write: Write[v1.GenerateResponse]) -> None:
        """Send the continuation of the prompt; however this ends, the engine's work for it ends too."""
        with self._service.admit(model_of(request)) as admitted:
            submission = read_submission(request, self._service.config, admitted.engine.default_params)
            with field_paths():
                async with admitted.submit(submission, current_caller.get()) as stream:
                    first = await _first_response(admitted, stream, submission, request.output)
                    await _send(stream, first, request.output, write)

    async def abort(self, request: v1.AbortRequest) -> v1.AbortResponse:
        return v1.AbortResponse(aborted=self._service.abort(request.request_id, client_name.get()))


async def _first_response(
    admitted: Admitted, stream: Stream, submission: Submission, output: v1.Output
) -> v1.GenerateResponse:
    """The response that the first token will complete, so that headers are sent with it and not before."""
    response = v1.GenerateResponse(start=start_message(stream, admitted.model, output))
    if output.echo_prompt:
        prompt, skip, client = submission.prompt, stream.params.skip_special_tokens, current_caller.get().client
        decode = admitted.engine.tokenizer.decode
        echo = prompt.text if isinstance(prompt, Text) else await decode(stream.prompt_token_ids, client, skip)
        stream.lead_with(echo)
    return response


async def _send(
    stream: Stream, response: v1.GenerateResponse, output: v1.Output, write: Write[v1.GenerateResponse]
) -> None:
    async for delta in stream:
        if response.HasField("start"):
            response.start.cached_tokens = stream.cached_tokens
        add_delta(response, delta, output)
        if response.ByteSize():
            await stream.turn()
            sending = write(response)
            del delta, response  # a message takes several times its bytes, and its client may take long
            await sending
        response = v1.GenerateResponse()
