"""Finds accesses to memory that no event orders: vector clocks over streams, and what each byte was used for last."""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias
from weakref import ref

import torch

from hsrpc.testing.access_history import AccessHistory, Actor, Box, Conflict, RowSet
from hsrpc.testing.operations import Role, Use
from hsrpc.testing.sites import Place, user_place

_EVER = sys.maxsize
"""Every stream knows of all that the host did: what it launches comes after that."""

_OF_DEVICE = [0] * Actor.HOST
"""No stream knows of what another does, before it has waited for that."""

Clock: TypeAlias = list[int]
"""For each actor, the number of its latest operation that is known to be done."""


class Mark(NamedTuple):
    """An event: all that was launched on `stream` so far, and what that knew of."""

    stream: Actor
    clock: Clock


class Race(NamedTuple):
    """Two uses of one buffer in an order that nothing ensures."""

    buffer: str
    later: str
    earlier: str

    def __str__(self) -> str:
        return f"{self.buffer}: {self.later} is not ordered after {self.earlier}"


class _Operation(NamedTuple):
    """What was launched, for people."""

    name: str
    place: Place


@dataclass(slots=True, eq=False)
class _Buffer:
    """One storage."""

    kind: str
    """What it is, without the place where it was made."""
    made: Place
    history: AccessHistory
    owner: Actor | None
    """Stream that may reuse the memory once nothing refers to it. None: the memory is the host's."""
    is_staging: bool = False
    """Copies leave it without waiting for the host, which fills it."""
    others: set[Actor] = field(default_factory=set)
    """Who used it, apart from its owner."""
    kept: set[Actor] = field(default_factory=set)
    """Streams that are waited for before its memory is reused."""
    storage: ref[torch.UntypedStorage] | None = None

    def __str__(self) -> str:
        return f"{self.kind} of {self.made.function}"


class _Read(NamedTuple):
    """A copy out of a staging buffer that the host has not waited for, and what it is to find there."""

    buffer: _Buffer
    tensor: torch.Tensor
    content: torch.Tensor
    stream: Actor
    number: int


