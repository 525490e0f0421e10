"""Rotary position embedding (Su et al., arXiv 2104.09864) of a head's first dimensions, or all; and its scalings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional

from hsrpc.model.bounds import MAX_CONTEXT
from hsrpc.model.config_file import ConfigFile


@dataclass(frozen=True)
class Scaling(ABC):
    """How a model's rotation reaches beyond the context that it was first trained with; here: as it is."""

    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it."""

    def context(self, positions: int) -> int:
        """Tokens of the model's context, where `max_position_embeddings` says `positions`."""
        return positions

    @abstractmethod
    def frequencies(self, theta: float, width: int, context: int) -> torch.Tensor:
        """Angle that one position turns each pair of dimensions by: float32 [width / 2], for requests up to `context`
        tokens."""


@dataclass(frozen=True)
class Unscaled(Scaling):
    """Angles as they were trained."""

    def frequencies(self, theta: float, width: int, context: int) -> torch.Tensor:
        return _frequencies(theta, width)


@dataclass(frozen=True)
class Linear(Scaling):
    """All angles slowed alike."""

    factor: float = 1.0

    @classmethod
    def read(cls, section: ConfigFile, config: ConfigFile, width: int) -> Linear:
        return cls(factor=section.number("factor"))

    def frequencies(self, theta: float, width: int, context: int) -> torch.Tensor:
        return _frequencies(theta, width) / self.factor


@dataclass(frozen=True)
class Dynamic(Scaling):
    """A base that grows with the context that is served, beyond the trained one ("dynamic NTK").

    transformers lets it grow with each request instead, and leaves the keys as they were before it grew: what is
    served here is what it computes for a prompt of the served context.
    """

    factor: float = 1.0
    trained: int = 0
    """Context of the training, tokens."""

    @classmethod
    def read(cls, section: ConfigFile, config: ConfigFile, width: int) -> Dynamic:
        if width < 4:
            raise section.refuse("type" if section.has("type") else "rope_type", f"another, for {width} dimensions")
        return cls(factor=section.number("factor"), trained=_positions(config))

    def context(self, positions: int) -> int:
        return min(MAX_CONTEXT, int(positions * self.factor))

    def frequencies(self, theta: float, width: int, context: int) -> torch.Tensor:
        stretch = self.factor * max(context, self.trained) / self.trained - (self.factor - 1)
        return _frequencies(theta * stretch ** (width / (width - 2)), width)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Long waves slowed by `factor`, short ones kept, a linear blend between (Llama 3.1)."""

    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    trained: int = 0
    """Context of the training, tokens."""

    @classmethod
    def read(cls, section: ConfigFile, config: ConfigFile, width: int) -> Llama3:
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if high <= low:
            raise section.refuse("high_freq_factor", f"more than low_freq_factor={low}")
        return cls(factor=section.number("factor"), low=low, high=high, trained=_trained(section, config))

    def frequencies(self, theta: float, width: int, context: int) -> torch.Tensor:
        frequencies = _frequencies(theta, width)
        turns = self.trained * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class Yarn(Scaling):
    """Pairs that turn seldom in the trained context slowed by `factor`, others kept (Peng et al., arXiv 2309.00071)."""

    factor: float = 1.0
    trained: int = 0
    """Context of the training, tokens."""
    fast: float = 32.0
    """Turns in the trained context from which on a pair is kept."""
    slow: float = 1.0
    """Turns below which it is slowed in full."""
    whole: bool = True
    """Whether the blend begins and ends at whole pairs."""

    @classmethod
    def read(cls, section: ConfigFile, config: ConfigFile, width: int) -> Yarn:
        trained = _trained(section, config)
        factor = section.number("factor", _positions(config) / trained)
        if section.has("mscale") and section.has("mscale_all_dim"):
            usual = _yarn_factor(factor, section.number("mscale")) / _yarn_factor(
                factor, section.number("mscale_all_dim")
            )
        else:
            usual = _yarn_factor(factor, 1.0)
        return cls(
            attention_factor=section.number("attention_factor", usual),
            factor=factor,
            trained=trained,
            fast=section.number("beta_fast", 32.0),
            slow=section.number("beta_slow", 1.0),
            whole=section.flag("truncate", True),
        )

    def context(self, positions: int) -> int:
        return min(MAX_CONTEXT, max(positions, int(self.trained * self.factor)))

    def frequencies(self, theta: float, width: int, context: int) -> torch.Tensor:
        frequencies = _frequencies(theta, width)
        low, high = (self._pair(turns, theta, width) for turns in (self.fast, self.slow))
        if self.whole:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        slowed = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        slowed = slowed.clamp(0.0, 1.0)
        return slowed * frequencies / self.factor + (1 - slowed) * frequencies

    def _pair(self, turns: float, theta: float, width: int) -> float:
        """The pair that turns so often in the trained context; between two, where none does."""
        return width * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRope(Scaling):
    """A factor for each pair, from one list up to the trained context and from another beyond (arXiv 2402.13753).

    Which list holds follows from the context that is served, for all requests alike, as in vLLM and llama.cpp:
    transformers goes by the length of each request, and computes it anew where it crosses the border.
    """

    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    trained: int = 0
    """Context of the training, tokens."""

    @classmethod
    def read(cls, section: ConfigFile, config: ConfigFile, width: int) -> LongRope:
        trained = _trained(section, config)
        factor = section.number("factor", _positions(config) / trained)
        usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        return cls(
            attention_factor=section.number("attention_factor", usual),
            short=section.numbers("short_factor", width // 2),
            long=section.numbers("long_factor", width // 2),
            trained=trained,
        )

    def frequencies(self, theta: float, width: int, context: int) -> torch.Tensor:
        factors = self.long if context > self.trained else self.short
        return _frequencies(theta, width) / torch.tensor(factors, dtype=torch.float32, device="cpu")


_SCALINGS: Mapping[str, Callable[[ConfigFile, ConfigFile, int], Scaling]] = {
    "default": lambda *_: Unscaled(),
    "linear": Linear.read,
    "dynamic": Dynamic.read,
    "llama3": Llama3.read,
    "yarn": Yarn.read,
    "longrope": LongRope.read,
    "su": LongRope.read,  # its name before it was published
}


@dataclass(frozen=True, kw_only=True)
class RopeKeys:
    """Where a config.json has the settings, beside `rope_parameters`, and what holds where it has none."""

    kind: str | None = None
    """Kind of the layers that rotate so, where `rope_parameters` has a section for each."""
    scaling: str | None = "rope_scaling"
    """None: those layers are not scaled in files that have no such sections."""
    theta: str = "rope_theta"
    fraction: str = "partial_rotary_factor"
    default_theta: float = 10_000.0
    default_fraction: float = 1.0
    interleaved: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Kinds that go by another name in this family."""


