"""VllmEngine: what gateways of vLLM ask for, over the same use case as hsrpc.v1."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from hsrpc.constraint import Choice, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.errors import (
    EngineUnavailableError,
    GaveWayError,
    NotFiniteError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestExistsError,
    RequestFailedError,
    WaitTooLongError,
)
from hsrpc.request import Delta, FinishReason, SamplingParams, TokenLogprob
from hsrpc.server import Server, ServerConfig
from hsrpc.server.grpc.messages import read_params as read_v1_params
from hsrpc.server.grpc.vllm_messages import loads_message, read_params
from hsrpc.server.state import Phase
from hsrpc.testing.fake_engine import USAGE, FakeEngine
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.server.conftest import until
from tests.server.grpc.test_status import details, failure, rich_status

SERVICE = "vllm.grpc.engine.VllmEngine"
IDS = [4, 5, 2, 5]
"""Ids of the fake engine's words."""


@pytest.fixture
async def loading_server() -> AsyncIterator[Server]:
    server = Server(ServerConfig(port=0, drain_timeout=5, vllm_engine=True))
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def engine_stub(server: Server, channel: grpc.aio.Channel) -> vllm_engine_pb2_grpc.VllmEngineStub:
    return vllm_engine_pb2_grpc.VllmEngineStub(channel)


def asked(*, stream: bool = False, request_id: str = "", **params: object) -> vllm.GenerateRequest:
    prompt = vllm.TokenizedInput(input_ids=[1, 2, 3])
    return vllm.GenerateRequest(
        request_id=request_id, tokenized=prompt, sampling_params=vllm.SamplingParams(**params), stream=stream
    )


async def answers(call: AsyncIterator[vllm.GenerateResponse]) -> list[vllm.GenerateResponse]:
    async with asyncio.timeout(10):
        return [response async for response in call]


async def refusal(stub: vllm_engine_pb2_grpc.VllmEngineStub, request: vllm.GenerateRequest) -> grpc.aio.AioRpcError:
    return await failure(stub.Generate(request))


async def test_all_tokens_at_the_end(engine_stub, engine):
    """Without `stream` one message has all of it, with the counts of the engine."""
    [answer] = await answers(engine_stub.Generate(asked(request_id="r", max_tokens=9)))
    complete = answer.complete
    assert (list(complete.output_ids), complete.finish_reason) == (IDS, "stop")
    assert (complete.prompt_tokens, complete.completion_tokens) == (USAGE.prompt_tokens, USAGE.completion_tokens)
    assert complete.WhichOneof("matched_stop") is None
    assert (engine.prompts, engine.submitted[0].max_tokens) == ([[1, 2, 3]], 9)


