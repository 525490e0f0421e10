"""llama.cpp beside hsrpc, without llama.cpp: its file, the call, what is read of its words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.peers import run_llama_cpp
from benchmarks.peers.cases import GPT_OSS, Budgets, Case, Setup, System, sizes_of, stored_bytes
from benchmarks.peers.random_gguf import write_gguf, write_random_gguf
from benchmarks.peers.run_llama_cpp import command, read_timings
from hsrpc.model.shapes import SHAPES

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
}


def llama_cpp(batch: int) -> Setup:
    case = Case.ALONE if batch == 1 else Case.HOST
    return Setup(case=case, model=GPT_OSS, system=System.LLAMA_CPP, budgets=Budgets(), batch=batch, output=64)


def test_the_file_is_a_model_of_the_shape(tmp_path):
    """Every tensor has its shape and format, and weights of a sensible size."""
    file = tmp_path / "model.gguf"
    write_gguf(SHAPES["gpt-oss-20b"] | SMALL, file)
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.architecture"].contents() == "gpt-oss"
    assert reader.fields["gpt-oss.expert_used_count"].contents() == 4
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 19
    down = tensors["blk.1.ffn_down_exps.weight"]
    assert (down.tensor_type, list(down.shape)) == (gguf.GGMLQuantizationType.MXFP4, [96, 64, 4])
    query = tensors["blk.0.attn_q.weight"]
    assert (query.tensor_type, list(query.shape)) == (gguf.GGMLQuantizationType.Q8_0, [64, 128])
    for tensor in (down, query):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert 0.005 < np.std(values) < 0.05
    with pytest.raises(ValueError, match="give gpt-oss-20b"):
        write_random_gguf("opt-125m", file)


def test_the_call_keeps_experts_on_the_host():
    """All layers' experts, whole requests for the largest batch, and both batches in one go."""
    words = command([llama_cpp(64), llama_cpp(1)], Path("file.gguf"), 16)
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "llama-batched-bench"
    assert given["--n-cpu-moe"] == "24"
    assert given["-npl"] == "1,64"
    assert int(given["--ctx-size"]) >= 64 * (512 + 64)


def test_its_words_are_timings():
    """Each line of JSON is a number of streams; all its steps are decoding."""
    entry = {"pp": 512, "tg": 64, "pl": 8, "t_pp": 2.0, "t_tg": 3.2}
    [(streams, timing)] = read_timings(["llama_init: ready", json.dumps(entry)]).items()
    assert (streams, timing.prefill, timing.tokens) == (8, 2.0, 512)
    assert list(timing.steps) == pytest.approx([0.05] * 64)
    assert timing.decode_seconds(64) == pytest.approx(3.2)


def test_without_the_program_the_error_says_what_to_do(monkeypatch):
    """Nothing is written, nothing runs."""
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ValueError, match="llama-batched-bench is not on the PATH"):
        next(run_llama_cpp.run([llama_cpp(1)]))


def test_weights_count_in_their_own_format():
    """Experts in 4 bits, the others and the embeddings in 16."""
    assert 1.35e10 < stored_bytes(GPT_OSS) < 1.4e10 < sizes_of(GPT_OSS).model_bytes
