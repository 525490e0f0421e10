"""A draft model: what it drafts, what it keeps of it, and what its memory is."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from hsrpc import Engine, EngineConfig
from hsrpc.config import BUNDLED_MODEL, DeviceKind
from hsrpc.device.device import CpuDevice, Device
from hsrpc.draft.drafter import Wanted
from hsrpc.engine.draft_model import DraftModel, PlannedDraftModel, plan_draft_model
from hsrpc.engine.model_files import ModelFiles
from hsrpc.errors import ConfigError
from hsrpc.plan.machine import Machine
from hsrpc.plan.memory_use import DeviceUse
from hsrpc.testing.ordered_device import OrderedDevice
from tests.engine.conftest import HARDWARE
from tests.engine.reference import VOCAB, Reference
from tests.engine.support import collect, greedy, idle, ids, roomy
from tests.engine.test_equivalence import generate_all

CPU = torch.device("cpu")
MACHINE = Machine(
    name="CPU",
    kind=DeviceKind.CPU,
    device_memory=2**30,
    host_memory=2**30,
    dtype="float32",
    hardware=HARDWARE,
)
WEIGHTS = "model.safetensors"


class Opened(NamedTuple):
    """A draft model with the plan that it follows, on a device of its own."""

    model: DraftModel
    planned: PlannedDraftModel
    device: Device


def planned(name: str, target: str, gpu_memory: int | str = "1GiB", **given: object) -> PlannedDraftModel:
    """The plan of a draft model for a target on the CPU."""
    shape = {"max_batch": 6, "max_model_len": 128, "expected_context": 64} | given
    config = EngineConfig(model=target, device="cpu", gpu_memory=gpu_memory, **shape)
    return plan_draft_model(name, config, ModelFiles.read(config, CPU), MACHINE)


def opened(name: str, target: str | None = None, *, device: Device | None = None, **given: object) -> Opened:
    device = device or CpuDevice()
    plan = planned(name, target or name, **given)
    return Opened(plan.open(device, threading.Event()), plan, device)


def wanted(name: str, token_ids: Sequence[int], max_tokens: int) -> Wanted:
    return Wanted(name, "", list(token_ids), len(token_ids), max_tokens)


def asked(model: DraftModel, made: Reference, known: int, count: int, max_tokens: int) -> None:
    """Each of the `count` first requests has `known` tokens of its output: the drafts are what follows."""
    pairs = list(zip(made.prompts, made.outputs, strict=True))[:count]
    drafts = model.draft([wanted(str(i), p + out[:known], max_tokens) for i, (p, out) in enumerate(pairs)])
    for draft, (_, output) in zip(drafts, pairs, strict=True):
        assert list(draft) == output[known : known + max_tokens]


@pytest.mark.parametrize(
    "name", ["opt", "opt-post-norm", "llama-gqa-tied", "mistral-window", "qwen3-moe", "gpt-oss", "deepseek-v3"]
)
def test_the_model_itself_drafts_what_it_would_say(name: str, reference: Callable[[str], Reference]) -> None:
    """Drafts of the target by itself are what transformers generates, as requests grow by different steps."""
    made = reference(name)
    model = opened(str(made.directory)).model
    for known, max_tokens in ((0, 4), (1, 1), (5, 3), (6, 7), (14, 2)):
        asked(model, made, known, 6, max_tokens)


def test_more_requests_than_a_batch_and_prompts_longer_than_a_pass(reference: Callable[[str], Reference]) -> None:
    """16 requests of up to 60 tokens, two at a time, 24 tokens a pass, each with another number of tokens."""
    made = reference("opt")
    found = opened(str(made.directory), max_batch=2)
    blocks = {pool: 8 * count for pool, count in found.planned.plan.num_blocks.items()}
    plan = replace(found.planned.plan, max_idle_prefill_tokens=24, num_blocks=blocks)
    model = replace(found.planned, plan=plan).open(found.device, threading.Event())
    prompts = [wanted(str(i), prompt, 1 + i % 5) for i, prompt in enumerate(made.prompts)]
    for i, draft in enumerate(model.draft(prompts)):
        assert list(draft) == made.outputs[i][: 1 + i % 5]


def test_what_was_rejected_is_written_over(reference: Callable[[str], Reference]) -> None:
    """A request that goes on with other tokens than were drafted, by one or several, has drafts as if it were new."""
    made = reference("llama")
    model, fresh = opened(str(made.directory)).model, opened(str(made.directory)).model
    tokens = list(made.prompts[0])
    for step in range(12):
        [draft] = model.draft([wanted("a", tokens, 5)])
        assert draft == fresh.draft([wanted(f"new {step}", tokens, 5)])[0]
        fresh.forget([f"new {step}"])
        accepted = step % 6
        tokens += [*draft[:accepted], (draft[min(accepted, 4)] + 1) % VOCAB, *range(step % 3)]


@given(
    calls=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 7), st.integers(1, 6)), min_size=1, max_size=8, unique_by=lambda x: x[0]),
            st.lists(st.integers(0, 7), max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    accepted=st.integers(0, 6),
)
@settings(max_examples=30)
def test_any_order_of_calls(
    calls: list[tuple[list[tuple[int, int]], list[int]]], accepted: int, few: Opened, few_made: Reference
) -> None:
    """With room for hardly three requests: each draft is right or empty, and blocks agree with requests."""
    model = few.model
    lengths = dict.fromkeys(range(8), 0)
    for asking, ended in calls:
        drafts = model.draft(
            [wanted(str(i), few_made.prompts[i] + few_made.outputs[i][: lengths[i]], k) for i, k in asking]
        )
        for (i, k), draft in zip(asking, drafts, strict=True):
            output = few_made.outputs[i][lengths[i] : lengths[i] + k]
            assert list(draft) in ([], output)
            lengths[i] = min(lengths[i] + min(accepted, len(draft)) + 1, 40)
        assert any(drafts)
        assert model.num_cached or model.num_free_blocks == few.planned.plan.num_blocks[few.planned.plan.in_place]
        model.forget([str(i) for i in ended])
        for i in ended:
            lengths[i] = 0
    model.forget([str(i) for i in range(8)])
    assert (model.num_cached, model.num_free_blocks) == (0, sum(few.planned.plan.num_blocks.values()))


@pytest.fixture(scope="module")
def few_made(reference: Callable[[str], Reference]) -> Reference:
    return reference("opt")


@pytest.fixture(scope="module")
def few(few_made: Reference) -> Opened:
    """A model with blocks for one long request and little more."""
    plan = planned(str(few_made.directory), str(few_made.directory))
    pools = {pool: min(count, 10) for pool, count in plan.plan.num_blocks.items()}
    plan = replace(plan, plan=replace(plan.plan, num_blocks=pools))
    device = CpuDevice()
    return Opened(plan.open(device, threading.Event()), plan, device)


def test_who_is_not_wanted_gives_way_first_and_who_came_first_stays(few: Opened, few_made: Reference) -> None:
    """10 blocks: of those not wanted the one goes that was not wanted for longest; of the wanted ones the last."""
    model, prompt = few.model, few_made.prompts[0][:1]
    for name in ("a", "b", "c"):
        assert model.draft([wanted(name, prompt * 40, 2)])[0]  # 3 blocks each
    assert model.num_cached == 3
    assert model.draft([wanted("a", prompt * 40, 2), wanted("d", prompt * 40, 2)])[1]  # in place of b
    first, second, third = model.draft([wanted(name, prompt * 60, 2) for name in ("a", "c", "d")])  # 4 blocks each
    assert (len(first), len(second), len(third)) == (2, 2, 0)
    assert model.num_cached == 2
    assert not model.draft([wanted(name, prompt * 60, 2) for name in ("a", "c", "e")])[2]
    assert not model.draft([wanted("a", prompt * 128, 2), wanted("c", prompt * 60, 2)])[1]
    model.forget(["a", "b", "c", "d", "e"])
    assert model.num_free_blocks == 10


def test_what_cannot_be_drafted_for(few: Opened, few_made: Reference) -> None:
    """Behind the end of the context, with an id beyond the vocabulary, without tokens: no draft, and no harm."""
    prompt = few_made.prompts[1][:1]
    strange = [prompt * 129, [VOCAB + 5], [], prompt * 128, prompt * 127]
    found = few.model.draft([wanted(str(i), tokens, 4) for i, tokens in enumerate(strange)])
    assert [len(draft) for draft in found] == [0, 0, 0, 1, 0]  # the fourth took all the room
    assert few.model.draft([wanted("4", prompt * 127, 4)])[0]
    few.model.forget([str(i) for i in range(5)])


def test_its_memory_is_one_line(reference: Callable[[str], Reference]) -> None:
    """All that is allocated is for the draft model, within what its plan says, within an eighth of the budget."""
    made = reference("llama")
    found = opened(str(made.directory), gpu_memory=2**26)
    held = {use: size for use, size in found.device.allocated.items() if size}
    assert set(held) == {DeviceUse.DRAFT_MODEL}
    assert 0 < held[DeviceUse.DRAFT_MODEL] <= found.planned.device_bytes <= 2**23
    lines = found.planned.plan.device_bytes
    exact = lines[DeviceUse.FIXED] + lines[DeviceUse.RESIDENT_WEIGHTS] + lines[DeviceUse.CACHE_BLOCKS]
    assert held[DeviceUse.DRAFT_MODEL] >= exact
    device = found.device
    del found
    gc.collect()
    assert not device.allocated[DeviceUse.DRAFT_MODEL]


def test_the_target_is_planned_beside_it(reference: Callable[[str], Reference]) -> None:
    """What the draft model takes is a line of the target's plan, and is taken from its budget."""
    made = reference("llama")
    config = EngineConfig(model=str(made.directory), device="cpu", gpu_memory="64MiB", max_batch=6, max_model_len=128)
    files = ModelFiles.read(config, CPU)
    size = plan_draft_model(str(made.directory), config, files, MACHINE).device_bytes
    question = files.question(MACHINE, config)
    _, alone = question.answer()
    _, beside = replace(question, draft_model_bytes=size).answer()
    assert beside.device_bytes[DeviceUse.DRAFT_MODEL] == size
    assert sum(beside.device_bytes.values()) <= beside.budgets.device == alone.budgets.device
    assert DeviceUse.DRAFT_MODEL not in alone.device_bytes