async def test_tokens_as_they_come(engine_stub, engine):
    """With `stream` each message has the new tokens and their number, and the last one all of them."""
    engine.held = True
    call = engine_stub.Generate(asked(request_id="r", stream=True))
    await until(lambda: engine.live)
    for word in ("a", "bb"):
        engine.say("r", word)
        chunk = (await call.read()).chunk
        assert (list(chunk.token_ids), chunk.prompt_tokens, chunk.completion_tokens) == ([len(word)], 3, 1)
    engine.end("r", FinishReason.MAX_TOKENS)
    complete = (await call.read()).complete
    assert (list(complete.output_ids), complete.finish_reason) == ([1, 2], "length")
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    ("reason", "matched", "found"),
    [
        (FinishReason.EOS, 2, ("stop", None)),
        (FinishReason.STOP_STRING, "\n", ("stop", "matched_stop_str")),
        (FinishReason.STOP_TOKEN, 5, ("stop", "matched_token_id")),
        (FinishReason.MAX_TOKENS, None, ("length", None)),
        (FinishReason.CONTEXT_LENGTH, None, ("length", None)),
        (FinishReason.TIME_LIMIT, None, ("length", None)),
        (FinishReason.ABORTED, None, ("abort", None)),
    ],
)
async def test_the_reason_of_the_end_is_a_word(engine_stub, engine, reason, matched, found):
    """One of four words, and what matched; the token that ends a text is no match, as vLLM has it."""
    engine.held = True
    call = engine_stub.Generate(asked(request_id="r"))
    await until(lambda: engine.live)
    engine.end("r", reason, matched)
    complete = (await call.read()).complete
    assert (complete.finish_reason, complete.WhichOneof("matched_stop")) == found
    assert found[1] is None or getattr(complete, found[1]) == matched


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_come_once(engine_stub, engine, stream):
    """Chosen tokens and the most probable ones, in the chunks where there are any and else at the end."""
    engine.held = True
    call = engine_stub.Generate(asked(request_id="r", logprobs=2, stream=stream))
    await until(lambda: engine.live)
    assert engine.submitted[0].logprobs == 2
    for token_id in (7, 8):
        logprob = TokenLogprob(token_id, -0.5, 2, ((9, -0.25), (token_id, -0.5)))
        engine.live["r"].put(Delta("x", (token_id,), (logprob,)))
    engine.end("r")
    *chunks, last = await answers(call)
    assert bool(chunks) == stream
    given = [chunk.chunk.output_logprobs for chunk in chunks] or [last.complete.output_logprobs]
    assert last.complete.HasField("output_logprobs") != stream
    assert [each for part in given for each in part.token_ids] == [7, 8]
    assert [each for part in given for each in part.token_logprobs] == [-0.5, -0.5]
    tops = [top for part in given for top in part.top_logprobs]
    assert [(list(top.token_ids), list(top.values)) for top in tops] == [
        ([9, 7], [-0.25, -0.5]),
        ([9, 8], [-0.25, -0.5]),
    ]


@pytest.mark.parametrize(("stream", "max_tokens"), [(False, 4), (True, 4), (False, 0), (True, 0)])
async def test_a_prompts_logprobs_come_once(engine_stub, engine, stream, max_tokens):
    """With the first chunk, else at the end; the first token has an entry without a value, as vLLM has it."""
    *chunks, last = await answers(engine_stub.Generate(asked(prompt_logprobs=2, stream=stream, max_tokens=max_tokens)))
    assert bool(chunks) == (stream and max_tokens > 0)
    given = [chunk.chunk for chunk in chunks] + [last.complete]
    assert [each.HasField("input_logprobs") for each in given] == [True] + [False] * len(chunks)
    found = given[0].input_logprobs
    assert list(found.token_ids) == [1, 2, 3]
    assert [each.HasField("value") for each in found.token_logprobs] == [False, True, True]
    assert [each.value for each in found.token_logprobs] == [0, -1, -2]
    assert [list(top.token_ids) for top in found.top_logprobs] == [[], [0, 1], [0, 1]]
    assert [list(top.values) for top in found.top_logprobs] == [[], [-1, -2], [-1, -2]]
    assert list(last.complete.output_ids) == (IDS if max_tokens else [])


FLOATS = st.decimals(0, 2, places=3).map(float)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": FLOATS,
        "top_p": st.decimals("0.01", 1, places=2).map(float),
        "min_p": st.decimals("0.01", 1, places=2).map(float),
        "top_k": st.integers(1, 2**31 - 1),
        "repetition_penalty": st.decimals("0.01", 2, places=2).map(float),
        "presence_penalty": FLOATS,
        "frequency_penalty": FLOATS,
        "seed": st.integers(0, 2**31 - 1),
        "logit_bias": st.dictionaries(st.integers(0, 99), FLOATS, max_size=3),
        "max_tokens": st.integers(100, 2**31 - 1),
        "min_tokens": st.integers(1, 100),
        "stop": st.lists(st.text(min_size=1, max_size=5), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 99), max_size=3),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 20),
        "prompt_logprobs": st.integers(0, 20),
    },
)
STOPPING = {"max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"}
OUTPUT = {"logprobs", "prompt_logprobs"}


