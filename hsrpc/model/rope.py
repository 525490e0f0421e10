"""Rotary position embedding (Su et al., arXiv 2104.09864), with linear and Llama-3 scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hsrpc.model.bounds import MAX_CONTEXT
from hsrpc.model.config_file import ConfigFile

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeSettings:
    """Frequencies of the rotation; the last three hold for `llama3` alone."""

    kind: str
    theta: float
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 0

    @classmethod
    def read(cls, config: ConfigFile) -> RopeSettings:
        """From `rope_parameters`, or from `rope_scaling` and `rope_theta` of older files."""
        section = config.section("rope_parameters") or config.section("rope_scaling") or ConfigFile(config.file, {})
        for place in (section, config):
            if place.number("partial_rotary_factor", 1.0) != 1.0:
                raise place.refuse("partial_rotary_factor", "1.0 (every dimension of a head rotated)")
        theta = section.number("rope_theta", config.number("rope_theta", 10_000.0))
        kind = section.choice("rope_type" if section.has("rope_type") else "type", ROPE_TYPES, "default")
        if kind == "default":
            return cls(kind, theta)
        if kind == "linear":
            return cls(kind, theta, section.number("factor"))
        return cls._read_llama3(config, section, theta)

    @classmethod
    def _read_llama3(cls, config: ConfigFile, section: ConfigFile, theta: float) -> RopeSettings:
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if high <= low:
            raise section.refuse("high_freq_factor", f"more than low_freq_factor={low}")
        whole = config.integer("max_position_embeddings", maximum=MAX_CONTEXT)
        context = section.integer("original_max_position_embeddings", whole, maximum=MAX_CONTEXT)
        return cls("llama3", theta, section.number("factor"), low, high, context)


def rope_frequencies(settings: RopeSettings, head_dim: int) -> torch.Tensor:
    """Angle that one position turns each pair of dimensions by, float32 [head_dim / 2], on the CPU."""
    frequencies = 1.0 / settings.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if settings.kind == "llama3":
        return _scale_llama3(frequencies, settings)
    return frequencies / settings.factor


def _scale_llama3(frequencies: torch.Tensor, settings: RopeSettings) -> torch.Tensor:
    """Long waves slowed by `factor`, short ones kept, a linear blend between (Llama 3.1)."""
    turns = settings.original_context * frequencies / (2 * math.pi)
    low, high = settings.low_frequency_factor, settings.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / settings.factor + kept * frequencies


def make_rotation(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines [n, head_dim] of the angles at `positions` [n], for `rotate_`; the angles are float32."""
    angles = positions[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)


def rotate_(x: torch.Tensor, rotation: torch.Tensor) -> None:
    """Rotates the heads `x` [n, heads, head_dim] in place by `rotation`; dimension i pairs with i + head_dim/2."""
    cos, sin = rotation[:, None, :].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)
