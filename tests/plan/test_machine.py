"""Machines that are elsewhere: known by name, or read from the file that a calibration wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hsrpc.config import DeviceKind, EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.plan.device_memory import cuda_runtime_memory
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.known_machines import KNOWN_MACHINES, find_machine
from hsrpc.plan.machine import Machine, read_machine, save_machine

GIB = 2**30
RESULTS = Path(__file__).parents[2] / "benchmarks/results"
MACHINE = Machine(
    name="CPU",
    kind=DeviceKind.CPU,
    device_memory=8 * GIB,
    host_memory=8 * GIB,
    dtype="float32",
    hardware=Hardware(load_bandwidth=1e10, store_bandwidth=9e9, gemm_rate=1e11, memory_bandwidth=3e10),
)


def test_what_is_saved_is_read(tmp_path):
    """Every field, of a machine of either kind."""
    for machine in (MACHINE, KNOWN_MACHINES["h200"]):
        save_machine(machine, tmp_path / "machine.json")
        assert find_machine(str(tmp_path / "machine.json")) == machine


WITHOUT = object()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2}, "format is 2, and 1 is read here"),
        ({"kind": "auto"}, "kind is 'auto', not one of cuda, cpu"),
        ({"device_memory": 0}, "device_memory is 0, not a positive number of bytes"),
        ({"host_memory": 1.5}, "host_memory is 1.5, not a positive number of bytes"),
        ({"name": 7}, "name is 7, not a name"),
        ({"dtype": WITHOUT}, "a machine has no field dtype"),
        ({"date": "today"}, "a machine has a field 'date', which is not known here"),
        ({"hardware": []}, r"hardware is \[\], not an object of fields"),
    ],
)
def test_a_wrong_field_is_named(change, problem, tmp_path):
    """With its value, and what writes the file anew."""
    write(tmp_path / "machine.json", change)
    with pytest.raises(ConfigError, match=rf"^hardware='.*machine\.json': {problem}; write it anew with hsrpc bench "):
        read_machine(tmp_path / "machine.json")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("gemm_rate", -1e12, r"-1000000000000\.0"),
        ("gemm_rate", 0, "0"),
        ("load_bandwidth", True, "True"),
        ("load_bandwidth", 10**400, r"10+\.\.\."),
        ("memory_bandwidth", float("nan"), "nan"),
        ("launch_time", float("inf"), "inf"),
        ("weight_read_share", "much", "'much'"),
    ],
)
def test_a_wrong_rate_is_named(name, value, found, tmp_path):
    """A plan would divide by it."""
    write(tmp_path / "machine.json", {"hardware": asdict(MACHINE.hardware) | {name: value}})
    with pytest.raises(ConfigError, match=rf"hardware\.{name} is {found}, not a positive number"):
        read_machine(tmp_path / "machine.json")


def test_a_rate_that_is_missing_is_named(tmp_path):
    """Those that have defaults may be: they came later."""
    rates = asdict(MACHINE.hardware)
    write(tmp_path / "machine.json", {"hardware": {k: v for k, v in rates.items() if k != "duplex_share"}})
    assert read_machine(tmp_path / "machine.json") == MACHINE
    write(tmp_path / "machine.json", {"hardware": {k: v for k, v in rates.items() if k != "gemm_rate"}})
    with pytest.raises(ConfigError, match="hardware has no field gemm_rate"):
        read_machine(tmp_path / "machine.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 50_000, b" " * 2**17 + b"{}"])
def test_what_is_no_machine(content, tmp_path):
    """Neither broken text nor depth nor length is more than an error."""
    (tmp_path / "machine.json").write_bytes(content)
    with pytest.raises(ConfigError, match="no JSON of a machine; write it anew"):
        read_machine(tmp_path / "machine.json")


def test_neither_a_name_nor_a_file(tmp_path):
    """The names are told; a directory is no file."""
    with pytest.raises(ConfigError, match=r"hardware='h1000': .*; use one of h100, h200, a100, rtx4090, rtx3090, or "):
        find_machine("h1000")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_machine(str(tmp_path))


def test_a_file_that_cannot_be_written(tmp_path):
    """The setting and the system's reason."""
    with pytest.raises(ConfigError, match=r"save='.*': cannot be written \(No such file or directory\)"):
        save_machine(MACHINE, tmp_path / "none" / "machine.json")


def test_budgets_are_parts_of_what_is_free_unless_they_are_given():
    """A CPU's device memory is the host's; a GPU's has a part that its libraries take."""
    found = MACHINE.budgets(EngineConfig())
    assert (found.device, found.host, found.runtime) == (2 * GIB, 4 * GIB, 0)
    gpu = replace(MACHINE, kind=DeviceKind.CUDA, device_memory=80 * GIB, host_memory=100 * GIB)
    found = gpu.budgets(EngineConfig())
    assert (found.device, found.host) == (72 * GIB, 80 * GIB)
    found = gpu.budgets(EngineConfig(gpu_memory="20GiB", host_memory="300GiB"))
    assert (found.device, found.host, found.runtime) == (20 * GIB, 300 * GIB, cuda_runtime_memory(20 * GIB))


@pytest.mark.parametrize(
    ("name", "file", "find"),
    [
        ("h100", "planner/grid-opt-1.3b-76GiB.json", lambda found: found["result"][1]),
        (
            "h200",
            "guard/nvidia-h200.json",
            lambda found: next(c for c in found["cases"] if c["name"] == "planned-24gib"),
        ),
    ],
)
def test_rates_that_were_measured_are_those_of_their_raw_file(name, file, find):
    """To a tenth: a file that is measured again on the same kind of machine may differ by as much."""
    measured = find(json.loads((RESULTS / file).read_text()))["hardware"]
    known = asdict(KNOWN_MACHINES[name].hardware)
    for rate in ("load_bandwidth", "store_bandwidth", "gemm_rate", "memory_bandwidth", "weight_read_share"):
        assert known[rate] == pytest.approx(measured[rate], rel=0.1), rate


def test_rates_that_were_not_measured_are_below_their_datasheets_and_say_so():
    """By the shares that the H100 reaches of its own."""
    sheets = {"a100": (312e12, 2.039e12), "rtx4090": (165e12, 1.008e12), "rtx3090": (71e12, 0.936e12)}
    for name, (products, memory) in sheets.items():
        machine = KNOWN_MACHINES[name]
        assert "not measured" in machine.name
        assert machine.hardware.gemm_rate == pytest.approx(products * 751 / 989)
        assert machine.hardware.memory_bandwidth == pytest.approx(memory * 2.95 / 3.35)
        assert machine.hardware.load_bandwidth == pytest.approx(55.1e9 / 2)
    assert not any("not measured" in KNOWN_MACHINES[name].name for name in ("h100", "h200"))


def write(file: Path, change: dict[str, object]) -> None:
    """The file of MACHINE with other fields."""
    save_machine(MACHINE, file)
    values = json.loads(file.read_text()) | change
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not WITHOUT}))
