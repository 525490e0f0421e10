"""Pinned pages, by a driver that is not there: what it is asked for, and what is said when it refuses."""

from __future__ import annotations

import pytest

from hsrpc.device import pinned_pages
from hsrpc.device.host_pages import HostPages
from hsrpc.device.pinned_pages import PinnedPages
from hsrpc.errors import ConfigError

MIB = 2**20


class Driver:
    """Pins up to `limit` bytes in all."""

    def __init__(self, limit: int = 2**60) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}
        self.sizes: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 3
        self.sizes.append(size)
        if sum(self.pinned.values()) + size > self.limit:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may lock 8 MiB."""
    monkeypatch.setattr(pinned_pages, "lock_limit", lambda: 8 * MIB)


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_pages, "lock_limit", lambda: None)


def test_pages_are_pinned_until_they_are_released():
    """Whole pages, by their address."""
    driver = Driver()
    pages, pinned = HostPages(5000), PinnedPages(driver)
    pinned.pin(pages)
    assert driver.pinned == {pages.tensor.data_ptr(): pages.num_bytes}
    pinned.release()
    assert driver.pinned == {}


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("size", [4 * MIB, 8 * MIB, 10**12])
def test_a_driver_that_does_not_mind_the_limit(size: int):
    """As NVIDIA's: nothing is refused, and nothing stays pinned of the trial, which is small."""
    driver = Driver()
    PinnedPages(driver).check_limit(size)
    assert driver.pinned == {}
    assert driver.sizes == ([10 * MIB] if size > 8 * MIB else [])


@pytest.mark.usefixtures("limited")
def test_a_limit_that_holds_is_found_before_loading():
    """The limit, the need, and the remedy for each place where it is set."""
    words = (
        r"host_memory='96\.0 GiB': CUDA cannot pin it \(error 2\): this process may lock 8\.0 MiB \(RLIMIT_MEMLOCK\), "
        r"and 96\.0 GiB are needed; raise it \(systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1; Kub"
    )
    with pytest.raises(ConfigError, match=words):
        PinnedPages(Driver(8 * MIB)).check_limit(96 * 2**30)


@pytest.mark.usefixtures("limited")
def test_a_limit_that_is_reached_while_loading():
    """What is pinned already counts; below the limit it is not blamed."""
    pinned = PinnedPages(Driver(6 * MIB))
    pinned.pin(HostPages(5 * MIB))
    with pytest.raises(ConfigError, match=r"host_memory='4\.0 MiB': .* may lock 8\.0 MiB .*, and 9\.0 MiB are needed"):
        pinned.pin(HostPages(4 * MIB))
    with pytest.raises(ConfigError, match=r"CUDA cannot pin it \(error 2\); lower host_memory, or end what else pins"):
        pinned.pin(HostPages(2 * MIB))


@pytest.mark.usefixtures("unlimited")
def test_without_a_limit_none_is_blamed_nor_tried():
    """A driver that refuses for another reason."""
    driver = Driver(0)
    PinnedPages(driver).check_limit(2**40)
    assert driver.sizes == []
    with pytest.raises(ConfigError, match=r"CUDA cannot pin it \(error 2\); lower host_memory, or end what else pins"):
        PinnedPages(driver).pin(HostPages(MIB))
