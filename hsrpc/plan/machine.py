"""A machine as planning sees it: the kind of its device, memory, and rates; its file, to plan for it elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hsrpc.config import DeviceKind, EngineConfig
from hsrpc.errors import ConfigError
from hsrpc.plan.device_memory import cuda_runtime_memory
from hsrpc.plan.fitted import LOADS_BANDWIDTH
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.plan import Budgets

CALIBRATE = "hsrpc bench calibrate --save"
"""The command that writes a machine's file."""
_FORMAT = 1
_TIMES = ("_time", "_overhead")
"""How names of hardware's times end; all others are rates, and parts of them."""
_MOST_BYTES = 2**16
"""No machine's file is longer."""
_MOST = 1e18
"""No rate, and no number of bytes, is as large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a plan follows from, beside the model and the settings; measured here, or known from elsewhere."""

    name: str
    """Name of the device, for people."""
    kind: DeviceKind
    """CUDA or CPU, never `auto`."""
    device_memory: int
    """Bytes of device memory that are free; on the CPU they are the host's."""
    host_memory: int
    """Bytes of host memory that are free."""
    dtype: str
    """Element type of the products that were measured."""
    hardware: Hardware

    def budgets(self, config: EngineConfig) -> Budgets:
        """The budgets that are given; else 0.9 of a GPU's memory and 0.8 of the host's, or on a CPU 1/4 and 1/2.

        Several GPUs have equal parts of the host's memory, and of a CPU's that stands for them.
        """
        on_cpu, gpus = self.kind is DeviceKind.CPU, config.num_gpus
        device = int(config.gpu_memory or self.device_memory * (0.25 / gpus if on_cpu else 0.9))
        host = int(config.host_memory or self.host_memory * (0.5 if on_cpu else 0.8)) // gpus
        return Budgets(device=device, host=host, runtime=0 if on_cpu else cuda_runtime_memory(device))

    def at_once(self, num_gpus: int) -> Machine:
        """The same where so many GPUs load at once, though each was measured alone."""
        share = LOADS_BANDWIDTH / num_gpus
        hardware = replace(self.hardware, load_bandwidth=min(self.hardware.load_bandwidth, share))
        return self if num_gpus == 1 or self.kind is DeviceKind.CPU else replace(self, hardware=hardware)

    def slowest(self, others: Sequence[Machine]) -> Machine:
        """One as this and others of its kind: each rate is that of the slowest, and memory that of the fullest."""
        machines = (self, *others)
        rates = {
            item.name: (max if item.name.endswith(_TIMES) else min)(
                getattr(each.hardware, item.name) for each in machines
            )
            for item in fields(Hardware)
        }
        return replace(
            self,
            device_memory=min(each.device_memory for each in machines),
            host_memory=min(each.host_memory for each in machines),
            hardware=Hardware(**rates),
        )


def save_machine(machine: Machine, file: Path) -> None:
    """Write the machine's file, which `read_machine` reads.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        file.write_text(json.dumps({"format": _FORMAT, **asdict(machine)}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError("save", str(file), f"cannot be written ({error.strerror})", "give another file") from None


def read_machine(file: Path) -> Machine:
    """The machine of a file that `save_machine` wrote.

    Raises:
        ConfigError: it cannot be read, or a field is missing or wrong.
    """
    try:
        with file.open("rb") as opened:
            values = json.loads(opened.read(_MOST_BYTES))
    except OSError as error:
        raise ConfigError("hardware", str(file), f"cannot be read ({error.strerror})", "give another file") from None
    except (ValueError, RecursionError):
        raise _wrong(file, "no JSON of a machine") from None
    return _Reader(file).machine(values)


def _wrong(file: Path, problem: str) -> ConfigError:
    return ConfigError("hardware", str(file), problem, f"write it anew with {CALIBRATE}")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes a machine from what its file has."""

    file: Path

    def machine(self, values: Any) -> Machine:
        names = {"format", *(item.name for item in fields(Machine))}
        self._check_names(values, "a machine", names, names)
        if values["format"] != _FORMAT:
            raise _wrong(self.file, f"format is {values['format']!r}, and {_FORMAT} is read here")
        kinds = [kind for kind in DeviceKind if kind is not DeviceKind.AUTO]
        if values["kind"] not in kinds:
            raise _wrong(self.file, f"kind is {values['kind']!r}, not one of {', '.join(kinds)}")
        return Machine(
            name=self._text("name", values["name"]),
            kind=DeviceKind(values["kind"]),
            device_memory=self._bytes("device_memory", values["device_memory"]),
            host_memory=self._bytes("host_memory", values["host_memory"]),
            dtype=self._text("dtype", values["dtype"]),
            hardware=self._hardware(values["hardware"]),
        )

    def _hardware(self, values: Any) -> Hardware:
        """Rates without a default, and shares, are above 0; times may be 0."""
        names = {item.name for item in fields(Hardware)}
        needed = {item.name for item in fields(Hardware) if item.default is MISSING}
        self._check_names(values, "hardware", names, needed)
        for name, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST
            if not is_number or (value == 0 and not name.endswith(_TIMES)):
                raise _wrong(self.file, f"hardware.{name} is {_short(value)}, not a positive number")
        return Hardware(**{name: float(value) for name, value in values.items()})

    def _check_names(self, values: Any, what: str, names: set[str], needed: set[str]) -> None:
        if not isinstance(values, Mapping):
            raise _wrong(self.file, f"{what} is {_short(values)}, not an object of fields")
        if missing := sorted(needed - values.keys()):
            raise _wrong(self.file, f"{what} has no field {missing[0]}")
        if unknown := sorted(values.keys() - names):
            raise _wrong(self.file, f"{what} has a field {_short(unknown[0])}, which is not known here")

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise _wrong(self.file, f"{name} is {_short(value)}, not a name")
        return value

    def _bytes(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
            raise _wrong(self.file, f"{name} is {_short(value)}, not a positive number of bytes")
        return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
