"""What this machine can do: bus both ways, GEMM times over rows, memory and launches, measured in about two seconds.

Another program on the same cores can make every operation of many threads wait for a thread that does not run, for
milliseconds each. So each measurement has a time after which it makes do with what it has, and one thread measures
where all are slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, takewhile

import numpy as np
import torch
from torch.nn import functional

from hsrpc.device.device import Device
from hsrpc.device.group import DeviceGroup
from hsrpc.plan import fitted
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.memory_use import DeviceUse, HostUse
from hsrpc.plan.sizes import LayerSizes, ModelSizes

_REPEATS = 9
"""Repetitions of a measurement. The lower quartile of their times counts, since disturbances only add time."""
_PIECES = 4
"""Pieces of memory copied in turn, so that they come from memory and not from the host's caches, as the engine's do."""
_BUS_REPEATS = 20
"""Repetitions of a copy: more, since others use the bus of a shared machine more than its GPU. Loads are measured
twice, some time apart, since a disturbance may outlast all repetitions of one measurement."""
_MIN_REPEATS = 4
"""Repetitions in any case, a warm-up among them."""
_NORM_ROWS = 64
"""Rows of the norms that stand for the small kernels of a layer."""


@dataclass(frozen=True, slots=True)
class _Amounts:
    """How much is copied and computed for a measurement."""

    copy_bytes: int
    rows: tuple[int, ...]
    """Rows of the GEMMs that the line is fitted to."""
    decode_rows: int
    """Rows of a GEMM that takes as long as reading its weights, where memory is the limit."""
    weight_bytes: int
    """Bytes of the weights that it reads in turn: more than caches hold."""
    loops: int
    """Launches for each reading of the clock: to wait for the device takes longer than some of them."""
    norms: int
    """Norms in a row: on a GPU as many as make a graph worth its launch."""
    enough: float
    """Seconds after which a measurement needs no more repetitions."""
    waking: float
    """Seconds of work before anything is measured."""
    sustained: float
    """Seconds of copies that show what the bus keeps up."""


_ON_CPU = _Amounts(
    copy_bytes=8 * 1024**2,
    rows=(16, 32, 64),
    decode_rows=1,
    weight_bytes=16 * 1024**2,
    loops=1,
    norms=5,
    enough=0.25,
    waking=0.0,
    sustained=0.05,
)
_ON_GPU = _Amounts(
    copy_bytes=256 * 1024**2,
    rows=(1024, 2048, 4096, 8192),
    decode_rows=32,
    weight_bytes=512 * 1024**2,
    loops=10,
    norms=50,
    enough=2.0,
    waking=0.2,
    sustained=1.5,
)


def calibrate(device: Device, sizes: ModelSizes, dtype: torch.dtype) -> Hardware:
    """Measure the rates at the model's shapes, after a warm-up: lower quartiles of nine times, of the bus of twenty.

    Fewer where the machine takes long for them: on the CPU 0.25 s for each of a dozen measurements.
    """
    with _undisturbed_threads(device):
        return _calibrate(device, sizes, dtype)


def _calibrate(device: Device, sizes: ModelSizes, dtype: torch.dtype) -> Hardware:
    amounts, layer = _amounts(device), sizes.commonest
    _wake(device, _regeneration(device, layer, dtype, amounts.rows[-1]), amounts.waking)
    memory_bandwidth, read_bandwidth = _memory_rates(device, amounts)
    gemm_rate, gemm_overhead, weight_bandwidth = _gemm_rates(device, layer, dtype, amounts)
    try:
        source = device.pinned(_PIECES * amounts.copy_bytes, HostUse.MEASUREMENT)
        source.zero_()
        pieces = cycle(source.split(amounts.copy_bytes))
        load, store, both = _bus_seconds(device, pieces, amounts.copy_bytes)
        rows = amounts.rows[-1]
        product = _regeneration(device, layer, dtype, rows)
        count = math.ceil(2 * load * gemm_rate / (rows * layer.regenerate_flop))  # they outlast the copy
        alone, contended = _contended_seconds(device, pieces, product, count)
    finally:
        device.release_pinned()
    launch = _launch_seconds(device)
    small_kernel = _norm_seconds(device, layer, dtype, amounts)
    device.release_cached()
    return Hardware(
        load_bandwidth=amounts.copy_bytes / min(load, alone),
        store_bandwidth=amounts.copy_bytes / store,
        duplex_share=min(1.0, max(load, store) / both),
        contended_share=min(1.0, alone / contended),
        gemm_rate=gemm_rate,
        fp8_gemm_share=_fp8_share(device, layer, dtype, amounts),
        prompt_rate_share=fitted.PROMPT_RATE_SHARE,
        gemm_overhead=gemm_overhead,
        memory_bandwidth=memory_bandwidth,
        weight_read_share=weight_bandwidth / memory_bandwidth,
        attention_read_share=fitted.ATTENTION_RATE_SHARE * read_bandwidth / memory_bandwidth,
        small_kernel_time=small_kernel,
        launch_time=fitted.LAUNCHES * launch,
        prompt_launch_time=fitted.PROMPT_LAUNCHES * launch,
        hop_time=fitted.HOP_SECONDS,
        handover_time=fitted.HANDOVER_SECONDS,
        boundary_time=fitted.BOUNDARY_SECONDS,
        request_time=fitted.REQUEST_SECONDS,
    )


def gather_bandwidth(device: Device, group: DeviceGroup) -> float:
    """Bytes/s that this device gets from the others of a group, which all measure it at once: collective operations.

    All repeat it equally often, whatever time each finds.
    """
    amounts = _amounts(device)
    part = group.part_bytes(amounts.copy_bytes)
    whole = device.empty((group.size * part,), torch.uint8, DeviceUse.MEASUREMENT)
    whole.zero_()
    own = whole[group.rank * part :][:part]
    device.drain()
    times = []
    for _ in range(1 + _REPEATS):
        group.meet()
        start = time.perf_counter()
        with device.on(device.gather):
            group.gather(whole, own)
        device.synchronize(device.record(device.gather))
        times.append(time.perf_counter() - start)
    return (len(whole) - part) / _lower_quartile(times[1:])


def sustained_load(device: Device) -> float:
    """Bytes/s of plain copies to the device, one behind the other, whatever disturbs them; takes 1.5 s on a GPU."""
    amounts, moved = _amounts(device), 0
    target = device.empty((amounts.copy_bytes,), torch.uint8, DeviceUse.MEASUREMENT)
    try:
        source = device.pinned(_PIECES * amounts.copy_bytes, HostUse.MEASUREMENT)
        source.zero_()
        device.drain()
        start = time.perf_counter()
        while time.perf_counter() - start < amounts.sustained:
            with device.on(device.load):
                for piece in source.split(amounts.copy_bytes):
                    target.copy_(piece, non_blocking=True)
            device.synchronize(device.record(device.load))
            moved += len(source)
        return moved / (time.perf_counter() - start)
    finally:
        device.release_pinned()


def _amounts(device: Device) -> _Amounts:
    return _ON_CPU if device.torch_device.type == "cpu" else _ON_GPU


def fit_line(rows: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds a row, and beside all rows, by least squares of the relative error.

    Noise that would make either negative gives the line through the origin instead.
    """
    x, y = np.array(rows, dtype=np.float64), np.array(seconds, dtype=np.float64)
    columns = np.stack((x / y, 1 / y), axis=1)
    (slope, overhead), *_ = np.linalg.lstsq(columns, np.ones_like(x))
    if slope > 0 and overhead >= 0:
        return float(slope), float(overhead)
    through_origin = x / y
    return float(through_origin.sum() / (through_origin @ through_origin)), 0.0


