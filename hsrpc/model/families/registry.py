"""The families that hsrpc serves. A new one is a module with a `Family` and a line in each table."""

from __future__ import annotations

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.families.llama import Llama
from hsrpc.model.families.opt import Opt
from hsrpc.model.family import Family, ModelSpec

FAMILIES: dict[str, type[Family]] = {"opt": Opt, "llama": Llama}
ARCHITECTURES = {"OPTForCausalLM": "opt", "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}
"""Value of `architectures` in config.json to family."""
MODEL_TYPES = {"opt": "opt", "llama": "llama", "mistral": "llama"}
"""Value of `model_type`, for files that name no architecture, to family."""


def family_name(config: ConfigFile) -> str:
    """Family of the model that `config` describes.

    Raises:
        CheckpointError: hsrpc does not serve that architecture.
    """
    key, table = ("architectures", ARCHITECTURES) if config.has("architectures") else ("model_type", MODEL_TYPES)
    value = config.values.get(key)
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(name, str) or name not in table:
        raise config.refuse(key, "one of " + ", ".join(table), "serve a model of one of these architectures")
    return table[name]


def create_family(spec: ModelSpec) -> Family:
    """The family that computes `spec`."""
    return FAMILIES[spec.family](spec)
