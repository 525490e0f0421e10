"""Caches in 8 bits: token for token what transformers gives with inputs, K and V and weights rounded by definition."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsrpc import Engine, EngineConfig
from hsrpc.engine.startup import ChoosePlan
from hsrpc.engine.stats import EngineStats
from hsrpc.errors import ConfigError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.families.registry import create_family
from hsrpc.model.spec import load_spec
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.planner import Planner
from hsrpc.schedule.blocks import PoolId
from tests.engine.reference import Reference, decoder, opt, save_tokenizer, spread_norms
from tests.engine.rounding import Rounding, rounding
from tests.engine.rounding import rounded as rounded_to
from tests.engine.support import collect, greedy, idle, ids

NUM_TOKENS, NUM_PROMPTS = 18, 5
MARGIN = 0.02
"""Far above what one number changes that float32's own rounding lets round the other way."""
_SIZE = {"num_hidden_layers": 2, "max_position_embeddings": 96}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": lambda: opt(**_SIZE, hidden_size=32, num_attention_heads=2, ffn_dim=64),
    "llama-gqa": lambda: decoder("llama", **_SIZE, num_key_value_heads=2, attention_bias=True),
    "qwen3": lambda: decoder("qwen3", **_SIZE, head_dim=16, num_key_value_heads=4),
    "window": lambda: decoder("mistral", **_SIZE, num_key_value_heads=4, sliding_window=12),
}
SHARES = {"kv": {}, "activation": {}, "hybrid": {"activation_share": 0.5}}
"""Settings by policy."""
BLOCKS = {"kv": (3, 9, 0, 0), "activation": (0, 0, 3, 9), "hybrid": (2, 4, 2, 4)}
"""K and V on device and host, activations alike: hardly more than the longest request takes."""


def rounding_of(cache_format: str, policy: str) -> Rounding:
    """What the documents say of a format, under a policy that has these kinds of blocks."""
    return Rounding(
        kv=None if policy == "activation" else cache_format,
        activation=None if policy == "kv" else "fp8",
        weight="fp8" if policy != "kv" and cache_format == "fp8" else None,
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Checkpoints by name, without prompts."""

    def make(name: str) -> Reference:
        torch.manual_seed(3)
        made, directory = MODELS[name]().eval(), tmp_path_factory.mktemp(name)
        spread_norms(made)
        made.save_pretrained(directory)
        save_tokenizer(directory)
        return Reference(directory, [], [])

    return cache(make)


class Expected(NamedTuple):
    """What the definition gives for some prompts."""

    made: Reference
    logprobs: list[torch.Tensor]
    """Logarithms of the probabilities of each output's tokens."""
    without: dict[str, list[torch.Tensor]]
    """The same where a part of the rounding is left out, by its name."""


@pytest.fixture(scope="session")
def rounded(model: Callable[[str], Reference]) -> Callable[[str, Rounding], Expected]:
    """Checkpoints with prompts of 1 to 50 tokens, and their continuations under a rounding."""

    def make(name: str, how: Rounding) -> Expected:
        made = model(name)
        reference = AutoModelForCausalLM.from_pretrained(made.directory).eval()
        generator = torch.Generator().manual_seed(11)
        prompts, outputs = [], []
        while len(prompts) < NUM_PROMPTS:
            length = 1 + int(torch.randint(50, (1,), generator=generator))
            prompt = torch.randint(3, 300, (length,), generator=generator).tolist()
            output, margin = continued(reference, prompt, how)
            if margin > MARGIN:
                prompts.append(prompt)
                outputs.append(output)
        pairs = list(zip(prompts, outputs, strict=True))
        parts = [item.name for item in fields(how) if getattr(how, item.name) is not None]
        return Expected(
            replace(made, prompts=prompts, outputs=outputs),
            [logprobs_of(reference, *pair, how) for pair in pairs],
            {part: [logprobs_of(reference, *pair, replace(how, **{part: None})) for pair in pairs] for part in parts},
        )

    return cache(make)


@torch.inference_mode()
def continued(model: PreTrainedModel, prompt: list[int], how: Rounding) -> tuple[list[int], float]:
    """The greedy tokens of a prompt, and the least margin on the way."""
    tokens, output, margin = torch.tensor([prompt]), [], 1e9
    with rounding(model, how) as past:
        for _ in range(NUM_TOKENS):
            logits = model(tokens, cache=past, use_cache=True).logits[0, -1]
            (best, second), (token, _) = (each.tolist() for each in logits.topk(2))
            margin = min(margin, best - second)
            output.append(token)
            tokens = torch.tensor([[token]])
    return output, margin


@torch.inference_mode()
def logprobs_of(model: PreTrainedModel, prompt: list[int], output: list[int], how: Rounding) -> torch.Tensor:
    """Those of an output's tokens, in one pass."""
    with rounding(model, how) as past:
        logits = model(torch.tensor([prompt + output[:-1]]), cache=past, use_cache=True).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None]).squeeze(1)


