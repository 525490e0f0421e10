"""Host memory as files of Linux tell it: machines, containers, services and virtual machines that grow."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path

import pytest

from hsrpc.device.host_memory import HostMemory, lock_limit

MEMINFO = {"proc/meminfo": "MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n"}
STAT = "anon 500\ninactive_file 200\nactive_file 100\n"
STAT_1 = "inactive_file 1\nactive_file 1\ntotal_inactive_file 200\ntotal_active_file 100\n"
FREE = 1_024_000
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def memory(root: Path, files: dict[str, str]) -> HostMemory:
    """What is read from these files."""
    for name, text in (MEMINFO | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return HostMemory.read(root)


def v2(size: str, used: str = "1000\n", group: str = "", high: str | None = None) -> dict[str, str]:
    files = {"memory.max": size, "memory.current": used, "memory.stat": STAT}
    return {f"{V2}{group}/{name}": text for name, text in (files | ({"memory.high": high} if high else {})).items()}


def v1(size: str, group: str = "") -> dict[str, str]:
    files = {"memory.limit_in_bytes": size, "memory.usage_in_bytes": "1000\n", "memory.stat": STAT_1}
    return {f"{V1}{group}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "free", "limit"),
    [
        pytest.param({}, FREE, None, id="machine"),
        pytest.param(v2("max\n"), FREE, None, id="no-limit"),
        pytest.param(v2("5000\n"), 4300, f"{V2}/memory.max", id="container"),
        pytest.param(v2("5000\n", high="3000\n"), 2300, f"{V2}/memory.high", id="throttled-before"),
        pytest.param(v2("900\n", "1500\n"), 0, f"{V2}/memory.max", id="exceeded"),
        pytest.param(v2("9999999999\n"), FREE, f"{V2}/memory.max", id="more-than-there-is"),
        pytest.param(
            {"proc/self/cgroup": "0::/system.slice/hsrpc.service\n"}
            | v2("5000\n", group="/system.slice/hsrpc.service"),
            4300,
            f"{V2}/system.slice/hsrpc.service/memory.max",
            id="service",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/pods/pod/server\n"}
            | v2("9000\n", group="/pods/pod/server")
            | v2("6000\n", group="/pods/pod"),
            5300,
            f"{V2}/pods/pod/memory.max",
            id="around-it",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/../../x\n"} | v2("5000\n"), 4300, f"{V2}/memory.max", id="outside-the-namespace"
        ),
        pytest.param(v1("6000\n"), 5300, f"{V1}/memory.limit_in_bytes", id="v1-container"),
        pytest.param(v1("9223372036854771712\n"), FREE, None, id="v1-no-limit"),
        pytest.param(
            {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n"} | v1("6000\n"),
            5300,
            f"{V1}/memory.limit_in_bytes",
            id="v1-container-that-is-told-its-host's-path",
        ),
        pytest.param(
            {"proc/self/cgroup": "4:memory:/jobs/1\n"} | v1("6000\n", "/jobs/1") | v1("9000\n"),
            5300,
            f"{V1}/jobs/1/memory.limit_in_bytes",
            id="v1-job",
        ),
    ],
)
def test_what_is_free_is_within_the_tightest_limit(files: dict[str, str], free: int, limit: str | None, tmp_path: Path):
    """The lesser of what the machine has and what each control group leaves, where the file cache counts as free."""
    found = memory(tmp_path, files)
    assert found.free == found.obtainable == free
    assert found.limit == limit or found.limit.file == tmp_path / limit


def zones(*pages: int) -> dict[str, str]:
    text = "".join(
        f"Node 0, zone   Normal\n  pages free     5\n        present  {each}\n        managed  1\n" for each in pages
    )
    return {"proc/zoneinfo": text}


@pytest.mark.parametrize(
    ("files", "obtainable"),
    [
        pytest.param(zones(500), FREE, id="all-is-in-use"),
        pytest.param(zones(1000, 600), FREE + 1600 * mmap.PAGESIZE * 15 // 16 - 2_048_000, id="grows"),
        pytest.param(zones(1600) | v2("2000000\n", "700\n"), 1_999_600, id="within-the-limit"),
    ],
)
def test_what_a_machine_may_bring_in(files: dict[str, str], obtainable: int, tmp_path: Path):
    """Memory that is there and that the kernel does not count yet, less what it may keep for itself."""
    found = memory(tmp_path, files)
    assert (found.free, found.obtainable) == (FREE, obtainable)


def test_this_machine():
    """Positive, no more than a machine has, and what is free is obtainable."""
    found = HostMemory.read()
    assert 2**20 < found.free <= found.obtainable < 2**50


@pytest.mark.parametrize(
    ("limit", "capabilities", "expected"),
    [
        (2**23, "0000000000000000", 2**23),
        (2**23, "00000000a80425fb", 2**23),  # docker's default
        (2**23, "0000000000004000", None),
        (2**23, "000001ffffffffff", None),
        (resource.RLIM_INFINITY, "0000000000000000", None),
    ],
)
def test_the_limit_of_locked_memory(limit: int, capabilities: str, expected: int | None, tmp_path: Path, monkeypatch):
    """It holds for whoever has not CAP_IPC_LOCK."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(f"Name:\tpython\nCapPrm:\t0\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_MEMLOCK: (limit, limit)}.get)
    assert lock_limit(tmp_path) == expected
