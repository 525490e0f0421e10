"""hsrpc bench calibrate: the rates of this machine, and a file of them to plan with elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hsrpc.cli.options import Commands, add_command, add_engine_options, check_folders, engine_config
from hsrpc.config import format_bytes, format_rate

if TYPE_CHECKING:
    from hsrpc.plan.machine import Machine

_EXAMPLES = """\
  hsrpc bench calibrate --shape opt-13b
  hsrpc bench calibrate --shape opt-13b --save gpu1.json    for `hsrpc plan --hardware gpu1.json`, anywhere
"""


def add_calibrate_parser(kinds: Commands) -> None:
    parser = add_command(kinds, "calibrate", "rates of this machine, as a plan is made with them", _EXAMPLES)
    parser.add_argument("--shape", help="such as opt-13b, or a config.json; in place of --model random:SHAPE")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="save rates and memory for `hsrpc plan --hardware FILE`"
    )
    add_engine_options(parser)
    parser.set_defaults(run=run_calibrate)


def run_calibrate(options: argparse.Namespace) -> None:
    """Measure, print, save."""
    from hsrpc.engine.startup import measure_machine  # loads torch, which --help does not
    from hsrpc.plan.machine import save_machine

    check_folders(options, "save")
    if options.shape:
        options.model = f"random:{options.shape}"
    machine = measure_machine(engine_config(options))
    for name, value in _rows(machine).items():
        print(f"{name:28} {value}")
    if options.save:
        save_machine(machine, options.save)


def _rows(machine: Machine) -> dict[str, str]:
    hardware = machine.hardware
    return {
        "device": machine.name,
        "device memory free": format_bytes(machine.device_memory),
        "host memory free": format_bytes(machine.host_memory),
        "host to device": format_rate(hardware.load_bandwidth, "B/s"),
        "device to host": format_rate(hardware.store_bandwidth, "B/s"),
        f"products of {machine.dtype}": format_rate(hardware.gemm_rate, "FLOP/s"),
        "products of float8": format_rate(hardware.gemm_rate * hardware.fp8_gemm_share, "FLOP/s"),
        "device memory": format_rate(hardware.memory_bandwidth, "B/s"),
        "weights read": format_rate(hardware.weight_bandwidth, "B/s"),
        "attention reads": format_rate(hardware.attention_bandwidth, "B/s"),
        "a small kernel": f"{hardware.small_kernel_time * 1e6:.1f} us",
        "launching a layer": f"{hardware.launch_time * 1e3:.2f} ms",
    }