@dataclass(frozen=True)
class RopeSettings:
    """The rotation of the first `width` dimensions of each head."""

    theta: float
    width: int
    scaling: Scaling
    interleaved: bool = False
    """Neighbours are pairs, in the checkpoint: packed weights have i and i + width/2 as pairs in any case."""
    query_beta: float = 0.0
    """Queries are scaled by 1 + query_beta * log(1 + position // query_context) (Llama 4, Ministral 3)."""
    query_context: int = 1

    @classmethod
    def read(cls, config: ConfigFile, head_dim: int, keys: RopeKeys) -> RopeSettings:
        """From `rope_parameters`, or from `rope_scaling` and the keys beside it of older files."""
        section = _section(config, keys)
        place = section if section.has("partial_rotary_factor") else config
        key = "partial_rotary_factor" if place is section else keys.fraction
        width = int(head_dim * place.number(key, keys.default_fraction))
        if not 2 <= width <= head_dim or width % 2:
            raise place.refuse(key, f"a share of head_dim={head_dim} that is an even number of dimensions")
        theta = section.number("rope_theta", config.number(keys.theta, keys.default_theta))
        named = "rope_type" if section.has("rope_type") else "type"
        kind = section.choice(named, tuple(_SCALINGS), "default")
        scaling = _SCALINGS[keys.kinds.get(kind, kind)](section, config, width)
        if not section.has("llama_4_scaling_beta"):
            return cls(theta, width, scaling, keys.interleaved)
        return cls(
            theta, width, scaling, keys.interleaved, section.number("llama_4_scaling_beta"), _trained(section, config)
        )


def _section(config: ConfigFile, keys: RopeKeys) -> ConfigFile:
    """Where the settings of `keys` are: in a section for their kind of layers, or in one for all; or there are none."""
    parameters = config.section("rope_parameters")
    if parameters is not None and keys.kind is not None and parameters.has(keys.kind):
        return parameters.section(keys.kind) or parameters
    found = None if keys.scaling is None else parameters or config.section(keys.scaling)
    return found or ConfigFile(config.file, {})


def _positions(config: ConfigFile) -> int:
    return config.integer("max_position_embeddings", maximum=MAX_CONTEXT)


def _trained(section: ConfigFile, config: ConfigFile) -> int:
    """Context of the training: beside the section or in it, else the whole one."""
    key = "original_max_position_embeddings"
    place = config if config.has(key) else section
    return place.integer(key, _positions(config), maximum=MAX_CONTEXT)