class Checker:
    """Is told of each operation in the order of their launches. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._clocks: dict[Actor, Clock] = {actor: [*_OF_DEVICE, _EVER] for actor in Actor}
        self._operations: list[_Operation] = []
        """Operations by number, from 1."""
        self._races: Counter[Race] = Counter()
        self._buffers: dict[int, _Buffer] = {}
        """Buffers by address of the storage."""
        self._unreferenced: deque[_Buffer] = deque()
        """Buffers that nothing refers to and that were not looked at yet."""
        self._reusable: dict[Actor, list[_Buffer]] = {actor: [] for actor in Actor}
        """Buffers by owner, whose next allocation may take their memory."""
        self._reads: list[_Read] = []

    @property
    def num_operations(self) -> int:
        """Launched so far."""
        return len(self._operations)

    def races(self) -> dict[Race, int]:
        """What was found so far, and how often."""
        with self._lock:
            self._check_reads(self._reads)
            return dict(self._races)

    def allocate(self, tensor: torch.Tensor, kind: str, owner: Actor | None, *, is_staging: bool = False) -> None:
        """New memory; `owner` None: the host's."""
        with self._lock:
            self._allocate(tensor, kind, user_place(), owner).is_staging = is_staging
            if owner is Actor.DEFAULT:  # which may fill it, unseen
                self._operations.append(_Operation("filling", user_place()))
                self._access(Use(tensor, Role.WRITE), owner, len(self._operations))

    def to_host(self, tensor: torch.Tensor) -> None:
        """Its memory is the host's."""
        with self._lock:
            self._buffer(tensor).owner = None

    def operation(self, name: str, actor: Actor, used: Iterable[Use]) -> int:
        """Note an operation, which is launched now; its number."""
        with self._lock:
            self._look_at_unreferenced()
            self._operations.append(_Operation(name, user_place()))
            number = len(self._operations)
            for use in used:
                self._access(use, actor, number)
            return number

    def results(self, number: int, actor: Actor, used: Iterable[Use], results: Iterable[torch.Tensor]) -> None:
        """What operation `number` gave: new tensors are written by it, others are views of what it was given."""
        with self._lock:
            is_view = True
            for tensor in results:
                if tensor.untyped_storage()._cdata not in self._buffers:
                    is_view = False
                    operation = self._operations[number - 1]
                    buffer = self._allocate(tensor, operation.name, operation.place, actor)
                    buffer.history.add_whole(actor, number)
            for use in used:
                if use.role is Role.ALIAS and not is_view:  # such as of `reshape`, where it has to copy
                    self._access(use._replace(role=Role.READ), actor, number)

    def keep(self, tensor: torch.Tensor, stream: Actor) -> None:
        """The tensor's memory is not reused before `stream` is done with it."""
        with self._lock:
            self._buffer(tensor).kept.add(stream)

    def mark(self, stream: Actor) -> Mark:
        """An event behind all that `stream` was given so far."""
        with self._lock:
            clock = list(self._clocks[stream])
            clock[stream] = len(self._operations)
            return Mark(stream, clock)

    def wait(self, stream: Actor, mark: Mark) -> None:
        """What `stream` is given from now on comes after `mark`."""
        with self._lock:
            self._learn(stream, mark.clock)

    def synchronize(self, mark: Mark) -> None:
        """What the host does and launches from now on comes after `mark`."""
        with self._lock:
            for actor in Actor:
                self._learn(actor, mark.clock)
            known = self._clocks[Actor.HOST]
            done = [read for read in self._reads if read.number <= known[read.stream]]
            self._check_reads(done)
            self._reads = [read for read in self._reads if read.number > known[read.stream]]

    def drain(self) -> None:
        """What the host does and launches from now on comes after all that was launched before."""
        self.synchronize(Mark(Actor.HOST, [len(self._operations)] * len(Actor)))

    def _learn(self, actor: Actor, clock: Clock) -> None:
        mine = self._clocks[actor]
        mine[:] = map(max, mine, clock)

    def _buffer(self, tensor: torch.Tensor) -> _Buffer:
        """Find a tensor's buffer, or make one: a tensor that nobody made known is the result of something unseen."""
        found = self._buffers.get(tensor.untyped_storage()._cdata)
        return self._allocate(tensor, "tensor", user_place(), None) if found is None else found

    def _allocate(self, tensor: torch.Tensor, kind: str, made: Place, owner: Actor | None) -> _Buffer:
        storage = tensor.untyped_storage()
        key = storage._cdata
        buffer = _Buffer(kind, made, AccessHistory(storage.nbytes()), owner)

        def unreferenced(_: object) -> None:  # by whatever thread, perhaps within this object: it only takes note
            if self._buffers.get(key) is buffer:
                del self._buffers[key]
            self._unreferenced.append(buffer)

        buffer.storage = ref(storage, unreferenced)
        self._buffers[key] = buffer
        if owner is not None:
            self._reuse(owner)
        return buffer

    def _access(self, use: Use, actor: Actor, number: int) -> None:
        tensor, role, rows = use
        buffer = self._buffer(tensor)
        if role is Role.ALIAS or not tensor.numel() or (rows is not None and not len(rows)):
            return
        region = Box.of(tensor) if rows is None else RowSet.of(tensor, rows)
        writes = role is Role.WRITE
        for conflict in buffer.history.unordered(region, actor, self._clocks[actor], writes=writes):
            kind = "write" if writes else "read"
            self._report(buffer, f"{kind} by {self._told(number)} on {actor}", conflict)
        if actor is not buffer.owner:
            buffer.others.add(actor)
        buffer.history.add(region, actor, number, writes=writes)
        if buffer.is_staging and not writes and actor is not Actor.HOST:
            self._reads.append(_Read(buffer, tensor, tensor.clone(), actor, number))

    def _look_at_unreferenced(self) -> None:
        while self._unreferenced:
            buffer = self._unreferenced.popleft()
            if buffer.owner is not None and buffer.others - buffer.kept:
                self._reusable[buffer.owner].append(buffer)

    def _reuse(self, owner: Actor) -> None:
        """Memory is allocated on `owner`, perhaps that of any buffer that is there no more."""
        self._look_at_unreferenced()
        for buffer in self._reusable[owner]:
            for user in buffer.others - buffer.kept:
                if (number := buffer.history.last(user)) > self._clocks[owner][user]:
                    self._report(buffer, f"reuse of its memory on {owner}", Conflict(user, number, writes=False))
        self._reusable[owner].clear()

    def _check_reads(self, reads: Iterable[_Read]) -> None:
        for read in reads:
            if not torch.equal(read.tensor, read.content):
                later = f"rewriting it on {Actor.HOST}"
                self._report(read.buffer, later, Conflict(read.stream, read.number, writes=False))

    def _report(self, buffer: _Buffer, later: str, earlier: Conflict) -> None:
        kind = "write" if earlier.writes else "read"
        self._races[Race(str(buffer), later, f"the {kind} by {self._told(earlier.number)} on {earlier.actor}")] += 1

    def _told(self, number: int) -> str:
        operation = self._operations[number - 1]
        return f"{operation.name} ({operation.place})"
