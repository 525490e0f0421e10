"""How much smaller a model's matrices get when they are coded, and how fast they are decoded on the device.

    python benchmarks/coding.py --model random:opt-13b --dtype float16 --json coding.json
    python benchmarks/coding.py --model path/to/checkpoint --layers 4
    python benchmarks/coding.py --model random:qwen3-30b-a3b --dtype bfloat16

Every matrix is coded and decoded, those of a layer together, and compared bit by bit; the third line is of many small
ones. Rates are of the matrices' own bytes; beside them stand what
decoding reads and writes as a part of the measured memory bandwidth, and the rate at which the bus brings coded ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hsrpc.config import DeviceKind, DType, EngineConfig
from hsrpc.device.device import Device
from hsrpc.engine.startup import describe_model, measure_machine
from hsrpc.model.checkpoint import Checkpoint, RandomWeights
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats.format import Encoded, WeightSource
from hsrpc.model.formats.lossless import Coding, Lossless
from hsrpc.model.hub import resolve_model
from hsrpc.model.shapes import RANDOM_PREFIX
from hsrpc.plan.memory_use import DeviceUse

_REPEATS = 7


def seconds_of(device: Device, work: Callable[[], object]) -> float:
    """Median of several times, after one that compiles."""
    times = []
    for _ in range(_REPEATS + 1):
        device.drain()
        start = time.perf_counter()
        work()
        device.drain()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the coding of the first layers' matrices.

    Raises:
        AssertionError: a bit is not the same.
    """
    config = EngineConfig(model=options.model, device=options.device, dtype=options.dtype)
    spec, device = describe_model(config)
    hardware = measure_machine(config).hardware
    is_random = options.model.startswith(RANDOM_PREFIX)
    source: WeightSource = RandomWeights(0) if is_random else Checkpoint(resolve_model(options.model))
    family = create_family(spec)
    lossless = Lossless(spec.dtype)
    own = coded = 0
    encoding = 0.0
    decodings: list[Callable[[], None]] = []
    for layer in range(options.layers):
        kept: dict[str, tuple[torch.Tensor, Encoded[Coding]]] = {}
        for tensor in family.layer_tensors(layer):
            values = device.empty(tensor.shape, spec.dtype, DeviceUse.MEASUREMENT)
            source.read(tensor, values)
            coding, data = lossless.pack(values)
            if not isinstance(coding, Coding):
                continue  # no matrix: it lies as it is
            encoding += seconds_of(device, partial(lossless.pack, values))
            kept[tensor.name] = values, Encoded(coding, data, torch.empty_like(values))
            own, coded = own + values.nbytes, coded + len(data)
            share, escapes = len(data) / values.nbytes, coding.counts[-1] / coding.num_values
            print(f"{tensor.name:24} {tuple(tensor.shape)!s:16} {share:.4f} of its bytes, {escapes:.2%} escapes")
        decodings.append(Coding.decoding([each for _, each in kept.values()]))
        decodings[-1]()
        for name, (values, each) in kept.items():
            assert torch.equal(each.operand.view(torch.int16), values.view(torch.int16)), f"{name}: not the same bits"

    def decode() -> None:
        for decode_layer in decodings:
            decode_layer()

    decoding = seconds_of(device, decode)
    return {
        "model": spec.name,
        "device": device.name,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "share": coded / own,
        "encode_rate": own / encoding,
        "decode_rate": own / decoding,
        "memory_share": (own + coded) / decoding / hardware.memory_bandwidth,
        "bus_rate": hardware.load_bandwidth * own / coded,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:opt-13b", help="directory, hub id or random:SHAPE")
    parser.add_argument("--dtype", type=DType, default=DType.AUTO, choices=tuple(DType))
    parser.add_argument("--device", type=DeviceKind, default=DeviceKind.AUTO, choices=tuple(DeviceKind))
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="the first ones (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures here")
    options = parser.parse_args(arguments)
    found = measure(options)
    rates = {name: f"{found[name] / 1e9:.1f} GB/s" for name in ("encode_rate", "decode_rate", "bus_rate")}
    print(
        f"{found['share']:.4f} of the bytes; coded at {rates['encode_rate']}, decoded at {rates['decode_rate']}, "
        f"{found['memory_share']:.2f} of the memory bandwidth; the bus brings {rates['bus_rate']}"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
