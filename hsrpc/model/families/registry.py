"""The families that hsrpc serves. A new one is a module with a `Family`, and a line here that registers it."""

from __future__ import annotations

from collections.abc import Iterable

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.families.llama import Llama
from hsrpc.model.families.opt import Opt
from hsrpc.model.family import Family, ModelSpec

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
register_family(
    "llama", Llama, architectures=("LlamaForCausalLM", "MistralForCausalLM"), model_types=("llama", "mistral")
)


def family_name(config: ConfigFile) -> str:
    """Family of the model that `config` describes.

    Raises:
        CheckpointError: hsrpc does not serve that architecture.
    """
    key, table = ("architectures", _ARCHITECTURES) if config.has("architectures") else ("model_type", _MODEL_TYPES)
    value = config.values.get(key)
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(name, str) or name not in table:
        raise config.refuse(key, "one of " + ", ".join(table), "serve a model of one of these architectures")
    return table[name]


def family_class(name: str) -> type[Family]:
    """The family of that name."""
    return _FAMILIES[name]


def create_family(spec: ModelSpec) -> Family:
    """The family that computes `spec`."""
    return family_class(spec.family)(spec)
