"""A model in a GGUF file, as a source of a conversion."""

from __future__ import annotations

import json
import logging
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
from hsrpc.model.gguf.forms import Values, kept_forms
from hsrpc.model.gguf.header import Header
from hsrpc.model.gguf.quantization import quantization_config
from hsrpc.model.gguf.tokenizer import generation_config, write_tokenizer
from hsrpc.model.gguf.weights import LatentTarget, Target, Weights
from hsrpc.model.quantization.registry import read_quantization
from hsrpc.model.quantization.section import KEY
from hsrpc.model.spec import CONFIG_FILE, load_spec, make_spec
from hsrpc.model.tensor import dtype_name

_log = logging.getLogger(__name__)
_OWN_DTYPES = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
"""Types whose values are written in their own; those of all others in bfloat16, which no weight is too large for."""


class GgufModel:
    """The model in a GGUF file, or in all shards of one, to be written in `dtype`; None: in the type that most of its
    elements suit. With `keep_quantized`, weights of layers whose codes other readers have a layout for keep these.

    Raises:
        CheckpointError: on construction, the file is cut or damaged, or of a model that is not converted.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None, *, keep_quantized: bool = False) -> None:
        file = GgufFile(path)
        self._header = Header(file)
        architecture = architecture_of(self._header)
        config = read_config(self._header)
        self._values = Values(_main_dtype(file) if dtype is None else dtype)
        self._config = {**config, "dtype": dtype_name(self._values.dtype)}
        self._generation = generation_config(self._header, architecture.turn_ends)
        self._family = create_family(make_spec(path.stem, ConfigFile(str(file.path), self._config), None))
        self._targets = Weights(self._header, architecture, self._family).targets
        self._kept = kept_forms(self._targets) if keep_quantized else {}
        if keep_quantized and not self._kept:
            types = ", ".join(sorted({tensor.type.name for tensor in file.tensors.values()}))
            _log.warning("%s: nothing to keep of %s: all weights become values", file.path, types)

    def write_files(self, directory: Path) -> None:
        """Writes configuration, generation settings and tokenizer to `directory`."""
        write_tokenizer(self._header, directory)
        names = [target.name for target in self._targets]
        quantization = {KEY: quantization_config(names, self._kept)} if self._kept else {}
        for name, values in ((CONFIG_FILE, self._config | quantization), (GENERATION_FILE, self._generation)):
            (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def tensors(self, expect: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and content of each tensor, read one by one.

        Raises:
            CheckpointError: a value is too large for the type that is written.
        """
        expect(sum(map(self._num_bytes, self._targets)))
        for target in self._targets:
            yield from self._tensors(target)

    def _num_bytes(self, target: Target | LatentTarget) -> int:
        if isinstance(target, Target) and (form := self._kept.get(target.name)) is not None:
            return form.num_bytes(target)
        return self._values.num_bytes(target)

    def _tensors(self, target: Target | LatentTarget) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(target, Target) and (form := self._kept.get(target.name)) is not None:
            return form.tensors(target)
        return self._values.tensors(target)

    def check(self, directory: Path) -> None:
        """Check that hsrpc can read all of the model from `directory`."""
        config = load_spec(directory, None).config
        Checkpoint(directory, read_quantization(config)).check_model(self._family)


def _main_dtype(file: GgufFile) -> torch.dtype:
    elements = Counter[torch.dtype]()
    for tensor in file.tensors.values():
        elements[_OWN_DTYPES.get(tensor.type, torch.bfloat16)] += torch.Size(tensor.shape).numel()
    return elements.most_common(1)[0][0]
