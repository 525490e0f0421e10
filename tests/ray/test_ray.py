"""The stage of Ray Data: answers are the model's own, on two workers of which one is killed, and no row is lost."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsrpc.config import BUNDLED_MODEL, EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.ray import Worker, generate

ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig(device="cpu", gpu_memory="24MiB", host_memory="64MiB", max_model_len=200, max_batch=8)
ROWS, YEARS = 48, 4
TOKENS = 12


def prompt(row: dict[str, Any]) -> str:
    return f"Once there was a fox of {row['years']} years"


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """What is asked of a row; some rows ask for what is not served."""
    body = {"prompt": prompt(row), "max_tokens": TOKENS, "temperature": 0}
    return body | ({"best_of": 2} if row["number"] % 10 == 3 else {})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on the loopback, with two cores for workers and one for what is around them."""
    folder = tempfile.mkdtemp(prefix="hsrpc-ray-")  # short: the paths of its sockets are bounded
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _node_ip_address="127.0.0.2",  # the loopback; Ray takes 127.0.0.1 for a wish to be reached from elsewhere
            _temp_dir=folder,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What transformers generates of rows, by their years, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)

    def text(years: int) -> str:
        ids = tokenizer(prompt({"years": years})).input_ids
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)

    return [text(years) for years in range(YEARS)]


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_loses_no_row(tmp_path, expected):
    """Its rows run again; each is there once, with its answer or its error."""

    def ask_and_tell(row: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / str(os.getpid())).touch()
        return ask(row)

    rows = ray.data.from_items([{"number": number, "years": number % YEARS} for number in range(ROWS)])
    answers = generate(rows, CONFIG, ask_and_tell, workers=2, block_rows=4)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(answers.take_all)
        while len(pids := list(tmp_path.iterdir())) < 2:
            assert not taken.done()
            time.sleep(0.01)
        os.kill(int(pids[0].name), signal.SIGKILL)
        found = taken.result(240)
    assert sorted(row["number"] for row in found) == list(range(ROWS))
    for row in found:
        if row["number"] % 10 == 3:
            assert (row["answer"], row["response"]) == (None, None)
            assert json.loads(row["error"])["param"] == "best_of"
        else:
            assert (row["answer"], row["error"]) == (expected[row["years"]], None)
            assert json.loads(row["response"])["usage"]["completion_tokens"] == TOKENS


def test_a_worker_alone(expected):
    """Choices, conversations, another model, seeds; a column that is there already is refused."""
    bodies = [
        {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "temperature": 1.0},
        {"messages": [{"role": "user", "content": "Tell me a story about a fox."}], "max_tokens": 3},
        {"model": "gpt-9", "prompt": "a"},
        ask({"number": 0, "years": 1}),
    ]
    worker = Worker(replace(CONFIG, seed=3), lambda row: json.loads(row["body"]))
    try:
        table = pa.table({"body": [json.dumps(body) for body in bodies]})
        found, again = worker(table).to_pylist(), worker(table.slice(0, 1)).to_pylist()
        with pytest.raises(ConfigError, match="dataset='error': the name of a column that is added; rename it before"):
            worker(table.append_column("error", pa.array(["x"] * 4)))
        assert worker(table.slice(0, 0)).column_names == ["body", "answer", "response", "error"]
    finally:
        worker.close()
    choices = [json.loads(row["response"])["choices"] for row in (found[0], again[0])]
    assert len(choices[0]) == 4
    assert choices[0] == choices[1]
    assert json.loads(found[1]["response"])["object"] == "chat.completion"
    assert json.loads(found[2]["error"])["code"] == "model_not_found"
    assert found[3]["answer"] == expected[1]


def test_several_workers_share_the_memory_of_a_host():
    """Each must be told its part."""
    with pytest.raises(ConfigError, match="host_memory=None: several workers of a machine would each take most of"):
        generate(None, EngineConfig(), ask, workers=(1, 2))
