"""lm-eval through hsrpc, an engine or a server, gives the numbers of its own `hf` model, sample for sample."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from hsrpc import Engine, EngineConfig
from hsrpc.config import BUNDLED_MODEL
from hsrpc.errors import ConfigError, InvalidRequestError
from hsrpc.lm_eval import HsrpcLM
from hsrpc.loop_thread import LoopThread
from hsrpc.server import Server, ServerConfig
from tests.engine.reference import make_reference

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
SMALL = {"device": "cpu", "gpu_memory": "24MiB", "host_memory": "64MiB", "max_batch": 4, "dtype": "float32"}
CLOSE = 1e-3
LONG = "The fox walked on, and met an owl. "
ROWS = [
    {
        "question": f"Once upon a time, there was a {animal}. The {animal}",
        "choices": [" was happy", " purple xylophone the", " looked high and low", " ran"],
        "label": index % 4,
        "text": f"Once upon a time, there was a {animal} named Milo. " + LONG * (8 * index),
    }
    for index, animal in enumerate(("fox", "cat", "small owl", "princess", "robot", "bear"))
]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "no_context": {
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "goes_on": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Tasks of files on this disk alone."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        whole = {"task": name, **source, **task, "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints: the bundled model, and random ones."""
    made: dict[str, Path] = {"storyteller": Path(BUNDLED_MODEL)}

    def found(name: str) -> Path:
        if name not in made:
            made[name] = make_reference(name, tmp_path_factory.mktemp(name)).directory
        return made[name]

    return found


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A server of the bundled model."""
    loop = LoopThread("server", asyncio.new_event_loop)
    opened = AsyncExitStack()

    async def start() -> str:
        server = Server(ServerConfig(port=0))
        await server.start()
        opened.push_async_callback(server.stop)
        await server.attach(await opened.enter_async_context(Engine(EngineConfig(**SMALL))))
        return server.address

    yield loop.run(start())
    loop.run(opened.aclose())
    loop.close()


@pytest.fixture
def lm(target: str) -> Iterator[HsrpcLM]:
    lm = HsrpcLM(target)
    yield lm
    lm.close()


def evaluate(tasks: TaskManager, model: str | HsrpcLM, **model_args: object) -> dict[str, Any]:
    return simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=list(TASKS),
        task_manager=tasks,
        num_fewshot=0,
        batch_size=3,
        bootstrap_iters=0,
        log_samples=True,
    )


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The metrics of all tasks, and what each sample was answered."""
    for task in TASKS:
        for metric, value in expected["results"][task].items():
            wanted = pytest.approx(value, rel=CLOSE) if isinstance(value, float) else value
            assert found["results"][task][metric] == wanted, (task, metric)
        assert len(found["samples"][task]) == len(ROWS)
        for sample, other in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert _flat(sample["resps"]) == [
                pytest.approx(each, rel=CLOSE) if isinstance(each, float) else each for each in _flat(other["resps"])
            ], task


def _flat(answers: Any) -> list[Any]:
    if not isinstance(answers, list | tuple):
        return [answers]
    return [each for answer in answers for each in _flat(answer)]


@pytest.mark.parametrize(("model", "max_model_len"), [("storyteller", 200), ("llama-gqa-tied", 96)])
def test_an_engine_gives_the_numbers_of_hf(
    model: str, max_model_len: int, tasks: TaskManager, directory: Callable[[str], Path]
) -> None:
    """Choices, last words, whole texts in several windows, and outputs."""
    path = str(directory(model))
    lm = HsrpcLM(model=path, max_model_len=max_model_len, **SMALL)
    found, seen = evaluate(tasks, lm), max_model_len - 1
    lm.close()
    expected = evaluate(tasks, "hf", pretrained=path, device="cpu", dtype="float32", max_length=seen)
    check(found, expected)
    assert any(len(row["text"]) > 4 * max_model_len for row in ROWS)  # of which there are several windows


def test_a_server_gives_the_numbers_of_hf(target: str, tasks: TaskManager) -> None:
    expected = evaluate(tasks, "hf", pretrained=str(BUNDLED_MODEL), device="cpu", dtype="float32", max_length=255)
    check(evaluate(tasks, "hsrpc", target=target, max_length=255), expected)


def test_conversations_are_rendered_by_the_models_template(lm: HsrpcLM) -> None:
    """As text, which then is a context; with a message that goes on, too."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    assert lm.apply_chat_template(messages) == own.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert lm.tok_encode(lm.apply_chat_template(messages)) == own.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    messages.append({"role": "assistant", "content": "One bright"})
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == own.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=False, continue_final_message=True
    )


def generation(context: str, **kwargs: object) -> Instance:
    return Instance("generate_until", {}, (context, kwargs), 0)


def test_settings_of_generations(lm: HsrpcLM) -> None:
    """Those of `SamplingParams` are in effect; another is named, and so is a length that leaves no room."""
    seeded = {"do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 3, "max_gen_toks": 12}
    first, second, other = lm.generate_until(
        [generation("Once", **seeded), generation("Once", **seeded), generation("Once", **{**seeded, "seed": 4})]
    )
    assert first == second != other
    with pytest.raises(InvalidRequestError, match="num_beams: no setting of a generation here"):
        lm.generate_until([generation("Once", num_beams=2)])
    with pytest.raises(InvalidRequestError, match="max_gen_toks: 1000000 leave no room for a prompt"):
        lm.generate_until([generation("Once", max_gen_toks=1_000_000)])


def test_settings_that_belong_elsewhere_are_named(target: str) -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory='1GiB': has no meaning with target="):
        HsrpcLM(target, gpu_memory="1GiB")
    with pytest.raises(ConfigError, match=r"token='x': has no meaning without a server"):
        HsrpcLM(token="x")
    with pytest.raises(ConfigError, match=r"frobnicate=1: no setting of EngineConfig"):
        HsrpcLM(frobnicate=1)
    with pytest.raises(ConfigError, match=r"model='other': the server at .* has another; give storyteller"):
        HsrpcLM(target, model="other")


def test_the_command_line_knows_the_model(target: str, tasks: TaskManager, tmp_path: Path) -> None:
    """`python -m hsrpc.lm_eval` is lm-eval's own command, with the model."""
    del tasks
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    (tmp_path / "choices.yaml").write_text(yaml.safe_dump({"task": "choices", **source, **TASKS["choices"]}))
    command = [sys.executable, "-m", "hsrpc.lm_eval", "run", "--model", "hsrpc", "--model_args", f"target={target}"]
    command += ["--tasks", "choices", "--include_path", str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
