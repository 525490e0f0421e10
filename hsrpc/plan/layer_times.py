"""Seconds of each kind of work in a layer, at the rates of a machine. The only place for these formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hsrpc.plan.fitted import CHOICE_SECONDS, PRODUCT_WAITING
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import REGENERATE_ROWS
from hsrpc.plan.sizes import LayerSizes, ModelSizes, Number

_PLACE_COPIES = 2
"""Rebuilt keys that are copied to where they belong are read and written once more."""
_LOGIT_BYTES = 4
_HALF = 0.5
"""Mantissa of a power of two."""
_ABSORBING_GEMMS = 2
"""One takes queries to activations, one what they gather to values."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of each kind of work in one layer, on average over the model's layers."""

    sizes: ModelSizes
    hardware: Hardware
    product_waiting: float = PRODUCT_WAITING
    """How sharply products turn from reading weights to computing; infinite: the longer of both is all."""

    def load(self, size: Number) -> Number:
        """`size` bytes from the host."""
        return size / self.hardware.load_bandwidth

    def gather_weights(self, size: Number) -> Number:
        """`size` bytes from other GPUs."""
        return size / self.hardware.gather_bandwidth

    def arrival(self, on_bus: Number, from_buses: Number, from_devices: Number) -> Number:
        """Weights in a buffer: over the bus and from other GPUs at once, as `PlacedSizes` has these bytes."""
        found: Number = np.maximum(self.load(on_bus), self.gather_weights(from_buses + from_devices))
        return found

    def on_demand(self, tokens: Number, missed: Number, groups: Number = 1.0) -> Number:
        """The part `missed` of the experts that `tokens` tokens take, once they are chosen; each group loads its own.

        All experts are as likely: trained routers come back to some of them, so that fewer are missed.
        """

        def loads(layer: LayerSizes) -> Number:
            if layer.experts is None:
                return 0.0
            touched = groups * layer.experts.touched(tokens / groups)
            return self.load(missed * touched * layer.expert_bus_bytes) + groups * CHOICE_SECONDS

        return self.sizes.mean(loads)

    def decode_weights(self, traffic: Number) -> Number:
        """Weights for which decoding reads and writes `traffic` bytes of device memory."""
        return traffic / self.hardware.memory_bandwidth

    def decode_experts(self, traffic: Number, tokens: Number) -> Number:
        """Experts that `tokens` tokens take, where `traffic` bytes are for all of them."""
        counts = [(layer.experts, count) for layer, count in self.sizes.distinct if layer.experts is not None]
        if not counts:
            return 0.0
        shares = sum(count * experts.touched_share(tokens) for experts, count in counts)
        return self.decode_weights(traffic) * shares / sum(count for _, count in counts)

    def code_weight(self) -> float:
        """[W_K W_V], where it is coded to rebuild with: read and written once a step."""
        return float(self.sizes.mean(lambda layer: layer.coding_traffic)) / self.hardware.memory_bandwidth

    def forward(self, queries: Number, groups: Number = 1.0, touched: Number | None = None) -> Number:
        """All but attention for `queries` tokens; each group of mini-batches reads the weights.

        `touched`: experts of a layer that a group takes; None: as many as on average.
        """
        hardware = self.hardware

        def products(layer: LayerSizes) -> Number:
            compute = groups * hardware.gemm_overhead + layer.flop(queries) / hardware.gemm_rate
            read = groups * layer.read_bytes(queries / groups, touched) / hardware.weight_bandwidth
            return beside(compute, read, self.product_waiting)

        kernels = self.sizes.mean(lambda layer: layer.small_kernels)
        return self.sizes.mean(products) + groups * (kernels * hardware.small_kernel_time)

    def expert_products(self, queries: Number, touched: Number) -> Number:
        """What of `forward` are the products of experts, of which `queries` tokens take `touched` in a layer."""

        def products(layer: LayerSizes) -> Number:
            experts = layer.experts
            if experts is None:
                return 0.0
            compute = queries * (2 * experts.k * experts.num_elements / self.hardware.gemm_rate)
            return beside(
                compute, touched * experts.device_bytes / self.hardware.weight_bandwidth, self.product_waiting
            )

        return self.sizes.mean(products)

    def regenerate(self, tokens: Number, context: int = 0) -> Number:
        """K and V of `tokens` cached tokens, of each `context` those that a layer sees; without `context`, all.

        The GEMMs, copies of keys that these do not write where they belong, and passes from 8 bits and to them.
        """
        hardware = self.hardware

        def product(layer: LayerSizes) -> Number:
            each = layer.regenerate_flop / rebuild_rate(layer, hardware) + hardware.gemm_overhead / REGENERATE_ROWS
            copied = _PLACE_COPIES * layer.scattered_bytes + layer.recoded_bytes
            return tokens * layer.seen_part(context) * (each + copied / hardware.memory_bandwidth)

        return self.sizes.mean(product)

    def gather(self, tokens: Number, context: int) -> Number:
        """Activations within device memory, as far as layers see them: read and written."""
        row = self.sizes.mean(lambda layer: layer.seen_part(context) * layer.activation.num_bytes)
        return tokens * (2 * row / self.hardware.memory_bandwidth)

    def copy(self, tokens: Number, context: int) -> Number:
        """K and V within device memory, as `gather`."""
        row = self.sizes.mean(lambda layer: layer.seen_part(context) * layer.kv.num_bytes)
        return tokens * (2 * row / self.hardware.memory_bandwidth)

    def attention(self, tokens: Number, queries: Number, context: int) -> Number:
        """`queries` queries to `context` tokens each; of `tokens` cached tokens in all, layers read what they see."""
        hardware = self.hardware

        def attend(layer: LayerSizes) -> Number:
            read = tokens * layer.seen_part(context) * (layer.kv.num_bytes / hardware.attention_bandwidth)
            return np.maximum(read, queries * (layer.attention_flop(layer.attended(context)) / hardware.gemm_rate))

        return self.sizes.mean(attend)

    def absorbed(self, tokens: Number, queries: Number, context: int) -> Number:
        """As `attention`, to activations as they are stored, without K and V."""
        hardware = self.hardware

        def attend(layer: LayerSizes) -> Number:
            if layer.absorbed is None:
                raise ValueError("the attention of some layer needs K and V")
            read = tokens * layer.seen_part(context) * (layer.activation.num_bytes / hardware.attention_bandwidth)
            compute = queries * (layer.absorbed.flop(layer.attended(context)) / hardware.gemm_rate)
            return np.maximum(read, compute) + _ABSORBING_GEMMS * hardware.gemm_overhead

        return self.sizes.mean(attend)

    def head(self, queries: Number, parts: Number = 1) -> Number:
        """Logits of `queries` tokens, once a step: float32 logits written and read, the head's weights read for each of
        the `parts` that are sampled one after the other.
        """
        sizes, hardware = self.sizes, self.hardware
        weights = sizes.vocab_size * sizes.hidden_size
        compute = queries * (2 * weights / hardware.gemm_rate)
        read = np.maximum(compute, np.ceil(parts) * (weights * sizes.compute_bytes / hardware.weight_bandwidth))
        return read + queries * (2 * _LOGIT_BYTES * sizes.vocab_size / hardware.memory_bandwidth)

    def prompt_token(self, context: float) -> float:
        """One token of a prompt that has `context` tokens before it on average, among many."""
        flop = self.sizes.mean(lambda layer: layer.flop(1) + layer.attention_flop(layer.attended(round(context))))
        return float(flop) / (self.hardware.gemm_rate * self.hardware.prompt_rate_share)


