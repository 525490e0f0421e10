"""What a Generate stream carries when all goes well."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from hsrpc import Engine, EngineConfig
from hsrpc.request import MAX_LOGPROBS, Delta, FinishReason, SamplingParams, TokenLogprob
from hsrpc.server import Server, ServerConfig
from hsrpc.server.config import MAX_MESSAGE_TEXT, MAX_MESSAGE_TOKENS
from hsrpc.server.grpc.messages import add_delta
from hsrpc.v1 import generation_pb2 as v1
from hsrpc.v1 import generation_pb2_grpc
from tests.server.conftest import until
from tests.server.secured import plain, serving


async def collect(stub, request):
    return [response async for response in stub.Generate(request)]


async def test_text_is_the_concatenation_of_the_deltas(stub):
    """The deltas' texts, one after the other, are the output."""
    responses = await collect(stub, v1.GenerateRequest(text="Hi"))
    assert "".join(response.delta.text for response in responses) == "Once upon a time"


async def test_start_is_first_and_finish_is_last(stub, engine):
    """The first response alone has start, the last one alone has finish."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    responses = []
    for word in ("a", "b", "c"):
        engine.say("r", word)
        responses.append(await call.read())
    engine.end("r")
    responses.append(await call.read())
    assert [response.HasField("start") for response in responses] == [True, False, False, False]
    assert [response.HasField("finish") for response in responses] == [False, False, False, True]
    assert [response.delta.text for response in responses] == ["a", "b", "c", ""]


async def test_start_has_the_prompts_facts_and_every_default(stub):
    """Settings left out come back with the values in effect."""
    start = (await collect(stub, v1.GenerateRequest(text="Hello")))[0].start
    assert (start.request_id, start.model, start.prompt_tokens, start.cached_tokens) == ("made-0", "fake/model", 5, 0)
    assert start.sampling.temperature == 1.0
    assert start.sampling.seed == 7
    assert start.stopping.max_tokens == 251
    assert start.output.HasField("echo_prompt")
    for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "seed"):
        assert start.sampling.HasField(name), name


async def test_the_model_has_the_defaults_of_sampling(engine, stub):
    """What a request leaves out is the model's own, and stands in Start; what it sets is its own, 0 too."""
    engine.default_params = SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.25)
    asked = v1.GenerateRequest(text="Hi", sampling=v1.Sampling(top_k=0))
    found = (await collect(stub, asked))[0].start.sampling
    assert (found.temperature, found.top_k, found.repetition_penalty) == (0.6, 0, 1.25)
    assert engine.submitted[-1].temperature == 0.6


