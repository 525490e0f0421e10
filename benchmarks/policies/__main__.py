"""python -m benchmarks.policies: decode steps under hsrpc's policies and under those of other papers."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.policies.emulate import Policy
from benchmarks.policies.measure import Setting, measure
from benchmarks.policies.report import line_of, measured, plot, print_table
from hsrpc.cli.loop import run_loop
from hsrpc.config import DeviceKind, DType, parse_bytes
from hsrpc.errors import ConfigError

_DESCRIPTION = """\
Measure whole decode steps of one batch under each policy, one engine after the other: random weights, all weights and
caches on the host, the same budgets and lengths. kv, activation and auto are hsrpc's own. Emulated on the same data
path, each by its paper's rule and the calibration of this machine:

  kvpr    (arXiv 2411.17089)  the first tokens of each request are rebuilt, the others loaded as K and V
  hcache  (arXiv 2410.05004)  all tokens are rebuilt in the first layers, loaded as K and V in the others; recomputing
                              layers from token ids, which HCache has besides, is not emulated
"""
_EXAMPLES = """\
examples, from the root of the repository:
  python -m benchmarks.policies --shape opt-6.7b --batch 64 --prompt 512 --json policies.json --plot policies.png
  python -m benchmarks.policies --shape opt-2.7b --dtype float32 --batch 64 --json compute-bound.json
  python -m benchmarks.policies --shape opt-6.7b --policy activation hcache --hidden-layers 24
  python -m benchmarks.policies --shape path/to/config.json --device cpu --dtype float32 --batch 3 --prompt 8 \\
      --output 32 --gpu-memory 64MiB --host-memory 64MiB
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save after each policy, print and draw."""
    parser, started = _parser(), time.monotonic()
    options = parser.parse_args(arguments)
    try:
        setting = _setting(options)
        found = _read(options.json, setting)
    except ConfigError as error:
        parser.error(str(error))
    cells = found["policies"]
    for policy in map(Policy, options.policy):
        known = [cell for cell in measured(cells) if cell["policy"] == policy]
        if known or time.monotonic() - started > options.time:
            continue
        cells[:] = [cell for cell in cells if cell["policy"] != policy]  # what failed is tried again
        cells.append(run_loop(measure(policy, setting, options.seconds)))
        print(line_of(cells[-1]), flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    done = measured(cells)
    title = f"{setting.shape}, {setting.batch} requests x {setting.prompt} tokens"
    title += f", {done[0]['result']['device']}" if done else ""
    print_table(title, cells)
    if options.plot and done:
        plot(title, done, options.plot)


def _read(file: Path | None, setting: Setting) -> dict[str, Any]:
    """What the file has already.

    Raises:
        ConfigError: it was measured with another setting.
    """
    if file is None or not file.exists():
        return {"setting": asdict(setting), "policies": []}
    found: dict[str, Any] = json.loads(file.read_text())
    if found["setting"] != asdict(setting):
        raise ConfigError("json", str(file), "was measured with other settings", "give another file, or the same ones")
    return found


def _setting(options: argparse.Namespace) -> Setting:
    return Setting(
        shape=options.shape,
        dtype=options.dtype,
        batch=options.batch,
        prompt=options.prompt,
        output=options.output,
        steps=options.steps,
        device=options.device,
        gpu_memory=parse_bytes(options.gpu_memory, "gpu_memory"),
        host_memory=parse_bytes(options.host_memory, "host_memory"),
        hidden_layers=options.hidden_layers,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    policies = [str(policy) for policy in Policy]
    parser.add_argument("--shape", default="opt-6.7b", help="a name, or a config.json (default: %(default)s)")
    parser.add_argument("--policy", nargs="+", choices=policies, default=policies, help="default: all")
    parser.add_argument("--batch", type=int, default=64, help="requests (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--output", type=int, default=128, help="tokens each generates at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="decode steps measured (default: %(default)s)")
    parser.add_argument(
        "--hidden-layers", type=int, metavar="N", help="layers with hidden states under hcache, in place of its rule"
    )
    parser.add_argument("--device", choices=list(map(str, DeviceKind)), default="auto")
    parser.add_argument("--dtype", choices=list(map(str, DType)), default="float16", help="default: %(default)s")
    parser.add_argument("--gpu-memory", default="24GiB", help="default: %(default)s")
    parser.add_argument("--host-memory", default="100GiB", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=150, help="most that one policy takes (default: %(default)s)")
    parser.add_argument(
        "--time", type=float, default=3600, help="no policy is begun after so many seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="F", help="save everything here; what it has already is not measured again"
    )
    parser.add_argument("--plot", type=Path, metavar="F", help="save tokens/s and their limits here as PNG")
    return parser


if __name__ == "__main__":
    main()