def test_one_that_is_too_large_is_refused(reference: Callable[[str], Reference]) -> None:
    """The budget and what would do are named."""
    name = str(reference("llama").directory)
    with pytest.raises(ConfigError, match=r"draft_model=.* does not fit 128\.0 KiB, an eighth of gpu_memory=1\.0 MiB"):
        planned(name, name, gpu_memory="1MiB")


def test_its_accesses_are_ordered(reference: Callable[[str], Reference]) -> None:
    """On a device that sees every access, none is out of order."""
    made, device = reference("opt"), OrderedDevice()
    model = opened(str(made.directory), device=device).model
    device.drain()
    for known, max_tokens in ((0, 4), (2, 3)):
        asked(model, made, known, 4, max_tokens)
    device.check()
    assert device.num_operations


@pytest.mark.parametrize("name", ["opt", "mistral-window"])
async def test_an_engine_says_the_same_with_it(name: str, reference: Callable[[str], Reference]) -> None:
    """Tokens are the reference's; where the model drafts for itself, all that it drafts is accepted."""
    made = reference(name)
    model = opened(str(made.directory), max_batch=16).model
    async with Engine(roomy(made, max_draft_tokens=3), drafter=model) as engine:
        assert await generate_all(engine, made) == made.outputs
        await idle(engine)
        stats = engine.stats()
    assert 0 < stats.accepted_tokens == stats.drafted_tokens


