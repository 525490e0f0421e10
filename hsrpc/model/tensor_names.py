"""How checkpoints spell the names of tensors: a training wrapper adds a prefix, a bare model leaves one out, and what
mixtures of experts have goes by several names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from itertools import islice

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
"""End of the name of the token embedding."""
WRAPPERS = ("model", "module", "language_model", "_orig_mod")
"""Words that may stand in front of a name, any number of them, each with a dot: `model.`, `model.model.`, none.
A canonical name begins with `model.`, or with none (the head)."""

_SPELLINGS = tuple(
    (re.compile(spelling), canonical)
    for spelling, canonical in (
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.mlp\.router\.layer\.", ".mlp.router."),
        (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
        (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
    )
)
"""Other names of what mixtures of experts have, each with the canonical one."""
_SPELT = ("block_sparse_moe", ".experts.")
"""Every name that a spelling is of has one of these."""

_WRAPPED = re.compile(rf"(?:(?:{'|'.join(WRAPPERS)})\.)+")
_MAX_COMPARED = 10_000
"""Names that an error compares, of files that may hold millions."""
_NUM_NEAREST = 3


class TensorNames:
    """The names of a checkpoint, to be found by canonical ones."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._spelt: dict[str, list[str]] = {}
        for name in names:
            self._spelt.setdefault(_bare(name), []).append(name)

    def find(self, source: str) -> str | None:
        """The name of the tensor here that is called `source` canonically; None: there is none, or which is open.

        The head stands for an embedding that is missing: a tied model's file may have either.
        """
        found = self._find(source)
        return self._find(HEAD) if found is None and source.endswith(EMBEDDING) else found

    def has_layer(self, layer: int) -> bool:
        """Whether any tensor's name says that it is of that layer."""
        return any(f".layers.{layer}." in f".{name}" for name in self._names)

    def _find(self, source: str) -> str | None:
        if source in self._names:
            return source
        spelt = self._spelt.get(_bare(source), ())
        return spelt[0] if len(spelt) == 1 else None

    def nearest(self, source: str) -> list[str]:
        """A few names here that are like `source`, the likest first."""
        same = self._spelt.get(_bare(source))
        return sorted(same)[:_NUM_NEAREST] if same else _likest(source, self._names)


def _bare(name: str) -> str:
    """`name` without wrappers, and as it is called canonically."""
    match = _WRAPPED.match(name)
    bare = name[match.end() :] if match else name
    if any(part in bare for part in _SPELT):
        for spelling, canonical in _SPELLINGS:
            bare = spelling.sub(canonical, bare)
    return bare


def _likest(source: str, names: Iterable[str]) -> list[str]:
    return get_close_matches(source, islice(names, _MAX_COMPARED), _NUM_NEAREST, 0.0)
