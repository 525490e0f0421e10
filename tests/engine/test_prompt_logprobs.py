"""Log-probabilities of prompts equal those of transformers' logits: families, policies, chunks, preemption."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsrpc import Engine, SamplingParams
from hsrpc.engine.forward import DeviceBatch, Forward
from hsrpc.engine.gpus.contract import StepResult
from hsrpc.engine.tasks.executor import Executor
from hsrpc.errors import InvalidRequestError, NotFiniteError
from hsrpc.request import Delta, FinishReason, TokenLogprob
from hsrpc.schedule.step import Step
from hsrpc.schedule.sweep import OpKind
from tests.engine.reference import NEW_TOKENS, VOCAB, Reference
from tests.engine.support import collect, config_for, greedy, idle, ids, live, parts, roomy, tight

TOP = 4
CLOSE = 2e-4
"""Between two ways to round in float32, for models whose logits spread as widely as these."""
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=TOP)


@pytest.fixture(scope="session")
def logprobs_of() -> Callable[[Reference, Sequence[int]], torch.Tensor]:
    """What transformers gives for each token of a prompt but the first: [n - 1, vocab]."""
    load: Callable[..., PreTrainedModel] = cache(lambda path: AutoModelForCausalLM.from_pretrained(path).eval())

    @torch.inference_mode()
    def found(made: Reference, prompt: Sequence[int]) -> torch.Tensor:
        logits = load(made.directory)(torch.tensor([list(prompt)]), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(dim=-1)

    return found


def scores(deltas: Sequence[Delta]) -> list[TokenLogprob]:
    return [logprob for delta in deltas for logprob in delta.prompt_logprobs]


def check(found: Sequence[TokenLogprob], prompt: Sequence[int], expected: torch.Tensor, top: int = TOP) -> None:
    """All tokens but the first, in order, each with its place and with the best in theirs."""
    assert [each.token_id for each in found] == list(prompt[1:])
    for each, row in zip(found, expected, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=CLOSE)
        above, below = (int((row > each.logprob + margin).sum()) for margin in (CLOSE, -CLOSE))
        assert above < each.rank <= max(below, above + 1)
        assert len({token_id for token_id, _ in each.top}) == top
        values = [value for _, value in each.top]
        assert values == pytest.approx(row.topk(top).values.tolist(), abs=CLOSE)
        assert values == pytest.approx([float(row[token_id]) for token_id, _ in each.top], abs=CLOSE)


async def run_all(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Delta]]:
    return await asyncio.gather(*(collect(engine.generate(list(prompt), params)) for prompt in prompts))


POLICIES = [("kv", None), ("activation", None), ("hybrid", 0.5), ("recompute", None), ("auto", None)]
WITH_EVERY_POLICY = ("opt", "mistral-window")
OTHERS = ("llama-gqa-tied", "qwen3-moe", "gemma2", "gpt-oss", "deepseek-v3")


@pytest.mark.parametrize(
    ("model", "policy", "share"),
    [(model, *each) for model in WITH_EVERY_POLICY for each in POLICIES] + [(model, "auto", None) for model in OTHERS],
)
async def test_they_are_the_models_own_with_tight_budgets(
    model: str,
    policy: str,
    share: float | None,
    reference: Callable[[str], Reference],
    logprobs_of: Callable[[Reference, Sequence[int]], torch.Tensor],
) -> None:
    """Weights stream, prompts come in chunks, requests are preempted; what is generated beside is what it was."""
    made = reference(model)
    params = greedy(NEW_TOKENS, prompt_logprobs=TOP)
    async with Engine(tight(made, cache_policy=policy, activation_share=share)) as engine:
        found = await run_all(engine, made.prompts, params)
        assert engine.stats().preemptions > 0 or policy == "recompute" or model in ("mistral-window", "gpt-oss")
        await idle(engine)
    assert [ids(deltas) for deltas in found] == made.outputs
    for deltas, prompt in zip(found, made.prompts, strict=True):
        check(scores(deltas), prompt, logprobs_of(made, prompt))
        first = next(i for i, delta in enumerate(deltas) if delta.token_ids)
        assert not scores(deltas[first + 1 :])  # all come before the output, or with its first token


@pytest.mark.parametrize("max_prefill_tokens", [1, 7, 24, 128])
async def test_they_do_not_depend_on_chunks_and_slices(
    max_prefill_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    reference: Callable[[str], Reference],
    logprobs_of: Callable[[Reference, Sequence[int]], torch.Tensor],
) -> None:
    """Nor on how many rows of logits there is memory for at a time, and no more are ever made."""
    made, num_rows = reference("llama-gqa-tied"), []
    prompt_logits = Forward.prompt_logits

    def counted(*args: object) -> torch.Tensor:
        num_rows.append(len(logits := prompt_logits(*args)))
        return logits

    monkeypatch.setattr(Forward, "prompt_logits", counted)
    async with Engine(config_for(made, max_prefill_tokens=max_prefill_tokens, gpu_memory="64MiB")) as engine:
        parts(engine).executor._scorer._num_rows = 5
        prompts = made.prompts[:6]
        for deltas, prompt in zip(await run_all(engine, prompts, SCORE), prompts, strict=True):
            check(scores(deltas), prompt, logprobs_of(made, prompt))
            assert [ids(deltas), deltas[-1].finish.reason] == [[], FinishReason.MAX_TOKENS]
            assert deltas[-1].finish.usage.completion_tokens == 0
        assert engine.stats().generated_tokens == 0
        await idle(engine)
    assert sum(num_rows) == sum(len(prompt) - 1 for prompt in prompts)
    assert 1 < max(num_rows) <= 5 or max_prefill_tokens == 1


@pytest.mark.usefixtures("ordered")
async def test_each_request_has_what_it_asks_for(
    reference: Callable[[str], Reference], logprobs_of: Callable[[Reference, Sequence[int]], torch.Tensor]
) -> None:
    """Requests with few, many and no alternatives share steps with such as want nothing of their prompts."""
    made = reference("opt")
    asked = [None, 0, 20, None, 3, 1]
    params = [SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, prompt_logprobs=top) for top in asked]
    async with Engine(roomy(made)) as engine:
        found = await asyncio.gather(
            *(collect(engine.generate(made.prompts[i], each)) for i, each in enumerate(params))
        )
    for i, (deltas, top) in enumerate(zip(found, asked, strict=True)):
        assert ids(deltas) == made.outputs[i][:5]
        if top is None:
            assert not scores(deltas)
        else:
            check(scores(deltas), made.prompts[i], logprobs_of(made, made.prompts[i]), top)


async def test_nobody_else_pays(monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]) -> None:
    """Without such a request no step has the operation; with one its decoding is handed out ahead as everybody's."""
    made, steps = reference("opt"), []
    execute = Executor.execute

    async def noted(executor: Executor, step: Step, ahead: Step | None = None) -> StepResult | None:
        steps.append(step)
        return await execute(executor, step, ahead)

    monkeypatch.setattr(Executor, "execute", noted)
    async with Engine(config_for(made, gpu_memory="1GiB", cache_policy="kv", activation_share=None)) as engine:
        await run_all(engine, made.prompts[:3], greedy(8))
        without = list(steps)
        steps.clear()
        await run_all(engine, made.prompts[:3], greedy(8, prompt_logprobs=0))
    counts = [sum(op.kind is OpKind.SCORE for op in step.ops.ops) for step in steps]
    assert not any(op.kind is OpKind.SCORE for step in without for op in step.ops.ops)
    assert 0 < sum(counts) <= sum(step.counts.prefill > 0 for step in steps)
    assert all(step.counts.prefill for step, count in zip(steps, counts, strict=True) if count)
    assert sum(step.is_ahead for step in steps) == sum(step.is_ahead for step in without) > 0


