"""What starting an engine decides, and how it fails: the right error, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hsrpc import Engine, EngineConfig
from hsrpc.config import DeviceKind, DType
from hsrpc.device.device import CpuDevice
from hsrpc.device.host_memory import GroupLimit, HostMemory
from hsrpc.engine import opened_model, startup
from hsrpc.engine.forward import Forward
from hsrpc.engine.gpus import one
from hsrpc.engine.startup import describe_model, make_plan
from hsrpc.engine.tasks.executor import Executor
from hsrpc.errors import (
    CheckpointError,
    ConfigError,
    EngineFaultError,
    HsrpcError,
    ModelNotFoundError,
    OutOfDeviceMemoryError,
)
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.shapes import SHAPES
from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.step import Step
from tests.engine.conftest import HARDWARE
from tests.engine.reference import Reference, save_tokenizer
from tests.engine.support import collect, greedy, idle, ids, parts, roomy, until


@pytest.fixture
def directory(tmp_path: Path, reference: Callable[[str], Reference]) -> Path:
    """A copy of a checkpoint, to be spoiled."""
    return Path(shutil.copytree(reference("opt").directory, tmp_path / "model"))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def resize(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 97}))


def drop_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def drop_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


async def fails(config: EngineConfig, error: type[HsrpcError], message: str) -> None:
    """Entering raises, tasks and threads are as before."""
    tasks = asyncio.all_tasks()
    with pytest.raises(error, match=message):
        await Engine(config).__aenter__()
    assert asyncio.all_tasks() == tasks
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith(("hsrpc-", "load"))])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "model.safetensors"),
        (resize, "fc1"),
        (drop_tokenizer, "tokenizer"),
        (drop_weights, "found neither"),
        (break_config, "config.json"),
    ],
)
async def test_a_spoiled_checkpoint_is_named(spoil: Callable[[Path], None], message: str, directory: Path) -> None:
    """CheckpointError from entering the engine, with the file or tensor."""
    spoil(directory)
    await fails(EngineConfig(model=str(directory), device="cpu"), CheckpointError, message)


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and so nothing allocated."""

    def measure(*_: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(startup, "calibrate", measure)


@pytest.mark.usefixtures("uncalibrated")
async def test_layers_that_the_weights_lack_are_refused_before_anything_is_allocated(directory: Path) -> None:
    """The configuration is held against the headers first: no more memory would help."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"num_hidden_layers": 4000}))
    words = rf"config\.json: num_hidden_layers: expected {values['num_hidden_layers']}, .* found 4000; use the config"
    await fails(EngineConfig(model=str(directory), device="cpu"), CheckpointError, words)


@pytest.mark.usefixtures("uncalibrated")
async def test_a_layer_beyond_the_machine_is_refused_before_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration would multiply by its weights, of a shape that no bound of models refuses."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPES["opt-125m"] | {"hidden_size": 3 * 2**16, "ffn_dim": 2**18}))
    words = r"gpu_memory='1\.0 GiB': one layer of .* takes 960\.0 GiB, and .* are free; end what else"
    monkeypatch.setattr(CpuDevice, "free_memory", property(lambda _: 2**39))
    await fails(EngineConfig(model=f"random:{path}", device="cpu", gpu_memory="1GiB"), ConfigError, words)


async def test_a_disk_that_fails_while_reading(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """The error of one layer's thread comes out of entering; pinned memory is given back."""

    def read(self: Checkpoint, tensor: object, out: torch.Tensor) -> None:
        if "layers.2" in str(tensor):
            raise CheckpointError("model.safetensors: it has become shorter; fetch it again")

    released: list[int] = []
    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(CpuDevice, "release_pinned", lambda device: released.append(1))
    await fails(roomy(reference("opt")), CheckpointError, "fetch it again")
    assert released == [1]


async def test_a_model_that_is_not_there() -> None:
    """Neither as a directory nor as a known shape."""
    await fails(EngineConfig(model="no/such-model", device="cpu"), ModelNotFoundError, "such-model")
    await fails(EngineConfig(model="random:opt-1t", device="cpu"), ModelNotFoundError, "opt-30b")


@pytest.mark.parametrize("field", ["gpu_memory", "host_memory"])
async def test_budgets_that_are_too_small(field: str, reference: Callable[[str], Reference]) -> None:
    """ConfigError names the budget."""
    made = reference("opt")
    budgets = {"gpu_memory": "1GiB", "host_memory": "64MiB"} | {field: "1KiB"}
    config = EngineConfig(model=str(made.directory), device="cpu", placement="host", **budgets)
    await fails(config, ConfigError, field)


GIB = 2**30
LIMIT = GroupLimit(left=2**18, size=2**19, file=Path("/sys/fs/cgroup/memory.max"))


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (HostMemory(2**17, 2**17, None), r"gpu_memory=.* 128\.0 KiB are free; lower it, or end what else"),
        (HostMemory(2**22, 2**22, None), r"host_memory=.* takes .* and .* KiB are free; lower it, or end what else"),
        (
            HostMemory(2**18, 2**18, LIMIT),
            r"gpu_memory=.* limit of 512\.0 KiB \(.*memory\.max\) leaves 256\.0 KiB; lower",
        ),
        (
            HostMemory(2**17, 2**18, LIMIT),
            r"gpu_memory=.* limit of 512\.0 KiB .* leaves 256\.0 KiB; lower it, or raise",
        ),
    ],
    ids=["device", "both", "limit", "limit-of-a-machine-that-grows"],
)
async def test_memory_that_is_not_free(
    memory: HostMemory, words: str, monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """ConfigError before anything is allocated: the system is not asked for what it has not, on the CPU for both."""
    allocated: list[int] = []
    monkeypatch.setattr(CpuDevice, "pinned", lambda *_, **__: allocated.append(1))
    monkeypatch.setattr(CpuDevice, "free_memory", property(lambda _: 2**40))
    monkeypatch.setattr(HostMemory, "read", lambda: memory)
    monkeypatch.setattr(startup, "calibrate", lambda *_: HARDWARE)
    budgets = {"gpu_memory": "1GiB", "host_memory": "64MiB", "placement": "host"}
    config = EngineConfig(model=str(reference("opt").directory), device="cpu", **budgets)
    await fails(config, ConfigError, words)
    assert not allocated


async def test_memory_that_the_machine_brings_in_as_it_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reference: Callable[[str], Reference]
) -> None:
    """What is asked for and not free yet is tried where the machine has it, with a warning; the default says so."""
    monkeypatch.setattr(HostMemory, "read", lambda: HostMemory(2**17, GIB, None))
    monkeypatch.setattr(CpuDevice, "free_memory", property(lambda _: 2**40))
    async with Engine(roomy(reference("opt"))) as engine:
        assert [words for words in caplog.messages if "128.0 KiB are free" in words and "trying it" in words]
        assert len(await collect(engine.generate([5, 6], greedy(3)))) > 0
    caplog.clear()
    make_plan(
        EngineConfig(model=str(reference("opt").directory), device="cpu", gpu_memory="64MiB", host_memory="64MiB")
    )
    assert caplog.messages == []
    with suppress(ConfigError):  # half of so little is nothing
        make_plan(EngineConfig(model=str(reference("opt").directory), device="cpu", gpu_memory="64MiB"))
    assert "128.0 KiB are free, and up to 1.0 GiB as it is used; give host_memory" in caplog.text