@settings(max_examples=50, deadline=None)
@given(SETTINGS, st.booleans())
def test_settings_mean_what_they_mean_in_v1(asked, include_stop):
    """The same settings, to the last bit of what was written; without one, what a model has that has no own."""
    output = {name: value for name, value in asked.items() if name in OUTPUT}
    sampling = {name: value for name, value in asked.items() if name not in STOPPING | OUTPUT}
    stopping = {name: value for name, value in asked.items() if name in STOPPING}
    request = v1.GenerateRequest(
        sampling=v1.Sampling(**sampling),
        stopping=v1.Stopping(**stopping, include_stop=include_stop),
        output=v1.Output(**output),
    )
    given_here = vllm.SamplingParams(**asked, n=1, skip_special_tokens=True, include_stop_str_in_output=include_stop)
    assert read_params(given_here) == read_v1_params(request, SamplingParams())


def test_zero_is_no_setting_where_a_field_has_no_presence():
    """Not for the temperature, which says whether it is set; `top_k` of all tokens may be the largest number too."""
    assert read_params(vllm.SamplingParams(skip_special_tokens=True)) == SamplingParams()
    assert read_params(vllm.SamplingParams(temperature=0.0)).is_greedy
    assert read_params(vllm.SamplingParams(top_k=2**32 - 1)).top_k == 0


async def test_a_models_own_defaults_are_for_gateways_to_fill_in(engine_stub, engine):
    """What a request does not set does nothing, as it does in vLLM: how else could a client switch it off?"""
    engine.default_params = replace(SamplingParams(), temperature=0.6, top_k=20)
    await answers(engine_stub.Generate(asked()))
    assert (engine.submitted[0].temperature, engine.submitted[0].top_k) == (1.0, 0)


def others(kind: type, taken: set[str]) -> list[str]:
    return [field.name for field in kind.DESCRIPTOR.fields if field.name not in taken]


def with_value(kind: type, name: str) -> object:
    """A message in which a field is set, to nothing where that can be told from absence."""
    message, field = kind(), kind.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated:
        getattr(message, name).add()
    elif field.message_type:
        getattr(message, name).SetInParent()
    else:
        setattr(message, name, field.default_value if field.has_presence else type(field.default_value)(1))
    return message


REQUEST = {"request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"}
PARAMS = {"temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"}
PARAMS |= {"max_tokens", "min_tokens", "stop", "stop_token_ids", "skip_special_tokens", "ignore_eos", "n", "logprobs"}
PARAMS |= {"prompt_logprobs", "spaces_between_special_tokens", "seed", "include_stop_str_in_output", "logit_bias"}
PARAMS |= {"json_schema", "json_object", "regex", "grammar", "choice", "grammar_from_first_token"}


@pytest.mark.parametrize("name", others(vllm.GenerateRequest, REQUEST))
async def test_what_a_request_cannot_have_is_named(engine_stub, engine, name):
    """Every other field, whatever its value, is UNIMPLEMENTED and never passed over."""
    request = asked()
    request.MergeFrom(with_value(vllm.GenerateRequest, name))
    error = await refusal(engine_stub, request)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details(error, ErrorInfo).metadata["feature"] == name
    assert not engine.prompts


@pytest.mark.parametrize("name", others(vllm.SamplingParams, PARAMS))
async def test_what_no_setting_can_be_is_named(engine_stub, engine, name):
    """The same for settings: structural tags, truncation."""
    request = vllm.GenerateRequest(text="Hi", sampling_params=with_value(vllm.SamplingParams, name))
    error = await refusal(engine_stub, request)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details(error, ErrorInfo).metadata["feature"] == f"sampling_params.{name}"
    assert not engine.prompts


@pytest.mark.parametrize(
    ("given", "constraint"),
    [
        ({}, None),
        ({"json_schema": '{"type": "integer"}'}, JsonSchema('{"type": "integer"}')),
        ({"json_object": True}, JsonObject()),
        ({"json_object": False}, None),
        ({"regex": "a+"}, Regex("a+")),
        ({"grammar": 'root ::= "a"'}, Grammar('root ::= "a"')),
        ({"choice": vllm.ChoiceConstraint(choices=["a", "b"])}, Choice(("a", "b"))),
    ],
    ids=str,
)
async def test_a_constraint_is_the_engines(engine_stub, engine, given, constraint):
    """From the first token on, whether a gateway says so or not."""
    await answers(engine_stub.Generate(asked(**given, grammar_from_first_token=True)))
    assert engine.submitted[0].constraint == constraint


