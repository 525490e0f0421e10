"""hsrpc top: what it shows of a server's reports."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console

from hsrpc.cli.top import view
from hsrpc.client import Client
from hsrpc.v1 import server_pb2 as v1

ROOT = Path(__file__).parents[2]
INFO = v1.GetServerInfoResponse(
    version="1.2", model="opt-13b", device="H100", plan=v1.Plan(max_batch=64, device_memory_bytes=24 * 1024**3)
)


def report(seconds: int, moved: int, tokens: int) -> v1.WatchLoadResponse:
    use = v1.BlockUse(kind=v1.BLOCK_KIND_ACTIVATION, tier=v1.BLOCK_TIER_HOST, used=25, total=100)
    none = v1.BlockUse(kind=v1.BLOCK_KIND_KV, tier=v1.BLOCK_TIER_DEVICE)
    measured = v1.Measured(
        weights_streamed_bytes=moved, cache_loaded_bytes=moved, generated_tokens=tokens, peak_device_bytes=1024**3
    )
    load = v1.Load(running_requests=5, queued_requests=2, blocks=[use, none])
    return v1.WatchLoadResponse(load=load, measured=measured, uptime=Duration(seconds=seconds))


def shown(last: v1.WatchLoadResponse | None, now: v1.WatchLoadResponse, info: v1.GetServerInfoResponse = INFO) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(view(info, last, now))
    return console.file.getvalue()


def test_a_view_has_load_blocks_bus_and_throughput():
    """Rates are differences over the server's time; pools without blocks are left out."""
    text = shown(report(10, 10**9, 50), report(12, 6 * 10**9, 250))
    assert "opt-13b on H100" in text
    assert "5 of 64 run, 2 wait" in text
    assert "25 of 100 blocks" in text
    assert "KV, device" not in text
    assert "5.00 GB/s" in text
    assert "100.0 tokens/s" in text
    assert "1.0 GiB at the peak, of 24.0 GiB" in text


def report_of_two(seconds: int, moved: int, busy: int) -> v1.WatchLoadResponse:
    """Two GPUs: the first has moved twice as much as the second, and is always busy."""
    whole = report(seconds, 3 * moved, 50)
    for gpu, factor in ((0, 2), (1, 1)):
        use = v1.BlockUse(kind=v1.BLOCK_KIND_KV, tier=v1.BLOCK_TIER_HOST, used=20 * factor, total=50, kept=3)
        whole.load.gpus.add(gpu=gpu, running_requests=3 - gpu, blocks=[use], device_bytes=factor * 1024**3)
        time = Duration(seconds=busy if gpu else seconds)
        whole.measured.gpus.add(
            gpu=gpu, weights_streamed_bytes=factor * moved, cache_loaded_bytes=factor * moved, busy_time=time
        )
    return whole


def test_several_gpus_have_a_line_each():
    """What runs there, its blocks, its bus beside what was measured of it, its part of the time, its memory."""
    info = v1.GetServerInfoResponse(plan=INFO.plan, gpus=[v1.Gpu(gpu=n, load_bytes_per_second=5e9) for n in range(2)])
    text = shown(report_of_two(10, 10**9, 5), report_of_two(14, 3 * 10**9, 7), info)
    head, first, second = (" ".join(line.split()) for line in text.splitlines()[-3:])
    assert head.startswith("GPU requests")
    assert first == "0 3 80% of 50 3 2.00 GB/s 40% 100% 2.0 GiB 0 B"
    assert second == "1 2 40% of 50 3 1.00 GB/s 20% 50% 1.0 GiB 0 B"
    unknown = " ".join(shown(None, report_of_two(10, 10**9, 5), info).splitlines()[-1].split())
    assert unknown == "1 2 40% of 50 3 - - - 1.0 GiB 0 B"


def test_the_first_view_knows_no_rates():
    """One report has no difference, and two of the same moment neither."""
    assert "B/s" not in shown(None, report(1, 1, 1))
    assert "B/s" not in shown(report(1, 1, 1), report(1, 2, 2))


@pytest.fixture
def address() -> Iterator[str]:
    """A server in a process of its own, whose engine says what it is told to."""
    command = [sys.executable, "-m", "tests.server.serve_fake"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with Client(address) as client:
                client.wait_ready(60)
            yield address
        finally:
            process.kill()


def test_reports_of_a_server_are_shown_live(hsrpc, address):
    """`hsrpc top` shows what WatchLoad reports, so many times as it is told to."""
    ran = hsrpc("top", "--target", address, "--count=3", "--interval=0.1")
    assert ran.code == 0
    assert "fake/model on cpu" in ran.out
    assert "0 of 4 run, 1 wait" in ran.out
    assert "0.00 B/s" in ran.out  # a rate: there was a report before the last one
