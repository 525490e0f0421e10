"""ModelService and ServerService."""

from __future__ import annotations

import grpc
import pytest

from hsrpc import __version__
from hsrpc.client import AsyncClient, CallError
from hsrpc.errors import ConfigError
from hsrpc.request import SamplingParams
from hsrpc.server import Server, ServerConfig
from hsrpc.testing.fake_engine import FakeEngine
from hsrpc.v1 import model_pb2, model_pb2_grpc, server_pb2, server_pb2_grpc


@pytest.fixture
def model(server, channel):
    return model_pb2_grpc.ModelServiceStub(channel)


async def test_get_model_has_sizes_and_cache_decision(model, engine):
    """GetModel says what is loaded, its sizes, and what is cached and why."""
    answer = await model.GetModel(model_pb2.GetModelRequest())
    assert (answer.name, answer.family, answer.context_length, answer.max_model_len) == ("fake/model", "opt", 512, 256)
    assert list(answer.eos_token_ids) == [2]
    assert (answer.sizes.num_layers, answer.sizes.vocab_size, answer.sizes.element_bytes) == (2, 128, 4)
    assert not answer.sizes.HasField("sliding_window")
    assert (answer.cache.policy, answer.cache.activation_share, answer.cache.activation_ratio) == ("hybrid", 0.5, 2.0)
    assert answer.cache.explanation == engine.plan.reason


async def test_tokenize_and_detokenize_are_inverse(model):
    """Text to ids and back; empty text has no ids."""
    ids = (await model.Tokenize(model_pb2.TokenizeRequest(text="Hi you"))).token_ids
    assert list(ids) == list(map(ord, "Hi you"))
    assert (await model.Detokenize(model_pb2.DetokenizeRequest(token_ids=ids))).text == "Hi you"
    assert list((await model.Tokenize(model_pb2.TokenizeRequest())).token_ids) == []


@pytest.mark.parametrize("token_id", [-1, 128])
async def test_detokenize_refuses_ids_outside_the_vocabulary(model, token_id):
    """An id that is no token is INVALID_ARGUMENT, with its place in the list."""
    with pytest.raises(grpc.aio.AioRpcError, match=r"token_ids\[1\]") as caught:
        await model.Detokenize(model_pb2.DetokenizeRequest(token_ids=[1, token_id]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_server_info_has_plan_and_measurements(server, channel, engine):
    """The plan with its prediction stands beside what was measured since."""
    info = await server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
    assert (info.version, info.model, info.device) == (__version__, "fake/model", "cpu")
    assert info.plan.activation_share == 0.5
    assert info.plan.device_memory_bytes == 64 * 1024**2
    assert info.plan.predicted_tokens_per_second == engine.plan.prediction.tokens_per_second
    assert info.measured.step_time.ToTimedelta().total_seconds() == 0.5
    assert info.measured.tokens_per_second == 10.0
    assert (info.load.queued_requests, info.load.running_requests) == (1, 0)
    used = {(use.kind, use.tier): use.used for use in info.load.blocks}
    assert used[server_pb2.BLOCK_KIND_KV, server_pb2.BLOCK_TIER_HOST] == 3
    assert len(used) == 4


async def test_each_gpu_is_told_beside_the_sums():
    """By its number: what it is, what runs there, what it moved; a reader that knows one GPU sees totals as before."""
    engine = FakeEngine(held=True, num_gpus=2)
    await engine.submit("Hi", SamplingParams(), request_id="r")
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(engine)
    async with AsyncClient(server.address) as client:
        info = await client.get_server_info()
    await server.stop()
    plan, load, measured = engine.plan, info.load, info.measured
    assert [(gpu.gpu, gpu.name, gpu.load_bytes_per_second) for gpu in info.gpus] == [
        (0, "none", 5e10),
        (1, "none", 5e10),
    ]
    assert {gpu.device_memory_bytes for gpu in info.gpus} == {info.plan.device_memory_bytes} == {plan.budgets.device}
    assert sum(gpu.host_memory_bytes for gpu in info.gpus) == info.plan.host_memory_bytes == 2 * plan.budgets.host
    assert info.plan.predicted_tokens_per_second == 2 * plan.prediction.tokens_per_second
    assert [gpu.running_requests for gpu in load.gpus] == [1, 0]
    assert load.running_requests == 1
    for number, use in enumerate(load.blocks):
        each = [gpu.blocks[number] for gpu in load.gpus]
        assert {(one.kind, one.tier) for one in each} == {(use.kind, use.tier)}
        assert (sum(one.used for one in each), sum(one.total for one in each)) == (use.used, use.total)
    assert sum(gpu.weights_streamed_bytes for gpu in measured.gpus) == measured.weights_streamed_bytes == 2000
    assert [gpu.busy_time.ToTimedelta().total_seconds() for gpu in measured.gpus] == [1.5, 1.5]


async def test_a_model_is_served_under_the_names_that_the_operator_gives(engine):
    """A request may have any of them, and answers say the first; its own name is none of them."""
    server = Server(ServerConfig(port=0, served_model_names=("prod", "org/model-1")))
    await server.start()
    await server.attach(engine)
    async with AsyncClient(server.address) as client:
        for name in ("prod", "org/model-1"):
            assert (await client.complete("Hi", model=name)).start.model == "prod"
        assert (await client.get_model("org/model-1")).name == (await client.get_server_info()).model == "prod"
        with pytest.raises(CallError, match="NOT_FOUND"):
            await client.complete("Hi", model=engine.spec.name)
    await server.stop()
    with pytest.raises(ConfigError, match="served_model_name='a b'"):
        ServerConfig(served_model_names=("a b",))