async def test_an_engine_says_the_same_with_one_that_knows_nothing(
    tmp_path: Path, reference: Callable[[str], Reference]
) -> None:
    """A model with other weights drafts what is rejected, and changes no token."""
    made = reference("opt")
    other = Path(shutil.copytree(made.directory, tmp_path / "other"))
    torch.manual_seed(5)
    save_file({n: torch.randn_like(w) for n, w in load_file(other / WEIGHTS).items()}, other / WEIGHTS)
    model = opened(str(other), str(made.directory), max_batch=16).model
    async with Engine(roomy(made, max_draft_tokens=3), drafter=model) as engine:
        said = await asyncio.gather(*(collect(engine.generate(p, greedy(12))) for p in made.prompts[:4]))
        await idle(engine)
        stats = engine.stats()
    assert [ids(deltas) for deltas in said] == [output[:12] for output in made.outputs[:4]]
    assert stats.accepted_tokens < 0.1 * stats.drafted_tokens


def test_a_random_model_drafts_tokens() -> None:
    """A shape with random weights needs no files, and what it drafts are ids of its vocabulary."""
    found = opened("random:opt-125m", max_batch=2, gpu_memory="16GiB", max_model_len=64)
    [draft] = found.model.draft([wanted("a", [2, 5, 9], 3)])
    assert len(draft) == 3
    assert all(0 <= token_id < 50272 for token_id in draft)


