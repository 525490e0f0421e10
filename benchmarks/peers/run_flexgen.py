"""FlexGen 0.1.8 from its Python interface, with random weights and its own timers.

Changed from outside, all in its favour: weights are random and not all ones; those on the host are pinned in exact
sizes. Its cache on the host stays as it makes it: not pinned.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from flexgen import flex_opt
from flexgen.compression import CompressionConfig
from flexgen.pytorch_backend import DeviceType, TorchDevice, TorchDisk, TorchMixedDevice, TorchTensor
from flexgen.timer import timers

from benchmarks.peers import cuda_memory
from benchmarks.peers.cases import Setup, random_prompts
from benchmarks.peers.flexgen_plan import RELAY_BYTES, footprint
from benchmarks.peers.record import PeerRun, Timing, Traffic

_DEVIATION = 0.02
_WARM_UP_PROMPT = 32
_NO_COMPRESSION = CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False)
"""Asked for by its policy; unused."""


def run(setup: Setup) -> PeerRun:
    """Load, warm up, generate."""
    pinned = cuda_memory.PinnedWeights()
    flex_opt.init_weight_list = weight_initialiser(pinned.random, cuda_memory.random_on_gpu)
    started = time.perf_counter()
    with _environment() as environment:
        model = flex_opt.OptLM(flex_opt.get_opt_config(setup.model), environment, flex_opt.DUMMY_WEIGHT, policy(setup))
        loaded = time.perf_counter()
        cuda_memory.reset_peak()
        timing = generate(model, setup)
        peak = cuda_memory.peak_bytes()
    relays = max(RELAY_BYTES, cuda_memory.pinned_by_torch())
    return PeerRun(
        timing=timing,
        traffic=_traffic(setup),
        peak_device_bytes=peak,
        host_bytes=pinned.num_bytes + relays + footprint(setup).host_cache,
        load_seconds=loaded - started,
    )


def generate(model: Any, setup: Setup) -> Timing:
    """One short run that warms up, then the one that counts."""
    prompts = random_prompts(setup)
    model.generate([prompt[:_WARM_UP_PROMPT] for prompt in prompts], max_new_tokens=1)
    timer = timers("generate")
    timer.reset()
    tokens = model.generate(prompts, max_new_tokens=setup.output, cut_gen_len=setup.steps)
    made = tokens[:, setup.prompt : setup.prompt + len(timer.costs)]
    if (made < 0).any() or len(set(made.ravel().tolist())) < 2:
        raise ValueError("all new tokens are alike: the weights are not random, or the run went wrong")
    return Timing(prefill=timer.costs[0], steps=timer.costs[1:])


def policy(setup: Setup) -> Any:
    """Everything that its policy allows to tune, without compression and sparsity, which change the numbers."""
    return flex_opt.Policy(
        (setup.batch or 0) // setup.num_batches,
        setup.num_batches,
        *setup.percent,
        overlap=True,
        sep_layer=True,
        pin_weight=True,
        cpu_cache_compute=setup.cpu_attention,
        attn_sparsity=1.0,
        compress_weight=False,
        comp_weight_config=_NO_COMPRESSION,
        compress_cache=False,
        comp_cache_config=_NO_COMPRESSION,
    )


Maker = Callable[[Sequence[int], float, float], torch.Tensor]
"""A tensor of a shape, normal with a mean and a deviation."""


def weight_initialiser(on_host: Maker, on_gpu: Maker) -> Callable[..., list[Any]]:
    """Stands for FlexGen's `init_weight_list`: the same placement, other values."""

    def initialise(specs: list[tuple[Sequence[int], Any, str]], policy: Any, environment: Any) -> list[Any]:
        percents = [policy.w_disk_percent, policy.w_cpu_percent, policy.w_gpu_percent]
        devices = [environment.disk, environment.cpu, environment.gpu]
        total, before, weights = sum(torch.Size(shape).numel() for shape, _, _ in specs), 0, []
        for shape, _, name in specs:
            size = torch.Size(shape).numel()
            home = flex_opt.get_choice((before + size / 2) / total * 100, percents, devices)
            make = on_host if home.device_type == DeviceType.CPU else on_gpu
            mean = 1.0 if name.endswith("layer_norm.weight") else 0.0
            weights.append(TorchTensor.create_from_torch(make(shape, mean, _DEVIATION), home))
            before += size
        return weights

    return initialise


@contextmanager
def _environment() -> Iterator[Any]:
    """Its devices; its copy threads end with the block."""
    with tempfile.TemporaryDirectory() as folder:
        gpu, cpu, disk = TorchDevice("cuda:0"), TorchDevice("cpu"), TorchDisk(folder)
        environment = flex_opt.ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=TorchMixedDevice([gpu, cpu, disk]))
        try:
            yield environment
        finally:
            environment.close_copy_threads()


def _traffic(setup: Setup) -> Traffic:
    """What moves in a step in the middle of the run."""
    used, batch, context = footprint(setup), setup.batch or 0, setup.mean_context
    cache = int(batch * context * used.host_cache_per_token)
    return Traffic(batch=batch, context=context, weights=used.streamed_weights, cache=cache)