def softmax_factor(config: ConfigFile) -> float:
    """Factor on queries and on keys of a model with latents, where its positions are scaled by YaRN."""
    section = config.section("rope_parameters") or config.section("rope_scaling")
    if section is None or not section.has("mscale_all_dim") or not section.has("factor"):
        return 1.0
    return _yarn_factor(section.number("factor"), section.number("mscale_all_dim"))


def _yarn_factor(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _frequencies(theta: float, width: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)


class Angles(NamedTuple):
    """What one rotation takes of the positions of `n` rows."""

    table: torch.Tensor | None
    """Cosines and sines [n, width] of the angles; None on CUDA, where the kernel computes them."""
    query_scale: torch.Tensor | None
    """[n, 1]; None: queries stay as they are."""


class Rotation:
    """Positions of `n` rows, and what the rotations of the model's layers take of them: each computes it once."""

    __slots__ = ("_angles", "positions")

    def __init__(self, positions: torch.Tensor) -> None:
        self.positions = positions
        """int64 [n]"""
        self._angles: dict[Rotary, Angles] = {}

    def angles(self, rotary: Rotary) -> Angles:
        """What `rotary`, which several layers may share, takes of the positions."""
        if rotary not in self._angles:
            self._angles[rotary] = rotary.angles(self.positions)
        return self._angles[rotary]


class HeadNorms(NamedTuple):
    """RMS norms of each head before it is rotated."""

    queries: torch.Tensor
    """[head_dim] weight of the first `num_queries` heads."""
    keys: torch.Tensor
    """[head_dim] weight of the others."""
    num_queries: int
    epsilon: float
    offset: float = 0.0
    """Added to the weights (1 in Gemma, which multiplies before it rounds)."""

    def apply_(self, heads: torch.Tensor) -> None:
        """Norms `heads` [n, m, head_dim] in place."""
        for part, weight in (
            (heads[:, : self.num_queries], self.queries),
            (heads[:, self.num_queries :], self.keys),
        ):
            if self.offset:
                part.copy_(
                    functional.rms_norm(part.float(), part.shape[-1:], self.offset + weight.float(), self.epsilon)
                )
            else:
                part.copy_(functional.rms_norm(part, part.shape[-1:], weight, self.epsilon))


class Rotary:
    """A rotation of a model that serves requests up to `context` tokens, computed in `dtype`."""

    def __init__(self, settings: RopeSettings, context: int, dtype: torch.dtype) -> None:
        self._settings = settings
        self._dtype = dtype
        self._factor = settings.scaling.attention_factor
        self._frequencies = settings.scaling.frequencies(settings.theta, settings.width, context)

    def angles(self, positions: torch.Tensor) -> Angles:
        """What `Rotation` keeps for int64 `positions` [n]."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        table = None if positions.is_cuda else make_table(positions, self._frequencies, self._factor, self._dtype)
        return Angles(table, self._query_scale(positions))

    def _query_scale(self, positions: torch.Tensor) -> torch.Tensor | None:
        settings = self._settings
        if not settings.query_beta:
            return None
        turns = torch.log1p((positions // settings.query_context).float())
        return (1 + settings.query_beta * turns).to(self._dtype)[:, None]

    def scale_(self, queries: torch.Tensor, rotation: Rotation) -> None:
        """Scales `queries` [n, m * head_dim] in place by their positions, in the models that do."""
        scale = rotation.angles(self).query_scale
        if scale is not None:
            queries *= scale

    def turn_(self, heads: torch.Tensor, rotation: Rotation, norms: HeadNorms | None = None) -> None:
        """Rotates the first dimensions of `heads` [n, m, d] in place, with `norms` normed first; rows and heads may lie
        apart."""
        table = rotation.angles(self).table
        fuses = table is None and self._settings.width == heads.shape[-1]
        if norms is not None and not fuses:
            norms.apply_(heads)
        if table is None:
            from hsrpc.model.kernels.fused import rotate_heads_  # loads Triton

            rotate_heads_(heads, rotation.positions, self._frequencies, self._factor, norms if fuses else None)
        else:
            rotate_(heads[..., : self._settings.width], table)


def make_table(positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines [n, 2*pairs] of the angles at `positions` [n], times `factor`; angles are float32."""
    angles = positions[:, None].float() * frequencies
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * factor).to(dtype)


def rotate_(x: torch.Tensor, table: torch.Tensor) -> None:
    """Rotates the heads `x` [n, heads, width] in place by `table`; dimension i pairs with i + width/2."""
    cos, sin = table[:, None, :].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)
