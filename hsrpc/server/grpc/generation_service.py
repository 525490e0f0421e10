"""GenerationService: one request in, a stream of its output back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from hsrpc.errors import InvalidRequestError, RequestFailedError
from hsrpc.server.config import ServerConfig
from hsrpc.server.engine_protocol import Engine, Generation
from hsrpc.server.grpc.caller import client_name, current_caller
from hsrpc.server.grpc.handlers import Write
from hsrpc.server.grpc.messages import (
    OutputOptions,
    add_delta,
    check_request_id,
    read_output,
    read_params,
    read_prompt,
    read_request_id,
    start_message,
    with_path,
)
from hsrpc.server.grpc.model_service import check_model
from hsrpc.server.observation import note_generation, note_output
from hsrpc.server.owners import Owners
from hsrpc.server.pacing import MAX_DELAY, Timetable, Turns, split
from hsrpc.server.state import ServerState
from hsrpc.v1 import generation_pb2 as v1


class GenerationService:
    """Methods of hsrpc.v1.GenerationService."""

    def __init__(self, state: ServerState, config: ServerConfig) -> None:
        self._state = state
        self._config = config
        self._owners = Owners()
        self._turns = Turns()
        self._timetable = Timetable()

    async def generate(self, request: v1.GenerateRequest, write: Write[v1.GenerateResponse]) -> None:
        """Send the continuation of the prompt; however this ends, the engine's work for it ends too."""
        with self._state.admit() as engine:
            check_model(engine, request)
            options = read_output(request.output, self._config)
            generation = await _submit(engine, request)
            note_generation(generation, engine.spec.name, request.text)
            try:
                with self._owners.holding(generation.request_id, client_name.get()):
                    first = await _first_response(engine, generation, request, options)
                    await _send(generation, first, options, self._gather(generation, options), self._in_turn(write))
            finally:
                generation.close()

    def _in_turn(self, write: Write[v1.GenerateResponse]) -> Write[v1.GenerateResponse]:
        async def write_in_turn(message: v1.GenerateResponse) -> None:
            await self._turns.wait()
            await write(message)

        return write_in_turn

    def _gather(self, generation: Generation, options: OutputOptions) -> Callable[[], Awaitable[None]]:
        """Waits, after a message, until there should be another."""
        delay, most = options.max_message_delay, options.max_tokens_per_message
        if delay:
            return lambda: generation.gather(delay, most)
        return lambda: generation.gather(MAX_DELAY, most, self._timetable.delay(self._state.live))

    async def abort(self, request: v1.AbortRequest) -> v1.AbortResponse:
        request_id = check_request_id(request.request_id)
        self._owners.check(request_id, client_name.get())
        return v1.AbortResponse(aborted=self._state.engine.abort(request_id))


async def _submit(engine: Engine, request: v1.GenerateRequest) -> Generation:
    params, prompt, request_id = read_params(request), read_prompt(request), read_request_id(request)
    caller = current_caller.get()
    try:
        return await engine.submit(
            prompt, params, request_id=request_id, client=caller.client, max_wait=caller.time_remaining
        )
    except InvalidRequestError as error:
        raise with_path(error, request) from None


async def _first_response(
    engine: Engine, generation: Generation, request: v1.GenerateRequest, options: OutputOptions
) -> v1.GenerateResponse:
    """The response that the first token will complete, so that headers are sent with it and not before."""
    ids = generation.prompt_token_ids
    start = start_message(generation.request_id, engine.spec.name, ids, generation.params, options)
    response = v1.GenerateResponse(start=start)
    if options.echo_prompt:
        by_text = request.WhichOneof("input") == "text"
        response.delta.text = request.text if by_text else await engine.tokenizer.decode(list(ids))
    return response


async def _send(
    generation: Generation,
    response: v1.GenerateResponse,
    options: OutputOptions,
    gather: Callable[[], Awaitable[None]],
    write: Write[v1.GenerateResponse],
) -> None:
    async for portion in generation:
        note_output(portion)
        for delta in split(portion, options.max_tokens_per_message):
            add_delta(response, delta, options)
            if response.ByteSize():
                await write(response)
            if delta.finish:
                return
            response = v1.GenerateResponse()
        await gather()
    raise RequestFailedError(f"request {generation.request_id} ended without a finish")
