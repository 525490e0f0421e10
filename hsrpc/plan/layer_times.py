"""Seconds of each kind of work in a layer, at the rates of a machine. The only place for these formulas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import REGENERATE_ROWS
from hsrpc.plan.sizes import LayerSizes, ModelSizes, Number
from hsrpc.schedule.blocks import BlockKind

_PLACE_COPIES = 2
"""Regenerated rows that are copied to where attention reads them are read and written once more."""
_LOGIT_BYTES = 4
_ABSORBING_GEMMS = 2
"""One takes queries to activations, one what they gather to values."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of each kind of work in one layer, on average over the model's layers."""

    sizes: ModelSizes
    hardware: Hardware

    def load(self, size: Number) -> Number:
        """`size` bytes from the host."""
        return size / self.hardware.load_bandwidth

    def decode_weights(self, traffic: Number) -> Number:
        """Weights for which decoding reads and writes `traffic` bytes of device memory."""
        return traffic / self.hardware.memory_bandwidth

    def forward(self, queries: Number, groups: Number = 1.0) -> Number:
        """All but attention for `queries` tokens; each group of mini-batches reads the weights."""
        hardware = self.hardware

        def products(layer: LayerSizes) -> Number:
            compute = groups * hardware.gemm_overhead + layer.flop(queries) / hardware.gemm_rate
            return np.maximum(compute, groups * layer.read_bytes(queries / groups) / hardware.weight_bandwidth)

        kernels = self.sizes.mean(lambda layer: layer.small_kernels)
        return self.sizes.mean(products) + groups * (kernels * hardware.small_kernel_time)

    def regenerate(self, tokens: Number) -> Number:
        """The GEMMs, and copies of keys that these do not write where they belong."""
        hardware = self.hardware

        def product(layer: LayerSizes) -> Number:
            each = layer.regenerate_flop / hardware.gemm_rate + hardware.gemm_overhead / REGENERATE_ROWS
            return tokens * (each + _PLACE_COPIES * layer.scattered_bytes / hardware.memory_bandwidth)

        return self.sizes.mean(product)

    def place(self, tokens: Number) -> Number:
        """Regenerated K and V copied to their rows."""
        moved = self.sizes.mean(lambda layer: layer.rebuilt_bytes)
        return tokens * (_PLACE_COPIES * moved / self.hardware.memory_bandwidth)

    def gather(self, tokens: Number) -> Number:
        """Activations within device memory: read and written."""
        row = self.sizes.mean_row_bytes(BlockKind.ACTIVATION)
        return tokens * (2 * row / self.hardware.memory_bandwidth)

    def attention(self, tokens: Number, queries: Number, context: float) -> Number:
        """`queries` queries to `context` tokens each; `tokens` cached tokens are read in all, by layers that see them.

        A layer with a narrower window than the `context` reads as much less.
        """
        hardware = self.hardware

        def attend(layer: LayerSizes) -> Number:
            seen = layer.attended(round(context))
            part = seen / context if seen < context else 1.0
            read = tokens * part * (layer.rebuilt_bytes / hardware.attention_bandwidth)
            return np.maximum(read, queries * (layer.attention_flop(seen) / hardware.gemm_rate))

        return self.sizes.mean(attend)

    def absorbed(self, tokens: Number, queries: Number, context: float) -> Number:
        """As `attention`, to activations as they are stored, without K and V."""
        hardware = self.hardware

        def attend(layer: LayerSizes) -> Number:
            if layer.absorbed is None:
                raise ValueError("the attention of some layer needs K and V")
            read = tokens * (layer.activation.num_bytes / hardware.attention_bandwidth)
            compute = queries * (layer.absorbed.flop(round(context)) / hardware.gemm_rate)
            return np.maximum(read, compute) + _ABSORBING_GEMMS * hardware.gemm_overhead

        return self.sizes.mean(attend)

    def head(self, queries: Number) -> Number:
        """Logits of `queries` tokens, once a step: the head's weights read, float32 logits written and read."""
        sizes, hardware = self.sizes, self.hardware
        weights = sizes.vocab_size * sizes.hidden_size
        compute = queries * (2 * weights / hardware.gemm_rate)
        read = np.maximum(compute, weights * sizes.compute_bytes / hardware.weight_bandwidth)
        return read + queries * (2 * _LOGIT_BYTES * sizes.vocab_size / hardware.memory_bandwidth)

    def prompt_token(self, context: float) -> float:
        """One token of a prompt that attends to `context` tokens on average, among many."""
        flop = self.sizes.mean(lambda layer: layer.flop(1) + layer.attention_flop(round(context)))
        return float(flop) / (self.hardware.gemm_rate * self.hardware.prompt_rate_share)