def config_for(made: Reference, **settings: object) -> EngineConfig:
    """Prompts come in chunks of 16 tokens."""
    base = {"max_batch": 4, "max_model_len": 80, "max_prefill_tokens": 16, "expected_context": 20, "device": "cpu"}
    base |= {"gpu_memory": "64MiB", "host_memory": "64MiB", "placement": "host", "block_size": 8}
    config = EngineConfig(model=str(made.directory), **(base | settings))
    return replace(config, min_batch=config.max_batch)


def with_blocks(*counts: int) -> ChoosePlan:
    """hsrpc's own plan with so many blocks in each pool."""
    num_blocks = dict(zip(PoolId, counts, strict=True))
    return lambda planner: replace(planner.plan(), num_blocks=num_blocks)


async def check(expected: Expected, config: EngineConfig, choose_plan: ChoosePlan = Planner.plan) -> EngineStats:
    """Tokens are those of the definition; and their probabilities, far nearer than with anything of it left out."""
    made = expected.made
    async with Engine(config, choose_plan=choose_plan) as engine, asyncio.timeout(60):
        params = greedy(NUM_TOKENS, logprobs=0)
        found = await asyncio.gather(*(collect(engine.generate(each, params)) for each in made.prompts))
        await idle(engine)
        stats = engine.stats()
    assert [ids(each) for each in found] == made.outputs
    logprobs = [torch.tensor([each.logprob for delta in deltas for each in delta.logprobs]) for deltas in found]
    for part, others in expected.without.items():
        assert distance(logprobs, expected.logprobs) < 0.1 * distance(logprobs, others), part
    return stats


