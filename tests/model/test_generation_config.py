"""A model's own sampling settings: what is taken of generation_config.json, and what is refused."""

from __future__ import annotations

import json

import pytest

from hsrpc.errors import CheckpointError
from hsrpc.model.generation_config import read_default_params
from hsrpc.request import SamplingParams

GIVEN = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.05, "repetition_penalty": 1.1}


def test_settings_of_the_file_are_the_defaults(tmp_path):
    """Null is absent; what says how long examples are, or whether they are sampled, is not followed."""
    assert read_default_params(tmp_path) == SamplingParams()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(GIVEN | {"do_sample": False, "max_new_tokens": 20, "max_length": 20}))
    assert read_default_params(tmp_path) == SamplingParams(**GIVEN)
    file.write_text(json.dumps({"temperature": None, "top_k": 7, "eos_token_id": 2}))
    assert read_default_params(tmp_path) == SamplingParams(top_k=7)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("temperature", -1), ("top_k", 1.5), ("top_p", True), ("min_p", 2)]
)
def test_wrong_settings_are_refused(tmp_path, key, value):
    """By file and key, with the way round."""
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key}: .*--generation-config none"):
        read_default_params(tmp_path)