async def test_a_limit_of_what_can_be_pinned_is_found_before_loading(
    monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]
) -> None:
    """A device that pins is asked for the plan's bytes of host memory, before the first layer is read."""
    asked: list[int] = []

    def refuse(_: object, size: int) -> None:
        asked.append(size)
        raise ConfigError("host_memory", "x", "too little may be locked", "raise it")

    def load(*_: object, **__: object) -> None:
        raise AssertionError("loads")

    monkeypatch.setattr(CpuDevice, "check_pinning", refuse)
    monkeypatch.setattr(opened_model, "load_weights", load)
    planned = make_plan(roomy(reference("opt")))
    await fails(roomy(reference("opt")), ConfigError, "may be locked; raise it")
    assert asked == [sum(planned.plan.host_bytes.values())]


async def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch, reference: Callable[[str], Reference]) -> None:
    """ConfigError on entering; `auto` takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    directory = str(reference("opt").directory)
    await fails(EngineConfig(model=directory, device="cuda"), ConfigError, "no CUDA device")
    async with Engine(EngineConfig(model=directory, device=DeviceKind.AUTO, gpu_memory="64MiB")) as engine:
        assert engine.device == "CPU"


def test_budgets_default_to_a_part_of_what_is_there(reference: Callable[[str], Reference]) -> None:
    """On the CPU both together leave room for the rest of the machine; what is asked for is taken."""
    directory = str(reference("opt").directory)
    budgets = make_plan(EngineConfig(model=directory, device="cpu")).planner.budgets
    assert 0 < budgets.device + budgets.host < 0.9 * HostMemory.read().free
    asked = EngineConfig(model=directory, device="cpu", gpu_memory="3GiB", host_memory="5GiB")
    budgets = make_plan(asked).planner.budgets
    assert (budgets.device, budgets.host) == (3 * 2**30, 5 * 2**30)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(DType.AUTO, torch.float32), (DType.FLOAT16, torch.float16), (DType.BFLOAT16, torch.bfloat16)],
)
def test_the_element_type_is_the_one_asked_for(
    dtype: DType, expected: torch.dtype, reference: Callable[[str], Reference]
) -> None:
    """On the CPU `auto` computes in float32."""
    spec, _ = describe_model(EngineConfig(model=str(reference("opt").directory), device="cpu", dtype=dtype))
    assert spec.dtype is expected


async def test_nothing_of_an_engine_stays_when_it_is_left(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools, buffers and weights go at once: another engine may need all of the device."""
    monkeypatch.setattr(one, "gc", gc)
    async with Engine(roomy(reference("opt"))) as engine:
        await collect(engine.generate([5, 6], greedy(3)))
        opened = parts(engine)
        left = [weakref.ref(part) for part in (opened.executor, opened.cache, opened.prefetcher)]
        del opened
    assert [ref() for ref in left] == [None] * 3


