"""The families that hsrpc serves. A new one is a module with a `Family`, and a line here that registers it."""

from __future__ import annotations

from collections.abc import Iterable

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.families.decoder import Decoder
from hsrpc.model.families.latent import LatentDecoder
from hsrpc.model.families.opt import Opt
from hsrpc.model.families.readers import DECODERS, LATENTS
from hsrpc.model.family import Family, ModelSpec
from hsrpc.model.text_part import ARCHITECTURES

_FAMILIES: dict[str, type[Family]] = {}
_ARCHITECTURES: dict[str, str] = {}
"""Value of `architectures` in config.json to family."""
_MODEL_TYPES: dict[str, str] = {}
"""Value of `model_type`, for files that name no architecture, to family."""


def register_family(
    name: str, family: type[Family], *, architectures: Iterable[str], model_types: Iterable[str]
) -> None:
    """Serve models whose config.json names one of these `architectures`, or `model_types`, by `family`."""
    _FAMILIES[name] = family
    _ARCHITECTURES.update(dict.fromkeys(architectures, name))
    _MODEL_TYPES.update(dict.fromkeys(model_types, name))


register_family("opt", Opt, architectures=("OPTForCausalLM",), model_types=("opt",))
for _name, _decoder in DECODERS.items():
    _class = LatentDecoder if _name in LATENTS else Decoder
    _types = (_name, *_decoder.also)
    register_family(_name, _class, architectures=(_decoder.architecture,), model_types=_types)

_SOME_RECURRENT = "some of its layers are recurrent, and keep a state that is not a row for each token"
_EXPERTS = "its mixtures of experts are of another kind"
REFUSED = {
    "qwen3_next": _SOME_RECURRENT,
    "qwen3_5": _SOME_RECURRENT,
    "mamba": _SOME_RECURRENT,
    "mamba2": _SOME_RECURRENT,
    "falcon_h1": _SOME_RECURRENT,
    "jamba": _SOME_RECURRENT,
    "rwkv": _SOME_RECURRENT,
    "phimoe": _EXPERTS,
    "llama4_text": _EXPERTS,
    "bloom": "its attention is biased by distance",
    "mpt": "its attention is biased by distance",
    "gpt2": "its positions are learned",
    "t5": "it has an encoder",
}
"""Why hsrpc does not serve the models of a `model_type`."""


def family_name(config: ConfigFile) -> str:
    """Family of the model that `config` describes.

    Raises:
        CheckpointError: hsrpc does not serve that architecture.
    """
    key, table = ("architectures", _ARCHITECTURES) if config.has("architectures") else ("model_type", _MODEL_TYPES)
    value = config.values.get(key)
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(name, str) and name in table:
        return table[name]
    reason = REFUSED.get(str(config.values.get("model_type")))
    remedy = "serve a model of one of these architectures"
    served = (*table, *ARCHITECTURES) if key == "architectures" else table
    raise config.refuse(key, "one of " + ", ".join(served), remedy if reason is None else f"{reason}; {remedy}")


def family_class(name: str) -> type[Family]:
    """The family of that name."""
    return _FAMILIES[name]


def create_family(spec: ModelSpec, served_context: int | None = None) -> Family:
    """The family that computes `spec`, for requests of up to `served_context` tokens; None: of the model's context."""
    return family_class(spec.family)(spec, served_context)
