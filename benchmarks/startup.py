"""Time until an engine is ready, beside the time that pinning as much memory takes.

    python benchmarks/startup.py --directory /tmp/opt-13b --json startup.json

Makes a checkpoint of random float16 weights in the directory, unless it is there, and reads it once, so that it lies in
the page cache. Then, several times: (a) pins as many bytes as the engine pins, in pieces of a layer by as many threads;
(b) enters an engine with all layers on the host, and leaves it. The ratio of the medians of (b) and (a) is printed. The
first engine of a process takes longest: it loads and compiles kernels. Planning, with its calibration of the machine,
is a part of (b), and is measured alone too. At the end torch's own allocator pins as much, piece after piece. On the
CPU nothing is pinned, and the ratio says nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hsrpc import Engine, EngineConfig
from hsrpc.config import DType, Placement, parse_bytes
from hsrpc.device.device import open_device
from hsrpc.engine.startup import make_plan
from hsrpc.model.families.registry import create_family
from hsrpc.model.family import Family
from hsrpc.model.spec import load_spec, named_spec
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.memory_use import HostUse

LAYERS_PER_SHARD = 4
BLOCK_BYTES = 64 * 1024**2
READ_BYTES = 16 * 1024**2
PINNED_PIECE = 512 * 1024**2
CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def make_checkpoint(directory: Path, shape: str) -> None:
    """Shards, index, configuration and a tokenizer of one word; the index comes last and marks it as complete."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = named_spec(shape, torch.float16)
    family = create_family(spec)
    block = torch.empty(BLOCK_BYTES // 2, dtype=torch.float16).normal_(0, 0.02)
    weight_map: dict[str, str] = {}
    writes = []
    with ThreadPoolExecutor(4) as pool:
        for number, tensors in enumerate(_shards(family)):
            name = f"model-{number:05}.safetensors"
            shapes = {s: size for t in tensors for s, size in zip(t.sources, t.source_shapes, strict=True)}
            weight_map |= dict.fromkeys(shapes, name)
            writes.append(pool.submit(_write_shard, directory / name, shapes, block.view(torch.uint8).numpy().data))
        for write in writes:
            write.result()
    (directory / CONFIG).write_text(json.dumps(spec.config.values))
    Tokenizer(WordLevel({"a": 0})).save(str(directory / "tokenizer.json"))
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _shards(family: Family) -> Iterator[list[TensorSpec]]:
    yield list(family.fixed_tensors())
    for first in range(0, family.sizes.num_layers, LAYERS_PER_SHARD):
        layers = range(first, min(first + LAYERS_PER_SHARD, family.sizes.num_layers))
        yield [tensor for layer in layers for tensor in family.layer_tensors(layer)]


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], block: memoryview) -> None:
    """The block, again and again, is the data."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


def warm(directory: Path) -> float:
    """Reads all shards, as they lie, into nowhere; seconds."""

    def read(path: Path) -> None:
        buffer = bytearray(READ_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return _parallel(read, directory.glob("*.safetensors"))


def _parallel(work: Callable[..., object], items: Iterable[object]) -> float:
    """Seconds for all items, with as many threads as the engine loads with."""
    start = time.perf_counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(work, items))
    return time.perf_counter() - start


def pin_alone(config: EngineConfig, size: int, pieces: int) -> float:
    """Seconds to pin `size` bytes in equal pieces."""
    device = open_device(config.device)
    try:
        return _parallel(partial(device.pinned, use=HostUse.MEASUREMENT), [size // pieces] * pieces)
    finally:
        device.release_pinned()


def pin_by_torch(config: EngineConfig, size: int) -> float | None:
    """Seconds to pin as much by torch's own allocator, in pieces that it does not round up; None: nothing is pinned."""
    if open_device(config.device).torch_device.type == "cpu":
        return None
    start = time.perf_counter()
    pieces = [torch.empty(PINNED_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(round(size / PINNED_PIECE))]
    assert all(piece.is_pinned() for piece in pieces)
    return time.perf_counter() - start


async def time_to_ready(config: EngineConfig) -> float:
    """Seconds to enter an engine."""
    start = time.perf_counter()
    async with Engine(config):
        return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All times, seconds."""
    config = EngineConfig(
        model=str(options.directory),
        device=options.device,
        dtype=DType.FLOAT16,
        placement=Placement.HOST,
        min_batch=options.max_batch,
        max_batch=options.max_batch,
        max_model_len=1024,
        gpu_memory=options.gpu_memory,
        host_memory=1,
    )
    spec = load_spec(options.directory, torch.float16)
    sizes = spec.sizes
    layers = sizes.layers_bytes
    config = replace(config, host_memory=layers + parse_bytes(options.cache_memory, "cache_memory"))
    warming = warm(options.directory)
    plannings, pins, readies = [], [], []
    for _ in range(options.repeats):
        start = time.perf_counter()
        plan = make_plan(config).plan
        plannings.append(time.perf_counter() - start)
        pinned = sum(plan.host_bytes.values())
        pins.append(pin_alone(config, pinned, sizes.num_layers))
        readies.append(asyncio.run(time_to_ready(config)))
    return {
        "model": spec.name,
        "device": open_device(config.device).name,
        "weight_bytes": sizes.model_bytes,
        "pinned_bytes": pinned,
        "read_page_cache_s": warming,
        "pin_alone_s": pins,
        "ready_s": readies,
        "planning_s": plannings,
        "pin_by_torch_s": pin_by_torch(config, pinned),
        "ratio": median(readies) / median(pins),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="of the checkpoint; kept for another run")
    parser.add_argument("--shape", default="opt-13b", help="a name, or a config.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--cache-memory", default="4GiB", help="host memory beside the layers")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all times here")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    if not (options.directory / INDEX).exists():
        make_checkpoint(options.directory, options.shape)
    elif json.loads((options.directory / CONFIG).read_text()) != named_spec(options.shape, torch.float16).config.values:
        parser.error(f"--directory {options.directory}: has a checkpoint that is not {options.shape}; give another")
    making = time.perf_counter() - start
    result = {**measure(options), "make_s": making}
    for name, value in result.items():
        print(f"{name:20} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