def _bus_seconds(device: Device, pieces: Iterator[torch.Tensor], size: int) -> tuple[float, float, float]:
    """Seconds to load the next of `pieces`, to store, and to do both at once, `size` bytes each."""
    sink = device.pinned(size, HostUse.MEASUREMENT)
    sink.zero_()
    target, origin = (device.empty((size,), torch.uint8, DeviceUse.MEASUREMENT) for _ in range(2))
    origin.zero_()
    load = _undisturbed_seconds(device, lambda: target.copy_(next(pieces), non_blocking=True))
    store = _undisturbed_seconds(device, lambda: sink.copy_(origin, non_blocking=True))

    def both() -> None:
        begun = device.record(device.compute)
        device.wait(device.store, begun)
        with device.on(device.store):
            sink.copy_(origin, non_blocking=True)
        target.copy_(next(pieces), non_blocking=True)
        device.wait(device.compute, device.record(device.store))

    return load, store, _undisturbed_seconds(device, both)


def _contended_seconds(
    device: Device, pieces: Iterator[torch.Tensor], product: Callable[[], object], count: int
) -> tuple[float, float]:
    """Seconds to load the next of `pieces`, alone and while the device computes `count` products, in turn."""
    target = torch.empty_like(next(pieces), device=device.torch_device)

    def seconds(products: int) -> float:
        device.synchronize(device.record(device.compute))
        with device.on(device.compute), torch.inference_mode():
            for _ in range(products):
                product()
        start = time.perf_counter()
        with device.on(device.load):
            target.copy_(next(pieces), non_blocking=True)
        device.synchronize(device.record(device.load))
        return time.perf_counter() - start

    times = [(seconds(0), seconds(count)) for _ in _repetitions(device, _BUS_REPEATS)]
    alone, contended = zip(*times, strict=True)
    return _lower_quartile(alone), _lower_quartile(contended)


