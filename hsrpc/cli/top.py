"""hsrpc top: what a server does, live in the terminal."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from hsrpc.cli.connection import add_connection_options, connection_settings
from hsrpc.cli.options import Commands, SecondsOption, add_command
from hsrpc.config import Seconds, format_bytes, format_rate

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hsrpc.v1.server_pb2 import (
        BlockUse,
        GetServerInfoResponse,
        Gpu,
        GpuLoad,
        GpuMeasured,
        Measured,
        WatchLoadResponse,
    )

_EXAMPLES = """\
  hsrpc top                                  the server on this machine; Ctrl-C ends
  hsrpc top --target 10.0.0.7:50051 --interval 0.5
  hsrpc top --target serving.example.com:50051 --tls-ca ca.pem --token-file token
"""
_TARGET = "127.0.0.1:50051"
_INTERVAL = Seconds(0.1, 3600.0)
"""What WatchLoad takes."""
Unit = Callable[[float], str]
_BUS = ("weights_streamed_bytes", "cache_loaded_bytes")
"""Counters of what crosses a bus."""

_BAR = 40
"""Characters."""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "top", "show load, blocks, bus and throughput of a server, live", _EXAMPLES)
    parser.add_argument(
        "--interval",
        type=SecondsOption(_INTERVAL),
        default=1.0,
        metavar="SECONDS",
        help="between reports, 0.1 or more (default: 1)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="end after N reports (default: with the server)")
    add_connection_options(parser, target=_TARGET, target_help=_TARGET)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Show reports until the server goes down, or Ctrl-C."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once, as grpc loads
    from rich.live import Live

    from hsrpc.client import Client

    with Client(options.target, **connection_settings(options)) as client:
        info = client.get_server_info()
        with Live(auto_refresh=False) as live:
            for view in _views(info, client.watch_load(options.interval), options.count):
                live.update(view, refresh=True)
    if options.count is None:
        print("the server is shutting down")


def _views(
    info: GetServerInfoResponse, reports: Iterator[WatchLoadResponse], count: int | None
) -> Iterator[RenderableType]:
    last: WatchLoadResponse | None = None
    for number, report in enumerate(reports, start=1):
        yield view(info, last, report)
        if number == count:
            return
        last = report


def view(info: GetServerInfoResponse, last: WatchLoadResponse | None, report: WatchLoadResponse) -> RenderableType:
    """One screen; rates are between the two reports, and unknown without `last`."""
    from rich.console import Group
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = f"{info.model} on {info.device}, hsrpc {info.version}", "left"
    load, measured = report.load, report.measured
    table.add_row("requests", f"{load.running_requests} of {info.plan.max_batch} run, {load.queued_requests} wait")
    for use in load.blocks:
        if use.total:
            table.add_row(_title(use), f"{_bar(use.used / use.total)} {use.used} of {use.total} blocks")
    table.add_row("bus", _rate(last, report, _BUS, _bytes))
    table.add_row("generated", _rate(last, report, ("generated_tokens",), _tokens))
    table.add_row("prompts", _rate(last, report, ("prompt_tokens",), _tokens))
    table.add_row("regenerated", _rate(last, report, ("regenerated_tokens",), _tokens) + ", layers counted")
    table.add_row("recomputed", _rate(last, report, ("recomputed_tokens",), _tokens))
    if measured.drafted_tokens:
        share = measured.accepted_tokens / measured.drafted_tokens
        table.add_row("drafted", f"{measured.drafted_tokens:,} tokens, {share:.0%} of them accepted")
    table.add_row("preemptions", str(measured.preemptions))
    if measured.HasField("step_time"):
        predicted = info.plan.predicted_step_time.ToTimedelta().total_seconds()
        mean = measured.step_time.ToTimedelta().total_seconds()
        table.add_row("step", f"{mean * 1e3:.1f} ms on average; {predicted * 1e3:.1f} ms predicted for a full batch")
    if measured.peak_device_bytes:
        budget = format_bytes(info.plan.device_memory_bytes)
        table.add_row("device memory", f"{format_bytes(measured.peak_device_bytes)} at the peak, of {budget}")
    return Group(table, _gpus_table(info, last, report)) if len(info.gpus) > 1 else table


def _gpus_table(
    info: GetServerInfoResponse, last: WatchLoadResponse | None, report: WatchLoadResponse
) -> RenderableType:
    """A line for each GPU."""
    from rich.table import Table

    names = ("GPU", "requests", "blocks used", "kept", "bus", "of measured", "busy", "memory", "peak")
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    before = last.measured.gpus if last is not None else [None] * len(info.gpus)
    seconds = _seconds_between(last, report)
    for each in zip(info.gpus, report.load.gpus, before, report.measured.gpus, strict=True):
        table.add_row(*_gpu_cells(*each, seconds))
    return table


def _gpu_cells(
    gpu: Gpu, load: GpuLoad, before: GpuMeasured | None, measured: GpuMeasured, seconds: float
) -> Iterator[str]:
    yield str(gpu.gpu)
    yield str(load.running_requests)
    total = sum(use.total for use in load.blocks)
    yield f"{sum(use.used for use in load.blocks) / total:.0%} of {total}" if total else "-"
    yield str(sum(use.kept for use in load.blocks))
    rate = _growth(before, measured, _BUS, seconds)
    yield "-" if rate is None else _bytes(rate)
    yield "-" if rate is None or not gpu.load_bytes_per_second else f"{rate / gpu.load_bytes_per_second:.0%}"
    yield "-" if before is None or seconds <= 0 else f"{_busy_seconds(measured, before) / seconds:.0%}"
    yield format_bytes(load.device_bytes)
    yield format_bytes(measured.peak_device_bytes)


def _busy_seconds(measured: GpuMeasured, before: GpuMeasured) -> float:
    return (measured.busy_time.ToNanoseconds() - before.busy_time.ToNanoseconds()) / 1e9


def _seconds_between(last: WatchLoadResponse | None, report: WatchLoadResponse) -> float:
    """By the server's clock; 0 without `last`."""
    return 0.0 if last is None else (report.uptime.ToNanoseconds() - last.uptime.ToNanoseconds()) / 1e9


def _growth(
    before: Measured | GpuMeasured | None, now: Measured | GpuMeasured, counters: Sequence[str], seconds: float
) -> float | None:
    """What the counters have grown by in a second, together; None: nobody knows."""
    if before is None or seconds <= 0:
        return None
    return float(sum(getattr(now, name) - getattr(before, name) for name in counters) / seconds)


def _rate(last: WatchLoadResponse | None, report: WatchLoadResponse, counters: Sequence[str], unit: Unit) -> str:
    before = None if last is None else last.measured
    rate = _growth(before, report.measured, counters, _seconds_between(last, report))
    return "-" if rate is None else unit(rate)


def _bytes(rate: float) -> str:
    return format_rate(rate, "B/s")


def _tokens(rate: float) -> str:
    return f"{rate:.1f} tokens/s"


def _bar(share: float) -> str:
    return ("█" * round(share * _BAR)).ljust(_BAR, "░")


def _title(use: BlockUse) -> str:
    kinds, tiers = ("", "KV", "activations"), ("", "device", "host")
    return f"{kinds[use.kind]}, {tiers[use.tier]}"
