"""Host memory that CUDA's driver has pinned, and what keeps it from doing so."""

from __future__ import annotations

from typing import Protocol, SupportsInt

from hsrpc.config import format_bytes
from hsrpc.device.host_memory import lock_limit
from hsrpc.device.host_pages import HostPages
from hsrpc.errors import ConfigError

_PORTABLE_MAPPED = 0x01 | 0x02
_MAX_TRIAL_BYTES = 2**30
"""Half a second of pinning; a limit of locked memory beyond it is found out when it is reached."""
_BEYOND_LIMIT = 2**21
_REMEDY = (
    "raise it (systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1; Kubernetes: LimitMEMLOCK=infinity in the "
    "service of the node's container runtime; a shell: ulimit -l unlimited), or lower host_memory"
)


class CudaRuntime(Protocol):
    """Functions of the CUDA runtime that pin memory, as torch has them; 0 is success."""

    def cudaHostRegister(self, address: int, size: int, flags: int, /) -> SupportsInt: ...  # noqa: N802
    def cudaHostUnregister(self, address: int, /) -> SupportsInt: ...  # noqa: N802


class PinnedPages:
    """Pages that are pinned until they are released."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self._pages: list[HostPages] = []

    def pin(self, pages: HostPages) -> None:
        """Pin all of `pages`, and keep them.

        Raises:
            ConfigError: the driver cannot; names the limit of locked memory where one holds that is too low.
        """
        status = self._register(pages)
        if status != 0:
            held = sum(each.num_bytes for each in self._pages)
            raise _refusal(pages.num_bytes, held + pages.num_bytes, status)
        self._pages.append(pages)

    def check_limit(self, size: int) -> None:
        """Find out, before anything is loaded, whether the limit of locked memory keeps `size` bytes from being pinned.

        Linux lets drivers pin without counting, and NVIDIA's does, but not everything between it and this process need
        do so. Hence a trial, not a warning: a little more than the limit is pinned once.

        Raises:
            ConfigError: it does.
        """
        limit = lock_limit()
        if limit is None or not limit < size or limit > _MAX_TRIAL_BYTES:
            return
        pages = HostPages(limit + _BEYOND_LIMIT)
        status = self._register(pages)
        if status != 0:
            raise _refusal(size, size, status)
        self._runtime.cudaHostUnregister(pages.tensor.data_ptr())

    def release(self) -> None:
        """Give all of them back; nothing may use them any more."""
        for pages in self._pages:
            self._runtime.cudaHostUnregister(pages.tensor.data_ptr())
        self._pages.clear()

    def _register(self, pages: HostPages) -> int:
        return int(self._runtime.cudaHostRegister(pages.tensor.data_ptr(), pages.num_bytes, _PORTABLE_MAPPED))


def _refusal(size: int, needed: int, status: int) -> ConfigError:
    limit, problem = lock_limit(), f"CUDA cannot pin it (error {status})"
    if limit is None or limit >= needed:
        return ConfigError(
            "host_memory", format_bytes(size), problem, "lower host_memory, or end what else pins memory"
        )
    locks = f"this process may lock {format_bytes(limit)} (RLIMIT_MEMLOCK), and {format_bytes(needed)} are needed"
    return ConfigError("host_memory", format_bytes(size), f"{problem}: {locks}", _REMEDY)