async def test_the_operator_has_the_defaults_of_messages(engine):
    """What a request leaves out is as the server was told; what it sets, 0 too, is as it says. Both come back."""
    server = Server(ServerConfig(port=0, max_tokens_per_message=2, max_message_delay=0.02))
    await server.start()
    await server.attach(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        own = v1.Output(return_token_ids=True)
        responses = await collect(stub, v1.GenerateRequest(text="Hello", output=own))
        assert responses[0].start.output.max_tokens_per_message == 2
        assert responses[0].start.output.max_message_delay.ToMilliseconds() == 20
        assert max(len(response.delta.token_ids) for response in responses) <= 2
        asked = v1.Output(max_tokens_per_message=7, max_message_delay=Duration())
        start = (await collect(stub, v1.GenerateRequest(text="Hello", output=asked)))[0].start
        assert (start.output.max_tokens_per_message, start.output.max_message_delay.ToMilliseconds()) == (7, 0)
    await server.stop()


async def test_a_seed_of_zero_is_not_unset(stub):
    """The seed in effect is the one asked for, 0 too."""
    start = (await collect(stub, v1.GenerateRequest(text="Hi", sampling=v1.Sampling(seed=0))))[0].start
    assert (start.sampling.HasField("seed"), start.sampling.seed) == (True, 0)


async def test_max_tokens_in_effect_are_no_more_than_fit(stub):
    """Start has what the context leaves where more was asked for."""
    asked = v1.Stopping(max_tokens=2**31 - 1, min_tokens=300)
    stopping = (await collect(stub, v1.GenerateRequest(text="Hello", stopping=asked)))[0].start.stopping
    assert (stopping.max_tokens, stopping.min_tokens) == (251, 251)


async def test_zero_is_not_unset(stub, engine):
    """An explicit 0 reaches the engine, and comes back."""
    request = v1.GenerateRequest(text="Hi", sampling=v1.Sampling(temperature=0.0), output=v1.Output(logprobs=0))
    start = (await collect(stub, request))[0].start
    assert engine.submitted[0].temperature == 0.0
    assert engine.submitted[0].logprobs == 0
    assert (start.sampling.HasField("temperature"), start.sampling.temperature) == (True, 0.0)
    assert start.output.HasField("logprobs")


async def test_every_setting_reaches_the_engine_and_comes_back(stub, engine):
    """What the request sets is what the engine gets, and what start says."""
    sampling = v1.Sampling(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=11,
        logit_bias={5: -1.5},
    )
    stopping = v1.Stopping(
        max_tokens=9,
        min_tokens=2,
        stop=["x"],
        stop_token_ids=[3],
        ignore_eos=True,
        include_stop=True,
        time_limit=Duration(seconds=1, nanos=500_000_000),
    )
    request = v1.GenerateRequest(
        text="Hi", sampling=sampling, stopping=stopping, output=v1.Output(logprobs=2, prompt_logprobs=3), priority=-3
    )
    start = (await collect(stub, request))[0].start
    assert engine.submitted == [
        SamplingParams(
            temperature=0.7,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            seed=11,
            logit_bias={5: -1.5},
            max_tokens=9,
            min_tokens=2,
            stop=("x",),
            stop_token_ids=(3,),
            ignore_eos=True,
            include_stop=True,
            time_limit=1.5,
            logprobs=2,
            prompt_logprobs=3,
            priority=-3,
        )
    ]
    assert (start.sampling, start.stopping, start.priority) == (sampling, stopping, -3)
    assert (start.output.logprobs, start.output.prompt_logprobs) == (2, 3)


def test_messages_have_a_field_for_every_parameter():
    """Nothing that the engine can do is missing from the service, or the other way round."""
    fields = {name for message in (v1.Sampling, v1.Stopping) for name in message.DESCRIPTOR.fields_by_name} | {
        "logprobs",
        "prompt_logprobs",
        "priority",
        "constraint",
        "skip_special_tokens",
    }
    assert fields == set(SamplingParams.__dataclass_fields__)


async def test_headers_come_with_the_first_token(stub, engine):
    """Before the first token there are no headers, so a client may still retry."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    headers = asyncio.ensure_future(call.initial_metadata())
    await until(lambda: engine.live)
    await asyncio.sleep(0.05)
    assert not headers.done()
    engine.say("r", "a")
    await asyncio.wait_for(headers, 2)
    engine.end("r")
    assert (await call.read()).HasField("start")


async def test_token_ids_come_only_when_asked_for(stub):
    """Deltas carry token ids with return_token_ids, and not without."""
    without = await collect(stub, v1.GenerateRequest(text="Hi"))
    asked = await collect(stub, v1.GenerateRequest(text="Hi", output=v1.Output(return_token_ids=True)))
    assert [token_id for response in without for token_id in response.delta.token_ids] == []
    assert [token_id for response in asked for token_id in response.delta.token_ids] == [4, 5, 2, 5]


async def test_a_prompts_logprobs_come_before_the_output(stub, engine):
    """In order, at most as many in a message as it may have tokens, with rank and alternatives."""
    engine.held = True
    output = v1.Output(prompt_logprobs=1, max_tokens_per_message=4, echo_prompt=True, return_token_ids=True)
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hello world", output=output))
    await until(lambda: engine.live)
    engine.say("r", "a")
    engine.end("r")
    found = [response async for response in call]
    scored = [logprob for response in found for logprob in response.delta.prompt_logprobs]
    assert [each.token_id for each in scored] == list(b"ello world")
    assert [(each.logprob, each.rank) for each in scored] == [(-float(place), place) for place in range(1, 11)]
    assert all([(top.token_id, top.logprob) for top in each.top] == [(0, -1.0)] for each in scored)
    assert [len(response.delta.prompt_logprobs) for response in found if response.delta.prompt_logprobs] == [4, 4, 2]
    assert [list(response.delta.token_ids) for response in found[:2] + found[-1:]] == [[], [], [1]]
    assert not any(response.delta.prompt_logprobs for response in found[3:])
    assert found[0].HasField("start")
    assert "".join(response.delta.text for response in found) == "Hello worlda"


async def test_a_prompt_is_scored_without_output(stub, engine):
    """0 of max_tokens is in effect, and not unset; a prompt of one token has nothing to score."""
    for text, count in (("Hi", 1), ("H", 0)):
        request = v1.GenerateRequest(text=text, stopping=v1.Stopping(max_tokens=0), output=v1.Output(prompt_logprobs=0))
        found = await collect(stub, request)
        assert engine.submitted[-1].only_scores
        assert (found[0].start.stopping.HasField("max_tokens"), found[0].start.stopping.max_tokens) == (True, 0)
        assert sum(len(response.delta.prompt_logprobs) for response in found) == count
        assert not any(response.delta.text for response in found)


async def test_logprobs_come_with_rank_and_alternatives(stub, engine):
    """A token's logprob, its rank and the most probable tokens arrive as the engine gave them."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi", output=v1.Output(logprobs=2)))
    await until(lambda: engine.live)
    engine.live["r"].put(Delta("a", (1,), (TokenLogprob(1, -0.5, 2, ((9, -0.25), (1, -0.5))),)))
    engine.end("r")
    [logprob] = (await call.read()).delta.logprobs
    assert (logprob.token_id, logprob.logprob, logprob.rank) == (1, -0.5, 2)
    assert [(top.token_id, top.logprob) for top in logprob.top] == [(9, -0.25), (1, -0.5)]


@pytest.mark.parametrize(
    "prompt", [{"text": "Hey. "}, {"token_ids": v1.TokenIds(ids=map(ord, "Hey. "))}], ids=["text", "token_ids"]
)
async def test_echo_puts_the_prompt_before_the_text(stub, prompt):
    """With echo_prompt the text starts with the prompt's."""
    responses = await collect(stub, v1.GenerateRequest(**prompt, output=v1.Output(echo_prompt=True)))
    assert "".join(response.delta.text for response in responses) == "Hey. Once upon a time"


async def test_token_ids_are_taken_as_they_are(stub):
    """A prompt of token ids is not tokenized again."""
    [first, *_] = await collect(stub, v1.GenerateRequest(token_ids=v1.TokenIds(ids=[1, 2, 3])))
    assert first.start.prompt_tokens == 3


async def test_messages_split_at_the_bound_on_tokens(stub):
    """No delta has more tokens than max_tokens_per_message, and nothing is lost."""
    output = v1.Output(return_token_ids=True, max_tokens_per_message=3)
    responses = await collect(stub, v1.GenerateRequest(text="Hi", output=output))
    assert [list(response.delta.token_ids) for response in responses] == [[4, 5, 2], [5]]
    assert "".join(response.delta.text for response in responses) == "Once upon a time"
    assert [response.HasField("finish") for response in responses] == [False, True]


async def test_delay_merges_all_but_the_first_token(stub, engine):
    """Tokens wait for others up to max_message_delay; the first is sent at once, the finish ends the wait."""
    engine.held = True
    output = v1.Output(max_message_delay=Duration(seconds=30))
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi", output=output))
    await until(lambda: engine.live)
    engine.say("r", "a")
    assert (await asyncio.wait_for(call.read(), 2)).delta.text == "a"
    for word in ("b", "c", "d"):
        engine.say("r", word)
        await asyncio.sleep(0.01)
    engine.end("r")
    last = await asyncio.wait_for(call.read(), 2)
    assert last.delta.text == "bcd"
    assert last.HasField("finish")


async def test_delay_ends_when_it_has_passed_or_enough_tokens_came(stub, engine):
    """A portion is sent after max_message_delay, or sooner with max_tokens_per_message tokens."""
    engine.held = True
    output = v1.Output(max_message_delay=Duration(nanos=600_000_000), max_tokens_per_message=2)
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi", output=output))
    await until(lambda: engine.live)
    texts = []
    for word in ("a", "b", "c", "d"):
        engine.say("r", word)
        await asyncio.sleep(0.01)
    texts = [(await call.read()).delta.text, (await asyncio.wait_for(call.read(), 0.4)).delta.text]
    texts.append((await asyncio.wait_for(call.read(), 2)).delta.text)
    engine.end("r")
    assert texts == ["a", "bc", "d"]


@pytest.mark.parametrize("reason", FinishReason)
async def test_every_reason_has_its_enum_value(stub, engine, reason):
    """The finish names the engine's reason, usage and timings."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    engine.end("r", reason)
    finish = (await call.read()).finish
    assert v1.FinishReason.Name(finish.reason) == f"FINISH_REASON_{reason.value}"
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens, finish.usage.preemptions) == (3, 4, 1)
    assert (finish.timings.queue.nanos, finish.timings.decode.seconds) == (500_000_000, 2)


@pytest.mark.parametrize(
    ("reason", "matched", "field"),
    [(FinishReason.STOP_STRING, "end", "stop_string"), (FinishReason.STOP_TOKEN, 0, "stop_token_id")],
)
async def test_finish_says_what_matched(stub, engine, reason, matched, field):
    """A stop string or stop token comes back, token 0 too."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    engine.end("r", reason, matched)
    finish = (await call.read()).finish
    assert finish.WhichOneof("matched") == field
    assert getattr(finish, field) == matched


async def test_abort_ends_the_stream_with_ok(stub, engine):
    """Abort says whether there was something to end; the call itself ends with ABORTED and its text."""
    engine.held = True
    call = stub.Generate(v1.GenerateRequest(request_id="r", text="Hi"))
    await until(lambda: engine.live)
    engine.say("r", "a")
    assert (await stub.Abort(v1.AbortRequest(request_id="r"))).aborted
    responses = [response async for response in call]
    assert "".join(response.delta.text for response in responses) == "a"
    assert responses[-1].finish.reason == v1.FINISH_REASON_ABORTED
    assert not (await stub.Abort(v1.AbortRequest(request_id="r"))).aborted


async def test_text_beyond_the_clients_limit_comes_in_messages_within_it(stub, engine):
    """Output that has gathered, and an echoed prompt: by default a client takes no message over 4 MiB."""
    engine.held, engine.max_model_len = True, 2**23
    prompt, output = "p" * (4 * 2**20 - 100), "\N{GRINNING FACE}" * 2**20 + "!"
    call = stub.Generate(v1.GenerateRequest(request_id="r", text=prompt, output=v1.Output(echo_prompt=True)))
    await until(lambda: engine.live)
    engine.live["r"].put(Delta(output, (1,)))
    engine.end("r")
    responses = [response async for response in call]
    assert "".join(response.delta.text for response in responses) == prompt + output
    assert [response.HasField("finish") for response in responses] == [False] * (len(responses) - 1) + [True]


def test_the_largest_message_is_half_of_the_clients_limit():
    """As many tokens as may be, each with as many logprobs, and text of the longest characters."""
    largest = 2**31 - 1
    logprob = TokenLogprob(largest, -1.0, largest, ((largest, -1.0),) * MAX_LOGPROBS)
    size = MAX_MESSAGE_TOKENS
    text = "\N{GRINNING FACE}" * MAX_MESSAGE_TEXT
    response = v1.GenerateResponse()
    add_delta(response, Delta(text, (largest,) * size, (logprob,) * size), v1.Output(return_token_ids=True))
    assert response.ByteSize() < 2 * 2**20


async def test_start_and_usage_say_what_was_found():
    """A prompt that was asked for before, on a real engine."""
    request = v1.GenerateRequest(text="Once upon a time, there was a small cat named Arlo. " * 2)
    request.stopping.max_tokens = 2
    async with Engine(EngineConfig(device="cpu")) as engine, serving(engine) as server, plain(server) as channel:
        stub, found = generation_pb2_grpc.GenerationServiceStub(channel), []
        for _ in range(2):
            responses = await collect(stub, request)
            found.append((responses[0].start.cached_tokens, responses[-1].finish.usage.cached_tokens))
    assert found[0] == (0, 0)
    assert 0 < found[1][0] == found[1][1] < responses[0].start.prompt_tokens


@pytest.mark.parametrize("salt", ["x" * 257, "é" * 129])
async def test_a_salt_is_short(stub, salt):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await collect(stub, v1.GenerateRequest(text="Hi", cache_salt=salt))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "cache_salt" in (raised.value.details() or "")
