"""The language model of checkpoints that have others beside it, such as one that sees: its part of config.json."""

from __future__ import annotations

from dataclasses import replace

from hsrpc.model.config_file import ConfigFile

_GEMMA_3: dict[str, object] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
"""What published files leave out, since transformers knows it."""
ARCHITECTURES: dict[str, dict[str, object]] = {
    "Gemma3ForConditionalGeneration": _GEMMA_3,
    "Mistral3ForConditionalGeneration": {},
}
"""Those whose text part is served, each with what holds where its section is silent."""
_OF_ALL = (
    "dtype",
    "torch_dtype",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
)
"""Keys of the whole model that hold for its parts."""


def text_part(config: ConfigFile) -> ConfigFile:
    """What `config` says of the language model; `config` itself where it describes nothing else.

    Raises:
        CheckpointError: the section is missing, or is none.
    """
    named = config.values.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        return config
    section = config.section("text_config")
    if section is None:
        raise config.refuse("text_config", "an object that describes the language model", "fetch the file again")
    shared = {key: config.values[key] for key in _OF_ALL if config.has(key)}
    own = {key: value for key, value in section.values.items() if key != "architectures"}
    return replace(section, values={**ARCHITECTURES[name], **own, **shared})