def rebuild_rate(layer: LayerSizes, hardware: Hardware) -> float:
    """FLOP/s of the GEMM that rebuilds K and V: of codes where the weight is coded, else of numbers."""
    return hardware.gemm_rate * (hardware.fp8_gemm_share if layer.coded_weight_bytes else 1.0)


def beside(one: Number, other: Number, waiting: float) -> Number:
    """Seconds until both are done, which work at the same time and wait for each other now and then.

    They take the longer of both, and up to 2**(1/waiting) of it where they are equally long.
    """
    longer = np.maximum(np.maximum(one, other), 1e-12)
    if math.isinf(waiting):
        return longer
    found: Number = longer * _root(1 + _power(np.minimum(one, other) / longer, waiting), waiting)
    return found


def _power(base: Number, exponent: float) -> Number:
    """`base` ** `exponent`; squared where that is a power of two, which takes a tenth of the time."""
    if math.frexp(exponent)[0] != _HALF or exponent < 1:
        return base**exponent
    while exponent > 1:
        base, exponent = base * base, exponent / 2
    return base


def _root(base: Number, degree: float) -> Number:
    """The inverse of `_power`."""
    if math.frexp(degree)[0] != _HALF or degree < 1:
        return base ** (1 / degree)
    while degree > 1:
        base, degree = np.sqrt(base), degree / 2
    return base