async def test_several_outputs_of_a_prompt_are_not_supported(engine_stub):
    """One, said or not, is what there is."""
    assert len(await answers(engine_stub.Generate(asked(n=1)))) == 1
    error = await refusal(engine_stub, asked(n=2))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "sampling_params.n of 2" in error.details()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (vllm.GenerateRequest(), "input"),
        (vllm.GenerateRequest(text=""), "text"),
        (vllm.GenerateRequest(tokenized=vllm.TokenizedInput()), "tokenized.input_ids"),
        (vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1] * 300)), "tokenized.input_ids"),
        (vllm.GenerateRequest(text="x" * 300), "text"),
        (asked(temperature=-1.0), "sampling_params.temperature"),
        (asked(top_p=1.5), "sampling_params.top_p"),
        (asked(top_k=2**31), "sampling_params.top_k"),
        (asked(seed=-1), "sampling_params.seed"),
        (asked(max_tokens=0), "sampling_params.max_tokens"),
        (asked(logprobs=-1), "sampling_params.logprobs"),
        (asked(prompt_logprobs=-1), "sampling_params.prompt_logprobs"),
        (asked(stop=["x"] * 17), "sampling_params.stop"),
        (asked(logit_bias={1: float("nan")}), "sampling_params.logit_bias[1]"),
        (asked(json_schema="{"), "sampling_params.json_schema"),
        (asked(regex=""), "sampling_params.regex"),
        (asked(grammar="x" * 131_073), "sampling_params.grammar"),
        (asked(choice=vllm.ChoiceConstraint(choices=["a", ""])), "sampling_params.choice.choices[1]"),
        (asked(choice=vllm.ChoiceConstraint(choices=["a"] * 1025)), "sampling_params.choice.choices"),
        (asked(request_id="a b"), "request_id"),
        (vllm.GenerateRequest(text="Hi", data_parallel_rank=1), "data_parallel_rank"),
    ],
)
async def test_a_wrong_field_is_named_by_its_path(engine_stub, engine, request_, field):
    """INVALID_ARGUMENT with the path in this message, and nothing is started."""
    error = await refusal(engine_stub, request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details(error, BadRequest).field_violations
    assert violation.field == field
    assert not engine.live


async def test_text_is_encoded_as_in_v1(engine_stub, engine):
    """A prompt of text is one, for whoever calls without a tokenizer of his own."""
    await answers(engine_stub.Generate(vllm.GenerateRequest(text="Hi")))
    assert engine.prompts[0].text == "Hi"


async def test_abort_ends_what_there_is(engine_stub, engine):
    """The live one ends with what it has; ids that nobody has are passed over, as those of calls that ended."""
    engine.held = True
    call = engine_stub.Generate(asked(request_id="r", stream=True))
    await until(lambda: engine.live)
    engine.say("r", "Once")
    await engine_stub.Abort(vllm.AbortRequest(request_ids=["gone", "r"]))
    assert (await answers(call))[-1].complete.finish_reason == "abort"


async def test_a_cancelled_call_ends_the_work(engine_stub, engine, server):
    """A stream that its gateway drops leaves nothing behind."""
    engine.held = True
    call = engine_stub.Generate(asked(request_id="r"))
    await until(lambda: engine.live)
    call.cancel()
    await until(lambda: engine.aborted == ["r"] and not server.state.live)


async def test_what_is_loaded(engine_stub, engine):
    """Names and sizes, none of them a path; the model's own defaults are those that differ from everybody's."""
    engine.default_params = replace(SamplingParams(), temperature=0.6, top_k=20)
    info = await engine_stub.GetModelInfo(vllm.GetModelInfoRequest())
    assert (info.served_model_name, info.model_path, info.tokenizer_path) == ("fake/model", "fake/model", "")
    assert (info.is_generation, info.supports_vision, info.model_type) == (True, False, "opt")
    assert (info.max_context_length, info.max_req_input_len, info.vocab_size) == (256, 255, 128)
    assert (list(info.eos_token_ids), info.bos_token_id, info.pad_token_id) == ([2], 1, 0)
    assert list(info.architectures) == ["OPTForCausalLM"]
    assert json.loads(info.default_sampling_params_json) == {"temperature": 0.6, "top_k": 20}
    engine.default_params = SamplingParams()
    assert not (await engine_stub.GetModelInfo(vllm.GetModelInfoRequest())).default_sampling_params_json


async def test_loads_are_the_schedulers(engine_stub, engine):
    """Requests, and the tokens that blocks in use have room for, of all that there are."""
    engine.held = True
    call = engine_stub.Generate(asked(request_id="r"))
    await until(lambda: engine.live)
    answer = await engine_stub.GetLoads(vllm.GetLoadsRequest(include=["core"]))
    [load] = answer.loads
    plan = engine.plan
    assert answer.dp_rank_count == 1
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (1, 1, 2)
    assert (load.max_running_requests, load.utilization) == (plan.max_batch, 1 / plan.max_batch)
    assert (load.num_used_tokens, load.num_waiting_uncached_tokens) == (3 * plan.block_size, 7)
    assert load.max_total_num_tokens == sum(plan.num_blocks.values()) * plan.block_size
    assert load.token_usage == 3 / sum(plan.num_blocks.values())
    assert load.gen_throughput == 10.0
    info = await engine_stub.GetServerInfo(vllm.GetServerInfoRequest())
    assert (info.active_requests, info.is_paused, info.max_num_seqs) == (2, False, plan.max_batch)
    call.cancel()


def test_the_load_of_several_gpus_is_that_of_all() -> None:
    """Blocks in use are, and so are those that there are."""
    engine = FakeEngine(num_gpus=2)
    [load] = loads_message(engine).loads
    blocks = 2 * sum(engine.plan.num_blocks.values())
    assert (load.max_total_num_tokens, load.token_usage) == (blocks * engine.plan.block_size, 6 / blocks)


async def test_the_tokenizers_files_come_as_an_archive(engine_stub):
    """In pieces, of which the last has the digest of all; the same whenever it is asked for."""
    archives = []
    for _ in range(2):
        chunks = [chunk async for chunk in engine_stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
        data = b"".join(chunk.data for chunk in chunks)
        assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
        archives.append(data)
    assert archives[0] == archives[1]
    assert zipfile.ZipFile(io.BytesIO(archives[0])).read("tokenizer.json") == b"{}"


async def test_a_model_without_a_tokenizer_has_no_archive(engine_stub, engine):
    """UNIMPLEMENTED, and asked again it is looked for again."""

    async def nothing() -> dict[str, bytes]:
        return {}

    files, engine.tokenizer.files = engine.tokenizer.files, nothing
    with pytest.raises(grpc.aio.AioRpcError, match="without a tokenizer"):
        await engine_stub.GetTokenizer(common_pb2.GetTokenizerRequest()).read()
    engine.tokenizer.files = files
    assert (await engine_stub.GetTokenizer(common_pb2.GetTokenizerRequest()).read()).data


@pytest.mark.parametrize("name", ["Embed", "FlushCache", "StartProfile", "StopProfile", "SubscribeKvEvents"])
async def test_methods_that_are_not_there_say_so(server, channel, name):
    """UNIMPLEMENTED, by its name."""
    call = channel.unary_stream(f"/{SERVICE}/{name}")(b"")
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert name in await call.details()


async def test_health_in_every_phase(loading_server, engine, channel):
    """By its own method, which gateways ask, and by the standard service, which probes ask for its name."""
    own, standard = vllm_engine_pb2_grpc.VllmEngineStub(channel), health_pb2_grpc.HealthStub(channel)

    async def health() -> tuple[bool, int]:
        answer = await own.HealthCheck(vllm.HealthCheckRequest())
        return answer.healthy, (await standard.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status

    assert await health() == (False, health_pb2.HealthCheckResponse.NOT_SERVING)
    await loading_server.attach(engine)
    assert await health() == (True, health_pb2.HealthCheckResponse.SERVING)
    await loading_server.drain()
    assert await health() == (False, health_pb2.HealthCheckResponse.NOT_SERVING)
    info = await own.GetServerInfo(vllm.GetServerInfoRequest())
    assert info.is_paused


async def test_nothing_of_it_is_there_unless_it_is_asked_for(engine):
    """No method and no name of a health check."""
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{SERVICE}/HealthCheck")(b"")
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
    await server.stop()


def told(error: grpc.aio.AioRpcError) -> tuple[object, ...]:
    """Status, words and details; the id of an error, which is another each time, left out."""
    infos = [ErrorInfo(), RetryInfo(), QuotaFailure(), BadRequest()]
    found = [info for detail in rich_status(error).details for info in infos if detail.Unpack(info)]
    for info in found:
        if isinstance(info, ErrorInfo):
            info.metadata.pop("error_id", None)
    return error.code(), re.sub("[0-9a-f]{32}", "ID", error.details()), [str(info) for info in found]


@pytest.mark.parametrize(
    ("refusal", "code", "words"),
    [
        (QueueFullError("1024 requests wait", 2.0), "RESOURCE_EXHAUSTED", "subject"),
        (GaveWayError("others wait too"), "RESOURCE_EXHAUSTED", "subject"),
        (WaitTooLongError("a minute"), "RESOURCE_EXHAUSTED", "subject"),
        (OutOfDeviceMemoryError("the step"), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICE_MEMORY"),
        (EngineUnavailableError("it stops"), "UNAVAILABLE", "retry_delay"),
        (RequestExistsError("r"), "ALREADY_EXISTS", "REQUEST_EXISTS"),
        (NotFiniteError("float16"), "INTERNAL", "NOT_FINITE"),
        (RequestFailedError("secret"), "INTERNAL", 'reason: "INTERNAL"'),
        (ValueError("secret"), "INTERNAL", 'reason: "INTERNAL"'),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_the_table_of_statuses_holds(engine_stub, channel, engine, refusal, code, words):
    """What a call fails with is the same as in hsrpc.v1, details and all."""
    engine.refusal = refusal
    here = told(await failure(engine_stub.Generate(asked())))
    generation = generation_pb2_grpc.GenerationServiceStub(channel)
    assert here == told(await failure(generation.Generate(v1.GenerateRequest(text="Hi"))))
    assert here[0] is grpc.StatusCode[code]
    assert any(words in detail for detail in here[2]), here
    assert "secret" not in str(here)


async def test_the_table_of_statuses_holds_in_every_phase(loading_server, engine, channel):
    """While loading and while draining, too."""
    stubs = vllm_engine_pb2_grpc.VllmEngineStub(channel), generation_pb2_grpc.GenerationServiceStub(channel)

    async def both() -> list[tuple[object, ...]]:
        requests = asked(), v1.GenerateRequest(text="Hi")
        return [told(await failure(stub.Generate(each))) for stub, each in zip(stubs, requests, strict=True)]

    here, there = await both()
    assert here == there
    assert (here[0], "LOADING" in str(here)) == (grpc.StatusCode.UNAVAILABLE, True)
    await loading_server.attach(engine)
    engine.held = True
    running = stubs[0].Generate(asked(request_id="r", stream=True))
    await until(lambda: engine.live)
    draining = asyncio.create_task(loading_server.drain())
    await until(lambda: loading_server.state.phase is Phase.DRAINING)
    here, there = await both()
    assert here == there
    assert (here[0], "DRAINING" in str(here)) == (grpc.StatusCode.UNAVAILABLE, True)
    engine.end("r")
    await answers(running)
    await draining