def test_another_tokenizer_is_refused(tmp_path: Path, reference: Callable[[str], Reference]) -> None:
    """Ids that stand for other tokens are named; more tokens at the end of one are no matter."""
    made = reference("opt")
    other = Path(shutil.copytree(made.directory, tmp_path / "other"))
    values = json.loads((other / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["more"] = max(vocab.values()) + 1
    (other / "tokenizer.json").write_text(json.dumps(values))
    planned(str(other), str(made.directory))
    first, second = (next(token for token, number in vocab.items() if number == i) for i in (17, 18))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(values))
    words = r"draft_model=.*: has another tokenizer than .*: 2 ids stand for other tokens, such as 17 .* / .*, 18 .*; "
    with pytest.raises(ConfigError, match=words + "choose a smaller model of the same family"):
        planned(str(other), str(made.directory))


def test_another_vocabulary_is_refused_without_a_tokenizer(reference: Callable[[str], Reference]) -> None:
    """Random weights have no tokenizer: sizes and special ids tell."""
    with pytest.raises(ConfigError, match=r"has another tokenizer than .*: vocab_size 50272 / 300"):
        planned("random:opt-125m", str(reference("opt").directory), gpu_memory="16GiB")


def num_accepted(draft: Sequence[int], output: Sequence[int]) -> int:
    """How many drafted tokens are those that follow, up to the first that is not."""
    pairs = zip(draft, output, strict=False)
    return next((n for n, (drafted, token_id) in enumerate(pairs) if drafted != token_id), len(draft))


PROMPTS = (
    "Once upon a time",
    "The little robot",
    "One rainy morning",
    "Mia had a",
    "Tell me a story about a dragon and a red kite.",
    "Tell me a story about a fox.",
)


def test_the_sibling_of_the_bundled_model_is_worth_its_time() -> None:
    """On stories of the bundled model: a pass with up to three drafted tokens gives more than 1.3."""
    sibling = str(Path(BUNDLED_MODEL).with_name("storyteller-draft"))
    model, given = (opened(name, BUNDLED_MODEL, max_model_len=512).model for name in (BUNDLED_MODEL, sibling))
    tokenizer = Tokenizer.from_file(str(Path(BUNDLED_MODEL) / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    outputs = model.draft([wanted(str(i), prompt, 60) for i, prompt in enumerate(prompts)])
    known, passes = [0] * len(prompts), 0
    while left := [i for i, output in enumerate(outputs) if known[i] < len(output)]:
        drafts = given.draft([wanted(str(i), [*prompts[i], *outputs[i][: known[i]]], 3) for i in left])
        for i, draft in zip(left, drafts, strict=True):
            following = outputs[i][known[i] : known[i] + len(draft)]
            known[i] += num_accepted(draft, following) + 1
        passes += len(left)
    assert sum(map(len, outputs)) / passes > 1.3