def distance(found: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """What the logarithms of the probabilities of all prompts' tokens differ by, on average."""
    return float((torch.cat(found) - torch.cat(others)).abs().mean())


@pytest.mark.parametrize("policy", SHARES)
@pytest.mark.parametrize(("cache_format", "name"), [*(("fp8", name) for name in MODELS), ("int8", "opt")])
async def test_tokens_equal_the_reference_with_tight_budgets(
    cache_format: str, policy: str, name: str, rounded: Callable[[str, Rounding], Expected]
) -> None:
    """Wherever blocks lie, with chunks and with requests that are preempted and computed anew."""
    expected = rounded(name, rounding_of(cache_format, policy))
    config = config_for(expected.made, cache_format=cache_format, cache_policy=policy, **SHARES[policy])
    stats = await check(expected, config, with_blocks(*BLOCKS[policy]))
    assert stats.preemptions > 0 or name == "window"
    assert stats.cache_loaded_bytes > 0


@pytest.mark.usefixtures("ordered")
@pytest.mark.parametrize("resident", [0.0, 1.0])
async def test_rows_of_codes_are_written_before_they_are_read(
    resident: float, rounded: Callable[[str, Rounding], Expected]
) -> None:
    """With weights that stream and with none, whose K and V parts are coded in each step all the same."""
    expected = rounded("opt", rounding_of("fp8", "hybrid"))
    weights = {"placement": "auto", "resident_share": 1.0} if resident else {}
    config = config_for(expected.made, cache_format="fp8", cache_policy="hybrid", activation_share=0.5, **weights)
    await check(expected, config, with_blocks(*BLOCKS["hybrid"]))


@pytest.mark.parametrize("cache_format", ["fp8", "int8"])
async def test_codes_on_the_device_are_read_where_they_lie(
    cache_format: str, rounded: Callable[[str, Rounding], Expected]
) -> None:
    """Steps that only decode use no buffer, and are made while the one before is computed."""
    expected = rounded("llama-gqa", rounding_of(cache_format, "kv"))
    config = config_for(expected.made, cache_format=cache_format, cache_policy="kv", placement="auto")
    assert (await check(expected, config)).cache_loaded_bytes == 0


@pytest.mark.parametrize("policy", SHARES)
async def test_requests_that_keep_no_cache_are_rounded_alike(
    policy: str, rounded: Callable[[str, Rounding], Expected]
) -> None:
    """Their tokens are computed anew in each step, and are those that caches would have given."""
    expected = rounded("llama-gqa", rounding_of("fp8", policy))
    settings = {"recompute_share": 0.6, "expected_context": 60, **SHARES[policy]}
    stats = await check(expected, config_for(expected.made, cache_format="fp8", cache_policy=policy, **settings))
    assert stats.recomputed_tokens > 0


@pytest.mark.parametrize(
    ("policy", "attention"), [("activation", "rebuild"), ("activation", "absorb"), ("hybrid", "rebuild")]
)
async def test_latents_are_rounded_with_the_key_that_heads_share(
    policy: str, attention: str, reference: Callable[[str], Reference]
) -> None:
    """A scale for both; K and V are made of what the row means, and single queries attend to that too."""
    made = reference("deepseek-v3")
    tried = [made.prompts[0][:17], made.prompts[1][:9], made.prompts[2][:13]]
    found = [(each, *latents_continued(made, each, rounding_of("fp8", policy))) for each in tried]
    prompts, outputs, _ = zip(*(each for each in found if each[-1] > MARGIN), strict=True)
    assert len(prompts) == 2
    settings = {"latent_attention": attention, **SHARES[policy]}
    config = config_for(made, cache_format="fp8", cache_policy=policy, **settings)
    expected = Expected(replace(made, prompts=list(prompts), outputs=list(outputs)), [], {})
    stats = await check(expected, config)
    assert stats.cache_loaded_bytes > 0


def latents_continued(made: Reference, prompt: list[int], how: Rounding) -> tuple[list[int], float]:
    """The greedy tokens of a plain forward pass over all tokens, again for each one, and the least margin."""
    spec, checkpoint = load_spec(made.directory, torch.float32), Checkpoint(made.directory)
    family, tokens, margin = create_family(spec), list(prompt), 1e9

    def read(tensor: TensorSpec) -> torch.Tensor:
        out = torch.empty(tensor.shape)
        checkpoint.read(tensor, out)
        return out

    fixed = {tensor.name: read(tensor) for tensor in family.fixed_tensors()}
    layers = [{each.name: read(each) for each in family.layer_tensors(i)} for i in range(family.num_layers)]
    for _ in range(NUM_TOKENS):
        positions = torch.arange(len(tokens))
        hidden, rotation = family.embed(fixed, torch.tensor(tokens), positions), family.rotation(positions)
        for layer, w in enumerate(layers):
            latents, queries, kv = family.project(w, layer, hidden, rotation)
            if how.activation is not None:
                family.keys_values(w, layer, rounded_to(latents, how.activation), rotation, kv)
            k, v = family.heads.keys_values(kv)
            if how.kv is not None:
                k, v = rounded_to(k, how.kv), rounded_to(v, how.kv)
            scores = torch.einsum("qhd,khd->hqk", queries.unflatten(1, k.shape[1:]), k) * family.attention_scale
            hidden_keys = torch.ones(len(tokens), len(tokens)).triu(1).bool()
            weights = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1)
            hidden = family.finish_layer(w, layer, hidden, torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        (best, second), (token, _) = (each.tolist() for each in family.logits(fixed, hidden[-1:])[0].topk(2))
        margin = min(margin, best - second)
        tokens.append(token)
    return tokens[len(prompt) :], margin


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_format": "fp4"}, "cache_format='fp4': unknown; use one of plain, fp8, int8"),
        (
            {"cache_format": "int8", "cache_policy": "recompute"},
            "cache_format='int8': has no meaning with cache_policy=recompute; use plain: nothing is cached",
        ),
    ],
)
def test_wrong_formats_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(**settings)
    assert str(error.value) == message