@contextmanager
def _undisturbed_threads(device: Device) -> Iterator[None]:
    """One thread for torch meanwhile, where a copy by all of them takes twice as long: others have their cores."""
    threads = torch.get_num_threads()
    if device.torch_device.type != "cpu" or threads == 1:
        yield
        return
    source, target = (device.empty((_ON_CPU.copy_bytes,), torch.uint8, DeviceUse.MEASUREMENT) for _ in range(2))
    source.zero_()
    by_all = _seconds(device, lambda: target.copy_(source))
    torch.set_num_threads(1)
    try:
        if by_all < 2 * _seconds(device, lambda: target.copy_(source)):
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads)


def _wake(device: Device, work: Callable[[], object], seconds: float) -> None:
    """A GPU that was idle has low clocks at first: on an H100, memory had 0.86 of its bandwidth."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        _seconds(device, work)


def _memory_rates(device: Device, amounts: _Amounts) -> tuple[float, float]:
    """Bytes/s of device memory: read plus written by a copy, and read alone, as attention reads cached K and V."""
    size, loops = amounts.copy_bytes, amounts.loops
    source, target = (device.empty((size,), torch.uint8, DeviceUse.MEASUREMENT) for _ in range(2))
    source.zero_()
    words = source.view(torch.int32)
    copy = _seconds(device, lambda: target.copy_(source), loops)
    read = _seconds(device, lambda: torch.amax(words), loops)
    return 2 * size / copy, size / read


def _gemm_rates(device: Device, layer: LayerSizes, dtype: torch.dtype, amounts: _Amounts) -> tuple[float, float, float]:
    """FLOP/s and overhead (s) at the regeneration shape, and bytes/s at which a GEMM of few rows reads its weights."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device.torch_device, dtype=dtype)

    products = (_regeneration(device, layer, dtype, rows) for rows in amounts.rows)
    seconds = [_seconds(device, product, amounts.loops) for product in products]
    per_row, overhead = fit_line(amounts.rows, seconds)
    width = _read_width(layer, amounts.weight_bytes // (layer.hidden_size * dtype.itemsize))
    size = width * layer.hidden_size * dtype.itemsize
    weights = [random(width, layer.hidden_size) for _ in range(max(1, amounts.weight_bytes // size))]
    few = random(amounts.decode_rows, layer.hidden_size)

    def decode() -> None:
        for weight in weights:
            functional.linear(few, weight)

    # Launched as one: the host takes as long to launch a small GEMM as the device to compute it.
    [graph] = device.capture(decode)
    decoding = _seconds(device, graph, amounts.loops)
    flop = 2 * layer.activation.width * (layer.key_size + layer.value_size)
    return flop / per_row, overhead, size * len(weights) / decoding


def _read_width(layer: LayerSizes, max_width: int) -> int:
    """Outputs of a product that reads as many weights at once as the layer does: of experts one launch reads all."""
    if layer.experts is None:
        return layer.ffn_size
    return max(layer.ffn_size, min(layer.ffn_size // layer.experts.k * layer.experts.count, max_width))


def _regeneration(device: Device, layer: LayerSizes, dtype: torch.dtype, rows: int) -> Callable[[], object]:
    """A product that rebuilds K and V of as many activations."""
    x, weight = (
        torch.randn(size, layer.activation.width, device=device.torch_device, dtype=dtype)
        for size in (rows, layer.key_size + layer.value_size)
    )
    return partial(functional.linear, x, weight)


def _fp8_share(device: Device, layer: LayerSizes, dtype: torch.dtype, amounts: _Amounts) -> float:
    """Rate of products of float8 codes with scales by rows over that of 16 bits, at the regeneration shape.

    1 where the hardware multiplies no such codes, or none of that shape.
    """
    if device.torch_device.type == "cpu":
        return 1.0
    rows = amounts.rows[-1]
    try:
        product = _fp8_regeneration(device, layer, dtype, rows)
        coded = _seconds(device, product, amounts.loops)
    except RuntimeError:
        return 1.0
    return max(1.0, _seconds(device, _regeneration(device, layer, dtype, rows), amounts.loops) / coded)


def _fp8_regeneration(device: Device, layer: LayerSizes, dtype: torch.dtype, rows: int) -> Callable[[], object]:
    """As `_regeneration`, of codes."""
    (x, x_scale), (weight, weight_scale) = (
        (
            torch.randn(size, layer.activation.width, device=device.torch_device).to(torch.float8_e4m3fn),
            torch.ones(size, 1, device=device.torch_device),
        )
        for size in (rows, layer.key_size + layer.value_size)
    )
    scales = {"scale_a": x_scale, "scale_b": weight_scale.t()}
    return partial(torch._scaled_mm, x, weight.t(), **scales, out_dtype=dtype, use_fast_accum=True)


def _norm_seconds(device: Device, layer: LayerSizes, dtype: torch.dtype, amounts: _Amounts) -> float:
    """Device seconds of a norm of few rows that waits for the one before, as kernels in a graph do."""
    x = torch.randn(_NORM_ROWS, layer.hidden_size, device=device.torch_device, dtype=dtype)

    def norms() -> None:
        normed = x
        for _ in range(amounts.norms):
            normed = functional.layer_norm(normed, normed.shape[-1:])

    [graph] = device.capture(norms)
    return _seconds(device, graph, amounts.loops) / amounts.norms


def _launch_seconds(device: Device) -> float:
    """Host seconds to launch one small kernel."""
    x = device.empty((16,), torch.float32, DeviceUse.MEASUREMENT).zero_()
    device.drain()
    count = 200
    times = []
    with device.on(device.compute), torch.inference_mode():
        for _ in _repetitions(device, _REPEATS):
            device.synchronize(device.record(device.compute))
            start = time.perf_counter()
            for _ in range(count):
                torch.add(x, x)
            times.append((time.perf_counter() - start) / count)
    return _lower_quartile(times)


def _seconds(device: Device, work: Callable[[], object], loops: int = 1) -> float:
    """Seconds of `work` on the compute stream."""
    return _lower_quartile(_times(device, work, _REPEATS, loops))


def _undisturbed_seconds(device: Device, work: Callable[[], object]) -> float:
    return _lower_quartile(_times(device, work, _BUS_REPEATS))


def _lower_quartile(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 4]


def _times(device: Device, work: Callable[[], object], repeats: int, loops: int = 1) -> list[float]:
    """Seconds of `work` on the compute stream, up to `repeats` times after a warm-up."""
    device.drain()  # what it reads was filled on no stream of the device's
    times = []
    with device.on(device.compute), torch.inference_mode():
        for _ in _repetitions(device, repeats + 1):
            device.synchronize(device.record(device.compute))
            start = time.perf_counter()
            for _ in range(loops):
                work()
            device.synchronize(device.record(device.compute))
            times.append((time.perf_counter() - start) / loops)
    return times[1:]


def _repetitions(device: Device, most: int) -> Iterator[int]:
    """Numbers of the repetitions of a measurement: no more begin once it has taken long enough."""
    begun, enough = time.perf_counter(), _amounts(device).enough
    return takewhile(lambda i: i < _MIN_REPEATS or time.perf_counter() - begun < enough, range(most))
