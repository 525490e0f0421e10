"""A plain forward pass over packed rows, with dense attention, to hold families against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hsrpc.model.checkpoint import Checkpoint, RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family, Weights
from hsrpc.model.formats.format import WeightSource
from hsrpc.model.spec import load_spec
from hsrpc.model.tensor import TensorSpec

torch.set_num_threads(1)

PROMPTS = ([3, 14, 15, 9, 2, 6, 5, 35], [8, 9, 7])


def read_all(source: WeightSource, tensors: tuple[TensorSpec, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype(dtype)) for tensor in tensors}
    for tensor in tensors:
        source.read(tensor, weights[tensor.name])
    return weights


def rebuild(family: Family, w: Weights, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[K|V] [n, k+v] of the activation `x` [n, a]; every element is written."""
    out = torch.full((len(x), family.key_size + family.value_size), torch.nan, dtype=x.dtype)
    family.keys_values(w, layer, x, family.rotation(positions), out)
    return out


def dense_attention(
    family: Family, q: torch.Tensor, kv: torch.Tensor, window: int | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention of one request: q [n, q_size], kv [n, k+v] to [n, o]."""
    sizes, count = family.sizes, len(q)
    k, v = family.heads.keys_values(kv)
    groups = sizes.num_heads // sizes.num_kv_heads
    k, v = (part.repeat_interleave(groups, dim=1).transpose(0, 1) for part in (k, v))
    distance = torch.arange(count)[:, None] - torch.arange(count)[None, :]
    hidden = (distance < 0) | (distance >= (window or count))
    scores = q.unflatten(1, (-1, sizes.head_dim)).transpose(0, 1) @ k.transpose(1, 2) * family.attention_scale
    if (cap := family.attention_extras.softcap) is not None:
        scores = cap * (scores / cap).tanh()
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, count, 1)), -1)
    return (scores.softmax(-1)[..., :count] @ v).transpose(0, 1).flatten(1)


class PackedModel:
    """A model held in memory as packed tensors."""

    def __init__(self, family: Family, source: WeightSource) -> None:
        self.family = family
        dtype = family.spec.dtype
        self.fixed = read_all(source, family.fixed_tensors(), dtype)
        self.layers = [read_all(source, family.layer_tensors(i), dtype) for i in range(family.sizes.num_layers)]

    def logits(self, prompts: tuple[list[int], ...]) -> torch.Tensor:
        """Logits [n, vocab] of all prompts' tokens; also checks that K and V come back from the attention input."""
        close = 1e-5 if self.family.spec.dtype == torch.float32 else 0.05
        family, lengths = self.family, [len(prompt) for prompt in prompts]
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = family.embed(self.fixed, torch.tensor([token for prompt in prompts for token in prompt]), positions)
        for layer, (w, sizes) in enumerate(zip(self.layers, family.sizes.layers, strict=True)):
            x, q, kv = family.project(w, layer, hidden, family.rotation(positions))
            torch.testing.assert_close(rebuild(family, w, layer, x, positions), kv, atol=close, rtol=close)
            pieces = zip(q.split(lengths), kv.split(lengths), strict=True)
            window, sinks = sizes.sliding_window, family.sinks(w, layer)
            attended = torch.cat([dense_attention(family, *piece, window, sinks) for piece in pieces])
            hidden = family.finish_layer(w, layer, hidden, attended)
        return family.logits(self.fixed, hidden)


@pytest.fixture
def load_packed() -> Callable[[Path], PackedModel]:
    """Loads the model in a directory."""

    def load(directory: Path) -> PackedModel:
        family = create_family(load_spec(directory, torch.float32))
        checkpoint = Checkpoint(directory)
        checkpoint.check(family.all_tensors())
        return PackedModel(family, checkpoint)

    return load


@pytest.fixture
def save_packed(tmp_path: Path) -> Callable[..., PackedModel]:
    """Saves a transformers model, far from its start, and loads it to be served up to a context."""

    def save(reference: PreTrainedModel, served_context: int | None = None) -> PackedModel:
        spread(reference).eval().save_pretrained(tmp_path)
        return PackedModel(create_family(load_spec(tmp_path, torch.float32), served_context), Checkpoint(tmp_path))

    return save


@pytest.fixture
def draw_packed() -> Callable[[Path, torch.dtype], PackedModel]:
    """The model that a directory's configuration describes, with random weights."""

    def draw(directory: Path, dtype: torch.dtype) -> PackedModel:
        return PackedModel(create_family(load_spec(directory, dtype)), RandomWeights(0))

    return draw


@pytest.fixture
def assert_same_logits(
    tmp_path: Path, load_packed: Callable[[Path], PackedModel]
) -> Callable[[PreTrainedModel], PackedModel]:
    """Saves a transformers model, loads it, and compares the logits of two ragged prompts."""

    def compare(reference: PreTrainedModel) -> PackedModel:
        reference = spread(reference).eval()
        reference.save_pretrained(tmp_path)
        packed = load_packed(tmp_path)
        with torch.inference_mode():
            found = packed.logits(PROMPTS)
            expected = torch.cat([reference(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        return packed

    return compare


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Draws weights far from their start, where norms are ones and biases zeros, so that each one matters."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        deviation = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data += deviation * torch.randn(parameter.shape, generator=generator)
    return model
