"""From a model directory's config.json, or a well-known name, to a `ModelSpec`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from hsrpc.errors import ModelNotFoundError
from hsrpc.model.bounds import MAX_MODEL_BYTES
from hsrpc.model.checkpoint import Checkpoint, has_weights
from hsrpc.model.config_file import ConfigFile, read_config
from hsrpc.model.families.registry import create_family, family_class, family_name
from hsrpc.model.family import ModelSpec
from hsrpc.model.foreign import gguf_files, refuse_gguf
from hsrpc.model.formats.choice import uniform
from hsrpc.model.formats.format import Formats
from hsrpc.model.formats.plain import Plain
from hsrpc.model.generation_config import GENERATION_FILE
from hsrpc.model.hub import model_name
from hsrpc.model.quantization.modelopt import with_export
from hsrpc.model.quantization.registry import read_quantization
from hsrpc.model.shapes import SHAPES
from hsrpc.model.text_part import text_part
from hsrpc.plan.sizes import LayerSizes

__all__ = ["ModelSpec", "in_formats", "load_spec", "make_spec", "named_spec"]

CONFIG_FILE = "config.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DECLARED = DTYPES | {"float64": torch.float32}


def load_spec(directory: Path, dtype: torch.dtype | None) -> ModelSpec:
    """The spec of the model in `directory`, to be served in `dtype`; None serves the checkpoint's own.

    Where config.json ties the head to the embedding and the weights have two that differ, the weights are right.

    Raises:
        CheckpointError: a file or key is missing or wrong, or the model is not supported.
    """
    if not (directory / CONFIG_FILE).exists() and (gguf := gguf_files(directory)):
        raise refuse_gguf(gguf[0])
    config = with_export(text_part(read_config(directory / CONFIG_FILE)), directory)
    spec = make_spec(model_name(directory), config, dtype)
    if has_weights(directory) and Checkpoint(directory).has_own_head(create_family(spec)):
        untied = ConfigFile(config.file, {**config.values, "tie_word_embeddings": False})
        spec = make_spec(spec.name, untied, dtype)
    generation = directory / GENERATION_FILE
    if not generation.exists():
        return spec
    more = read_config(generation).token_ids("eos_token_id", spec.vocab_size)
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + more)))


def named_spec(name: str, dtype: torch.dtype | None) -> ModelSpec:
    """The spec of a model for random weights: well-known, by name, such as opt-30b, or the path of its config.json.

    Raises:
        ModelNotFoundError: no such name; lists those there are.
        CheckpointError: the file cannot be read or is not of a supported model.
    """
    if name in SHAPES:
        return make_spec(name, ConfigFile(f"shape {name}", SHAPES[name]), dtype)
    path = Path(name).expanduser()
    path = path / CONFIG_FILE if path.is_dir() else path
    if path.suffix != ".json":
        known = ", ".join(SHAPES)
        raise ModelNotFoundError(f"{name!r} is not a known shape; use one of {known}, or the path of a {CONFIG_FILE}")
    return make_spec(
        model_name(path.parent) if path.name == CONFIG_FILE else path.stem, text_part(read_config(path)), dtype
    )


def make_spec(name: str, config: ConfigFile, dtype: torch.dtype | None) -> ModelSpec:
    """The spec of the model that `config` describes, to be served in `dtype`; None serves the checkpoint's own.

    Raises:
        CheckpointError: a key is missing or wrong, or the model is not supported.
    """
    read_quantization(config)  # refuses what is not served
    family = family_name(config)
    config = replace(config, values={**config.values, "model_type": family})
    declared = _read_dtype(config)
    served = declared if dtype is None else dtype
    sizes = family_class(family).read_sizes(config, served.itemsize)
    spec = ModelSpec(
        name=name,
        family=family,
        dtype=served,
        checkpoint_dtype=declared,
        formats=uniform(Plain(served), served),
        sizes=sizes,
        vocab_size=sizes.vocab_size,
        eos_token_ids=config.token_ids("eos_token_id", sizes.vocab_size),
        bos_token_id=_optional_id(config, "bos_token_id", sizes.vocab_size),
        pad_token_id=_optional_id(config, "pad_token_id", sizes.vocab_size),
        config=config,
    )
    spec = in_formats(spec, spec.formats)
    if spec.sizes.model_bytes > MAX_MODEL_BYTES:
        expected = f"sizes whose weights take at most {MAX_MODEL_BYTES} bytes"
        raise config.refuse_all(family_class(family).size_keys, expected, f"{spec.sizes.model_bytes} bytes")
    return spec


def in_formats(spec: ModelSpec, formats: Formats) -> ModelSpec:
    """The same model, its weights and caches in `formats`."""
    spec = replace(spec, formats=formats)
    family = create_family(spec)
    alike: dict[LayerSizes, LayerSizes] = {}  # kept once: mixtures of experts have thousands of tensors
    layers = map(family.layer_sizes, range(family.num_layers))
    sizes = replace(
        spec.sizes,
        layers=tuple(alike.setdefault(layer, layer) for layer in layers),
        fixed_bytes=sum(tensor.numel for tensor in family.fixed_tensors()) * spec.dtype.itemsize,
    )
    return replace(spec, sizes=sizes)


def _read_dtype(config: ConfigFile) -> torch.dtype:
    """Declared as `dtype`, or `torch_dtype` in older files; float32 where neither is there, and for float64."""
    key = "dtype" if config.has("dtype") else "torch_dtype"
    return _DECLARED[config.choice(key, tuple(_DECLARED), "float32")]


def _optional_id(config: ConfigFile, key: str, vocab_size: int) -> int | None:
    """The id, or the first of a list; None also outside the vocabulary, as -1 is: generation does not need them."""
    value = config.values.get(key)
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and 0 <= value < vocab_size else None