async def test_a_prompt_that_was_computed_before_is_scored_whole(
    reference: Callable[[str], Reference], logprobs_of: Callable[[Reference, Sequence[int]], torch.Tensor]
) -> None:
    """By a request before, and by one at the same time, whether these asked for it or not."""
    made = reference("llama-gqa-tied")
    prompt = max(made.prompts, key=len)
    async with Engine(roomy(made)) as engine:
        await run_all(engine, [prompt, prompt], greedy(3))
        for deltas in await run_all(engine, [prompt] * 3, SCORE):
            check(scores(deltas), prompt, logprobs_of(made, prompt))


@pytest.mark.parametrize("length", [1, 2, 127, 128])
async def test_a_prompt_of_any_length_is_scored(
    length: int, reference: Callable[[str], Reference], logprobs_of: Callable[[Reference, Sequence[int]], torch.Tensor]
) -> None:
    """One token has nothing before it; one that fills the context leaves no room, and needs none."""
    made = reference("llama-gqa-tied")
    prompt = [3 + i * 7 % (VOCAB - 3) for i in range(length)]
    async with Engine(roomy(made)) as engine:
        deltas = await collect(engine.generate(prompt, SCORE))
        check(scores(deltas), prompt, logprobs_of(made, prompt))
        assert deltas[-1].finish.usage.prompt_tokens == length
        with pytest.raises(InvalidRequestError, match=r"token_ids: 129 prompt tokens; at most 128 fit"):
            await collect(engine.generate([5] * 129, SCORE))
        await idle(engine)


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_a_prompt_whose_logits_are_not_finite_fails_alone(
    max_tokens: int, monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """The others of the step end well."""
    made, bad = reference("opt"), 299
    prompt_logits = Forward.prompt_logits

    def broken(forward: Forward, batch: DeviceBatch, wanted: slice) -> torch.Tensor:
        logits, is_bad = prompt_logits(forward, batch, wanted), batch.scores.token_ids[wanted] == bad
        return logits.masked_fill(is_bad.unsqueeze(1), torch.inf)

    monkeypatch.setattr(Forward, "prompt_logits", broken)
    async with Engine(roomy(made)) as engine:
        params = greedy(max_tokens, prompt_logprobs=0)
        prompts = [[5, 6, 7, 8], [5, 6, bad, 8], [8, 7, 6]]
        found = await asyncio.gather(*(run_all(engine, [each], params) for each in prompts), return_exceptions=True)
        assert [len(scores(found[i][0])) for i in (0, 2)] == [3, 2]
        assert isinstance(found[1], NotFiniteError)
        await idle(engine)


async def test_what_is_reported_is_not_reported_again(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """A request that gives way in the midst of its prompt goes on where its report had ended."""
    made, taken = reference("llama-gqa-tied"), []
    prompt = [3 + i * 7 % (VOCAB - 3) for i in range(100)]
    async with Engine(roomy(made, max_prefill_tokens=24)) as engine:
        generation = await engine.submit(prompt, SCORE)
        async for delta in generation:
            taken.append(delta)
            request = live(engine, generation.request_id)
            if len(taken) == 2 and request is not None:
                engine._scheduler._gpus[0].running.remove(request)
                engine._scheduler._preempt(request)
        assert taken[-1].finish.usage.preemptions == 1
        await idle(engine)
    assert [each.token_id for each in scores(taken)] == prompt[1:]
