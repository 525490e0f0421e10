"""Rates of a machine, as calibration measures them."""

from __future__ import annotations

from dataclasses import dataclass

from hsrpc.plan.fitted import GATHER_BANDWIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates measured on the machine at hand."""

    load_bandwidth: float
    """Host to device, bytes/s."""
    store_bandwidth: float
    """Device to host, bytes/s."""
    gather_bandwidth: float = GATHER_BANDWIDTH
    """From other devices, bytes/s, where each of several gets a layer's parts from all others at once."""
    contended_share: float = 1.0
    """Part of the load bandwidth that is left while regeneration's GEMMs run."""
    gemm_rate: float
    """FLOP/s at the regeneration shape."""
    fp8_gemm_share: float = 1.0
    """Rate of the same products of float8 codes over that; 1 where the hardware has none: they are decoded."""
    memory_bandwidth: float
    """Device memory, bytes/s, read plus written."""
    duplex_share: float = 1.0
    """Part of both bandwidths that is left while loads and stores run at once."""
    prompt_rate_share: float = 1.0
    """Part of the GEMM rate at which whole layers of many tokens are computed, all their kernels included."""
    gemm_overhead: float = 0.0
    """Seconds that a GEMM takes beside its FLOP: where the line of time over rows begins."""
    weight_read_share: float = 1.0
    """Part of the memory bandwidth at which a GEMM of few rows reads its weights."""
    attention_read_share: float = 1.0
    """Part of the memory bandwidth at which cached K and V are read by attention."""
    small_kernel_time: float = 0.0
    """Seconds of a kernel between the GEMMs of a layer of few tokens, such as a norm, with the gap before it."""
    launch_time: float = 0.0
    """Host seconds to launch one layer of one mini-batch."""
    prompt_launch_time: float = 0.0
    """Host seconds to launch one layer of one mini-batch with prompts: more kernels, and attention takes longer."""
    hop_time: float = 0.0
    """Host seconds that a used bus adds to each: loads are launched, and where weights stream threads take turns."""
    handover_time: float = 0.0
    """Seconds that the bus loses with each mini-batch of a layer, whose buffer changes hands."""
    boundary_time: float = 0.0
    """Host seconds between two steps: schedule, sample, hand out."""
    request_time: float = 0.0
    """What each request adds to `boundary_time`, seconds."""

    @property
    def weight_bandwidth(self) -> float:
        """Bytes/s."""
        return self.memory_bandwidth * self.weight_read_share

    @property
    def attention_bandwidth(self) -> float:
        """Bytes/s."""
        return self.memory_bandwidth * self.attention_read_share
