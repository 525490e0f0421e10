"""A model in a GGUF file, as a source of a conversion."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.families.registry import create_family
from hsrpc.model.generation_config import GENERATION_FILE
from hsrpc.model.gguf.architectures import architecture_of, read_config
from hsrpc.model.gguf.file import GgufFile
from hsrpc.model.gguf.header import Header
from hsrpc.model.gguf.tokenizer import generation_config, write_tokenizer
from hsrpc.model.gguf.values import read_values
from hsrpc.model.gguf.weights import Weights
from hsrpc.model.spec import CONFIG_FILE, make_spec
from hsrpc.model.tensor import dtype_name

_OWN_DTYPES = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
"""Types of tensors that are kept as they are; for all others there is bfloat16, which no model is too large for."""


class GgufModel:
    """The model in a GGUF file, or in all shards of one, to be written in `dtype`; None: in the type that most of its
    elements suit.

    Raises:
        CheckpointError: on construction, the file is cut or damaged, or of a model that is not converted.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        file = GgufFile(path)
        self._header = Header(file)
        architecture = architecture_of(self._header)
        self._dtype = _main_dtype(file) if dtype is None else dtype
        self._config = {**read_config(self._header), "dtype": dtype_name(self._dtype)}
        self._generation = generation_config(self._header, architecture.turn_ends)
        self._family = create_family(make_spec(path.stem, ConfigFile(str(file.path), self._config), None))
        self._weights = Weights(self._header, architecture, self._family)

    def write_files(self, directory: Path) -> None:
        """Writes configuration, generation settings and tokenizer to `directory`."""
        write_tokenizer(self._header, directory)
        for name, values in ((CONFIG_FILE, self._config), (GENERATION_FILE, self._generation)):
            (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def tensors(self, expect: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each tensor of the model, decoded one by one.

        Raises:
            CheckpointError: a value is too large for the type that is written.
        """
        expect(sum(torch.Size(target.shape).numel() for target in self._weights.targets) * self._dtype.itemsize)
        for target in self._weights.targets:
            yield target.name, read_values(target, self._dtype)

    def check(self, directory: Path) -> None:
        """Check that `directory` has all of the model."""
        Checkpoint(directory).check_model(self._family)


def _main_dtype(file: GgufFile) -> torch.dtype:
    elements = Counter[torch.dtype]()
    for tensor in file.tensors.values():
        elements[_OWN_DTYPES.get(tensor.type, torch.bfloat16)] += torch.Size(tensor.shape).numel()
    return elements.most_common(1)[0][0]
