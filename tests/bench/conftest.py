"""A model of two layers, small enough to be measured on the CPU in a moment."""

from __future__ import annotations

import pytest

from hsrpc.model.shapes import SHAPES

TINY = SHAPES["opt-125m"] | {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 128,
    "vocab_size": 100,
}


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name, among the well-known ones."""
    monkeypatch.setitem(SHAPES, "opt-tiny", TINY)
    return "opt-tiny"
