"""Seconds of each kind of work in one layer, at the rates of a machine. The only place for these formulas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsrpc.plan.device_memory import Number
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import REGENERATE_ROWS
from hsrpc.plan.sizes import ModelSizes

_PLACE_COPIES = 2
"""Regenerated rows that are copied to where attention reads them are read and written once more."""
_LOGIT_BYTES = 4
_SMALL_KERNELS = 4
"""Of a layer beside GEMMs and attention, each counted as a norm: there are two, and shorter sums and copies."""
_DECODE_RATE_SHARE = 0.3
"""Of the memory bandwidth, for what decoding reads and writes: 0.33 (float16) and 0.45 (bfloat16) on an H100."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of each kind of work in one layer."""

    sizes: ModelSizes
    hardware: Hardware

    def load(self, size: Number) -> Number:
        """`size` bytes from the host."""
        return size / self.hardware.load_bandwidth

    def decode_weights(self, size: Number) -> Number:
        """Weights of which `size` bytes came over the bus."""
        sizes, rate = self.sizes, self.hardware.memory_bandwidth * _DECODE_RATE_SHARE
        return size * ((1 + 1 / sizes.coded_share) / rate if sizes.codes_weights else 0.0)

    def forward(self, queries: Number, groups: Number = 1.0) -> Number:
        """All but attention for `queries` tokens; each group of mini-batches reads the weights."""
        sizes, hardware = self.sizes, self.hardware
        compute = groups * hardware.gemm_overhead + queries * sizes.layer_flop / hardware.gemm_rate
        read = groups * sizes.layer_bytes / hardware.weight_bandwidth
        return np.maximum(compute, read) + groups * (_SMALL_KERNELS * hardware.small_kernel_time)

    def regenerate(self, tokens: Number) -> Number:
        """The GEMMs alone."""
        hardware = self.hardware
        each = self.sizes.regenerate_flop / hardware.gemm_rate + hardware.gemm_overhead / REGENERATE_ROWS
        return tokens * each

    def place(self, tokens: Number) -> Number:
        """Regenerated K and V copied to their rows."""
        return tokens * (_PLACE_COPIES * self.sizes.kv_bytes / self.hardware.memory_bandwidth)

    def gather(self, tokens: Number) -> Number:
        """Activations within device memory: read and written."""
        return tokens * (2 * self.sizes.activation_bytes / self.hardware.memory_bandwidth)

    def attention(self, tokens: Number, queries: Number, context: float) -> Number:
        """`queries` queries to `context` tokens each; `tokens` cached tokens are read in all."""
        sizes, hardware = self.sizes, self.hardware
        read = tokens * (sizes.kv_bytes / hardware.attention_bandwidth)
        return np.maximum(read, queries * (sizes.attention_flop(round(context)) / hardware.gemm_rate))

    def head(self, queries: Number) -> Number:
        """Logits of `queries` tokens, once a step: the head's weights read, float32 logits written and read."""
        sizes, hardware = self.sizes, self.hardware
        weights = sizes.vocab_size * sizes.hidden_size
        compute = queries * (2 * weights / hardware.gemm_rate)
        read = np.maximum(compute, weights * sizes.element_bytes / hardware.weight_bandwidth)
        return read + queries * (2 * _LOGIT_BYTES * sizes.vocab_size / hardware.memory_bandwidth)

    def prompt_token(self, context: float) -> float:
        """One token of a prompt that attends to `context` tokens on average, among many."""
        flop = self.sizes.layer_flop + self.sizes.attention_flop(round(context))
        return flop / (self.hardware.gemm_rate * self.hardware.prompt_rate_share)
