"""Connections of this process, cut by the name that gRPC has for their other end: grpc itself can close none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from hsrpc.server.caller import canonical_host
from hsrpc.server.grpc.peer import peer_address

_DESCRIPTORS = "/dev/fd"
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def cut(peer: str) -> bool:
    """Shut down the connection that `peer` has made to a port of this process; its calls end, its memory is freed.

    `peer` is as `context.peer()` has it, such as ipv4:127.0.0.1:5. False: there is none, or it cannot be told apart, as
    those of unix sockets cannot. Looks at every open descriptor, some microseconds each.
    """
    address = peer_address(peer)
    if address is None:
        return False
    ports = set()
    with ExitStack() as found:
        ends = []
        for each in _tcp_sockets():
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                ports.add(each.getsockname()[1])
            elif _leads_to(each, *address):
                with suppress(OSError):  # no descriptor is left
                    ends.append(found.enter_context(each.dup()))
        was_cut = [_shut_down(each) for each in ends if each.getsockname()[1] in ports]
    return any(was_cut)


def _tcp_sockets() -> Iterator[socket.socket]:
    """A second descriptor of each, one at a time: the first may be closed, and its number taken, at any moment."""
    for name in os.listdir(_DESCRIPTORS):
        with suppress(OSError), _duplicate(int(name)) as each:  # it may be closed already, or no socket
            if each.family in _INTERNET and each.type == socket.SOCK_STREAM:
                yield each


def _duplicate(descriptor: int) -> socket.socket:
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _leads_to(each: socket.socket, host: str, port: int) -> bool:
    try:
        found = each.getpeername()
    except OSError:  # not connected, or not any more
        return False
    # The system's name has no scope.
    return found[1] == port and canonical_host(found[0]) == host.partition("%")[0]


def _shut_down(each: socket.socket) -> bool:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:  # the client was faster
        return False
    return True