def queries(step: Step) -> list[int]:
    """New tokens of each request, in mini-batch order."""
    return [count for batch in step.mini_batches for count in np.diff(batch.query_starts).tolist()]


async def test_a_device_that_warms_up_does_so_unseen(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest steps are computed before the first request, and neither counters nor tokens tell of it."""
    made, executed = reference("opt"), []
    execute = Executor.execute
    monkeypatch.setattr(CpuDevice, "warms_up", property(lambda _: True, lambda *_: None), raising=False)

    async def counted(self: Executor, step: Step, ahead: Step | None = None) -> object:
        executed.append(step)
        return await execute(self, step, ahead)

    monkeypatch.setattr(Executor, "execute", counted)
    async with Engine(roomy(made, max_prefill_tokens=300)) as engine:
        alone, beside, *others = executed
        assert queries(alone) == [126, 126]  # as many as make no more than 300 tokens
        assert sorted(queries(beside)) == [1, 1, 126, 126]
        assert others
        assert not any(count > 1 for step in others for count in queries(step))
        stats = engine.stats()
        assert (stats.steps, stats.weights_streamed_bytes, stats.cache_loaded_bytes) == (0, 0, 0)
        assert ids(await collect(engine.generate(made.prompts[0], greedy(9)))) == made.outputs[0][:9]
        await idle(engine)


async def test_nothing_of_an_engine_that_died_stays(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while its fault is held, whose tracebacks lead to all that its tasks had."""
    monkeypatch.setattr(one, "gc", gc)
    left: list[weakref.ref[Forward]] = []

    def broken(forward: Forward, *_: object) -> object:
        left.append(weakref.ref(forward))
        raise ValueError("broken")

    monkeypatch.setattr(CpuDevice, "warms_up", property(lambda _: True, lambda *_: None), raising=False)
    monkeypatch.setattr(Forward, "launch", broken)
    with pytest.raises(EngineFaultError) as caught:
        await Engine(roomy(reference("opt"))).__aenter__()
    assert caught.value.__cause__ is not None
    assert [forward() for forward in left] == [None]


async def test_a_fault_while_warming_up_fails_the_start(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fault that names its cause; no task or thread is left."""
    monkeypatch.setattr(CpuDevice, "warms_up", property(lambda _: True, lambda *_: None), raising=False)

    def broken(*_: object) -> object:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Forward, "launch", broken)
    tasks = asyncio.all_tasks()
    with pytest.raises(EngineFaultError) as caught:
        await Engine(roomy(reference("opt"))).__aenter__()
    assert isinstance(caught.value.__cause__, OutOfDeviceMemoryError)
    await until(lambda: asyncio.all_tasks() == tasks)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("compute", "cache", "weights"))]


async def test_a_model_brings_its_ends_and_its_sampling_settings(directory: Path) -> None:
    """End tokens of all its files together; sampling settings unless the configuration says none."""
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": 5}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 5], "temperature": 0.0}))
    save_tokenizer(directory)  # whose own is 2
    for kind, temperature in (("auto", 0.0), ("none", 1.0)):
        settings = EngineConfig(
            model=str(directory), device="cpu", gpu_memory="1GiB", host_memory="64MiB", generation_config=kind
        )
        async with Engine(settings) as engine:
            assert set(engine.spec.eos_token_ids) == {5, 6, 2}
            assert engine.default_params == SamplingParams(temperature=temperature)
            params = replace(engine.default_params, logit_bias={2: 100.0}, max_tokens=8)
            finish = (await collect(engine.generate([7, 8], params)))[-1].finish
            assert finish is not None
            assert finish.reason is FinishReason.EOS


def test_links_out_of_the_directory_are_followed_where_they_are_trusted(directory: Path, tmp_path: Path) -> None:
    """As a store of one's own makes them; without the setting the refusal names it."""
    elsewhere = tmp_path / "blob"
    (directory / "model.safetensors").rename(elsewhere)
    (directory / "model.safetensors").symlink_to(elsewhere)
    settings = EngineConfig(model=str(directory), device=DeviceKind.CPU)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*found a link out of it; .*--trust-links"):
        describe_model(settings)
    assert describe_model(replace(settings, trust_links=True))[0].family == "opt"
