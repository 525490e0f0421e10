"""Caches in 8 bits as the documents define them, put into transformers' models: written apart from the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
POSITIVE = E4M3[:127]
"""Codes from 0 to the largest, in order; the 127th would be NaN."""


def nearest(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The nearest of the ascending `numbers` to each of x >= 0; of two as near the one with the even place."""
    above = torch.searchsorted(numbers, x.contiguous()).clamp(max=len(numbers) - 1)
    below = (above - 1).clamp(min=0)
    low, high = x - numbers[below], numbers[above] - x
    takes_low = (low < high) | ((low == high) & (below % 2 == 0))
    return numbers[torch.where(takes_low, below, above)]


def bfloat16_above(x: torch.Tensor) -> torch.Tensor:
    """The least bfloat16 numbers that are no less than x > 0."""
    rounded = x.to(torch.bfloat16)
    higher = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(rounded.double() < x, higher, rounded).double()


def rounded(x: torch.Tensor, codes: str) -> torch.Tensor:
    """x [..., w] as it comes back of 8 bits, where the last dimension shares a scale."""
    numbers = POSITIVE if codes == "fp8" else torch.arange(128).double()
    wide = x.double()
    scale = bfloat16_above(wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / numbers[-1])
    return (wide.sign() * nearest((wide / scale).abs(), numbers) * scale).to(x.dtype)


@dataclass(frozen=True)
class Rounding:
    """What is rounded, and to what; None: it is not."""

    kv: str | None = None
    activation: str | None = None
    weight: str | None = None
    """[W_K W_V], where activations are."""


class RoundingCache(DynamicCache):
    """K and V, each head of a token with a scale, as soon as they are made."""

    def __init__(self, model: PreTrainedModel, codes: str | None) -> None:
        super().__init__(config=model.config)
        self._codes = codes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._codes is not None:
            key_states, value_states = rounded(key_states, self._codes), rounded(value_states, self._codes)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextmanager
def rounding(model: PreTrainedModel, how: Rounding) -> Iterator[RoundingCache]:
    """Inside it, projections to K and V take rounded inputs and weights; gives the cache of a generation."""
    with ExitStack() as undo:
        for module in model.modules():
            for name in ("k_proj", "v_proj"):
                projection = getattr(module, name, None)
                if projection is None:
                    continue
                if how.activation is not None:
                    undo.enter_context(removing(projection.register_forward_pre_hook(rounds_input(how.activation))))
                if how.weight is not None:
                    undo.callback(setattr, projection.weight, "data", projection.weight.data)
                    projection.weight.data = rounded(projection.weight.data, how.weight)
        yield RoundingCache(model, how.kv)


@contextmanager
def removing(handle: RemovableHandle) -> Iterator[None]:
    yield
    handle.remove()


def rounds_input(codes: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    return lambda _, inputs: (rounded(inputs[0], codes),)
