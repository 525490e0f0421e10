"""Random weights in the formats of quantised checkpoints: what is drawn, and for which tensors."""

from __future__ import annotations

import pytest
import torch

from hsrpc.errors import ModelNotFoundError
from hsrpc.model.checkpoint import RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family
from hsrpc.model.formats.codes import decode
from hsrpc.model.random_codes import RANDOM_FORMATS, split_format
from hsrpc.model.spec import named_spec
from hsrpc.model.tensor import TensorSpec


def family_of(shape: str) -> Family:
    return create_family(named_spec(shape, torch.bfloat16))


@pytest.mark.parametrize("name", list(RANDOM_FORMATS))
def test_weights_are_about_those_of_plain_ones(name: str) -> None:
    """Normal, with variance 1 / columns; the same again for the same tensor, others for another."""
    form, size = RANDOM_FORMATS[name], (300, 512)
    packing = form.matrix(*size)
    found = []
    for source in ("a.weight", "a.weight", "b.weight"):
        parts = packing.parts(torch.zeros(packing.num_bytes, dtype=torch.uint8))
        RandomWeights(3).read_codes(TensorSpec("w", size, (source,)), [parts], torch.bfloat16)
        found.append(torch.empty(size))
        decode(parts, found[-1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].std() == pytest.approx(512**-0.5, rel=0.05)
    assert found[0].mean() == pytest.approx(0, abs=0.001)
    assert len(found[0].unique()) > 5


def test_what_is_quantised() -> None:
    """Matrices of layers, but for routers; by mxfp4 the experts alone, where there are any."""
    gpt_oss = family_of("gpt-oss-20b")
    quantised = RANDOM_FORMATS["mxfp4"].formats(gpt_oss)
    assert len(quantised) == gpt_oss.num_layers * 2 * 32
    quantised = RANDOM_FORMATS["fp8"].formats(gpt_oss)
    assert len(quantised) == gpt_oss.num_layers * (2 * 32 + 2)
    llama = family_of("llama-3-8b")
    for form in RANDOM_FORMATS.values():
        assert len(form.formats(llama)) == llama.num_layers * 4


@pytest.mark.parametrize(
    ("name", "shape", "form"),
    [
        ("qwen3-32b:fp8", "qwen3-32b", "fp8"),
        ("qwen3-32b", "qwen3-32b", None),
        ("c:/a:b/config.json", "c:/a:b/config.json", None),
        ("c:/a:b/config.json:w4a16", "c:/a:b/config.json", "w4a16"),
    ],
)
def test_a_format_stands_behind_a_shape(name: str, shape: str, form: str | None) -> None:
    """Or behind the path of a file."""
    assert split_format(name) == (shape, form and RANDOM_FORMATS[form])


def test_other_formats_are_refused() -> None:
    """With those that there are."""
    with pytest.raises(ModelNotFoundError, match="'fp9' is no format of random weights; use one of fp8, mxfp4"):
        split_format("qwen3-32b:fp9")
