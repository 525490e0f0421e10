"""Cache blocks: who holds which. Numbers only; the memory behind them belongs to the cache manager's pools.

A block holds `block_size` tokens across all layers, of one request or of a prefix that several share. It is of one kind
(K and V, or activations) and lies in one tier (device or host); kind and tier together name its pool.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import partial
from heapq import heappop, heappush
from typing import NamedTuple, Protocol, TypeAlias


class BlockKind(Enum):
    """What a block holds of its tokens; a plan may have activation blocks hold K and V in some layers."""

    KV = "kv"
    ACTIVATION = "activation"


class Tier(Enum):
    """Where a block lies."""

    DEVICE = "device"
    HOST = "host"


class PoolId(IntEnum):
    """A pool of blocks of one kind in one tier. The numbers say nothing: they index tables and arrays, no more."""

    DEVICE_KV = 0
    HOST_KV = 1
    DEVICE_ACTIVATION = 2
    HOST_ACTIVATION = 3

    @property
    def kind(self) -> BlockKind:
        return BlockKind.KV if self in (PoolId.DEVICE_KV, PoolId.HOST_KV) else BlockKind.ACTIVATION

    @property
    def tier(self) -> Tier:
        return Tier.DEVICE if self in (PoolId.DEVICE_KV, PoolId.DEVICE_ACTIVATION) else Tier.HOST


POOLS_OF_KIND = {
    BlockKind.KV: (PoolId.DEVICE_KV, PoolId.HOST_KV),
    BlockKind.ACTIVATION: (PoolId.DEVICE_ACTIVATION, PoolId.HOST_ACTIVATION),
}
"""The device first."""
POOLS_OF_TIER = (
    (PoolId.DEVICE_KV, PoolId.DEVICE_ACTIVATION),
    (PoolId.HOST_KV, PoolId.HOST_ACTIVATION),
)
"""K and V, then activations; in order of preference: a block on the device costs no transfer."""


class Block(NamedTuple):
    """A block, by its pool and its number there."""

    pool: PoolId
    number: int


_MOST_AT_ONCE = 16
"""Kept blocks that make room at once, at most: a copy of so many is about as fast as one of more."""
_LEAST_ROUNDS = 64
"""Rounds after which a small pool is full again, at least: fewer blocks make room at once there."""


class BlockTable:
    """The blocks of one request in token order, as two parallel arrays, of which the first ones may be freed.

    Block i of a request holds its tokens i*block_size onward; entry j of the arrays is its block `first + j`.
    """

    __slots__ = ("first", "indices", "pools")

    def __init__(self) -> None:
        self.first = 0
        """Number of the first block that is kept: those before it are freed."""
        self.pools = array("b")
        self.indices = array("q")

    def __len__(self) -> int:
        return len(self.pools)

    @property
    def end(self) -> int:
        """Number of the block that comes next."""
        return self.first + len(self.pools)

    def block(self, number: int) -> Block:
        """The request's block of that number, which is kept."""
        return Block(PoolId(self.pools[number - self.first]), self.indices[number - self.first])

    def append(self, pool: PoolId, index: int) -> None:
        self.pools.append(pool)
        self.indices.append(index)

    def last_of(self, pool: PoolId) -> int | None:
        """Index of the last block of `pool` among the newest few, for handing out its neighbour."""
        for i in range(len(self.pools) - 1, max(-1, len(self.pools) - 9), -1):
            if self.pools[i] == pool:
                return self.indices[i]
        return None


class BlockPool:
    """Blocks 0 .. num_blocks-1 of one pool: each is free, held by one or more, or kept for what it holds.

    One that is kept is nobody's and counts as free; where no other is free, those not used for longest are taken.

    Neighbours travel as one copy. So that a request's later blocks find room behind its first ones, the pool is divided
    into slots of `slot_size` blocks, and a run of blocks begins with a free slot as long as there is one. For the same
    reason several that are kept make room at once.
    """

    def __init__(self, num_blocks: int, slot_size: int = 1, forget: Callable[[int], object] | None = None) -> None:
        """`forget` is called with each block that was `valued`, when its content is about to be lost."""
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        """Blocks that nobody holds."""
        self._forget = forget
        self._holders = array("l", bytes(array("l").itemsize * num_blocks))
        self._is_valued = bytearray(num_blocks)
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Blocks that are kept, longest unused first."""
        self._slot_size = slot_size
        self._free = bytearray(b"\x01" * num_blocks)
        self._used_in_slot = [0] * -(-num_blocks // slot_size)
        self._free_blocks = _LowestFirst(num_blocks)
        self._free_slots = _LowestFirst(num_blocks // slot_size)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_kept(self) -> int:
        """Blocks that nobody holds, and whose content is kept."""
        return len(self._kept)

    def num_holders(self, index: int) -> int:
        """How often a block is held."""
        return self._holders[index]

    def allocate(self, after: int | None = None) -> int:
        """Take the block behind `after` where it is free, else the first of a free slot, else the lowest free one.

        Raises:
            IndexError: no block is free.
        """
        if not self.num_free:
            raise IndexError("no block is free")
        if self.num_free == len(self._kept):
            self._make_room()
        if after is not None and after + 1 < self.num_blocks and self._free[after + 1]:
            return self._take(after + 1)
        slot = self._free_slots.first(lambda slot: not self._used_in_slot[slot])
        index = self._free_blocks.first(self._free.__getitem__) if slot is None else slot * self._slot_size
        assert index is not None  # one is free, and there is room
        return self._take(index)

    def hold(self, index: int) -> None:
        """Hold a block once more, or one that is kept.

        Raises:
            ValueError: it is free.
        """
        if self._free[index]:
            raise ValueError(f"block {index} is free")
        if not self._holders[index]:
            del self._kept[index]
            self.num_free -= 1
        self._holders[index] += 1

    def value(self, index: int) -> None:
        """What a block that is held holds is worth keeping when nobody holds it any longer."""
        assert self._holders[index]
        self._is_valued[index] = 1

    def free(self, index: int) -> None:
        """Hold a block once less; it is free, or kept, if that was the last time.

        Raises:
            ValueError: nobody holds it.
        """
        if not self._holders[index]:
            raise ValueError(f"block {index} is free already")
        self._holders[index] -= 1
        if self._holders[index]:
            return
        self.num_free += 1
        if self._is_valued[index]:
            self._kept[index] = None
        else:
            self._release(index)

    def _take(self, index: int) -> int:
        self._free[index] = 0
        self._holders[index] = 1
        self.num_free -= 1
        self._used_in_slot[index // self._slot_size] += 1
        return index

    def _make_room(self) -> None:
        """Free some blocks that are kept."""
        for _ in range(min(len(self._kept), max(1, min(_MOST_AT_ONCE, self.num_blocks // _LEAST_ROUNDS)))):
            index, _ = self._kept.popitem(last=False)
            self._is_valued[index] = 0
            if self._forget is not None:
                self._forget(index)
            self._release(index)

    def _release(self, index: int) -> None:
        slot = index // self._slot_size
        self._free[index] = 1
        self._used_in_slot[slot] -= 1
        self._free_blocks.add(index)
        if not self._used_in_slot[slot] and (slot + 1) * self._slot_size <= self.num_blocks:
            self._free_slots.add(slot)


class _LowestFirst:
    """Numbers in a heap: all that are valid are in it, and some that are so no more."""

    def __init__(self, count: int) -> None:
        self._heap = list(range(count))
        self._has = bytearray(b"\x01" * count)

    def add(self, number: int) -> None:
        if not self._has[number]:
            self._has[number] = 1
            heappush(self._heap, number)

    def first(self, is_valid: Callable[[int], object]) -> int | None:
        """The lowest valid one, which stays; None: there is none."""
        while self._heap and not is_valid(self._heap[0]):
            self._has[heappop(self._heap)] = 0
        return self._heap[0] if self._heap else None


Pools: TypeAlias = Mapping[PoolId, BlockPool]
Key: TypeAlias = bytes
"""Stands for the tokens of a full block, for all before them, and for whose they are."""


class KindRule(Protocol):
    """Decides which pools a request's next blocks come from, and so which kind they are."""

    def has_room(self, pools: Pools, number: int, wanted: int) -> bool:
        """Whether there are free blocks for `wanted` blocks of a request, from its block `number` on."""

    def next_run(self, pools: Pools, number: int, wanted: int) -> tuple[PoolId, int]:
        """The pool of a request's block `number`, and how many of the `wanted` come from it one after the other.

        Asked only where there is room for all of them.
        """


@dataclass(frozen=True, slots=True)
class InProportion:
    """The kinds in use keep the proportion of their tier's pools, so that both run out together.

    The device comes before the host. A tier may have one kind only, whatever the other has.
    """

    def has_room(self, pools: Pools, number: int, wanted: int) -> bool:
        return wanted <= sum(pool.num_free for pool in pools.values())

    def next_run(self, pools: Pools, number: int, wanted: int) -> tuple[PoolId, int]:
        kv, activation = next(pair for pair in POOLS_OF_TIER if any(pools[pool].num_free for pool in pair))
        for pool, other in ((kv, activation), (activation, kv)):
            if not pools[other].num_blocks:
                return pool, min(wanted, pools[pool].num_free)
        # A kind that is called for has a free block: in proportion, neither kind is full before its tier is.
        return (activation if _lacks_activations(pools[kv], pools[activation]) else kv), 1


IN_PROPORTION = InProportion()


class BlockManager:
    """The pools, and which of them the next block comes from."""

    def __init__(
        self, num_blocks: Mapping[PoolId, int], max_batch: int | None = None, rule: KindRule = IN_PROPORTION
    ) -> None:
        """Make the pools; with `max_batch`, each of them leaves as many requests room to grow in."""
        self.pools = {
            pool: BlockPool(count, max(1, count // (max_batch or count or 1)), partial(self._forget, pool))
            for pool, count in ((pool, num_blocks.get(pool, 0)) for pool in PoolId)
        }
        self._rule = rule
        self._published: dict[Key, Block] = {}
        self._keys: dict[Block, Key] = {}
        """Keys of the blocks that are published."""

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self.pools.values())

    @property
    def num_free(self) -> int:
        """Free blocks of all kinds: by the rule, a request's next ones may be of a kind that has fewer."""
        return sum(pool.num_free for pool in self.pools.values())

    def grow(self, table: BlockTable, num_blocks: int) -> bool:
        """Append `num_blocks` blocks to the table, or none and return False where there are too few."""
        if num_blocks <= 0:
            return True  # most tokens go to a block that is there
        if not self._rule.has_room(self.pools, table.end, num_blocks):
            return False
        while num_blocks:
            pool, count = self._rule.next_run(self.pools, table.end, num_blocks)
            blocks, index = self.pools[pool], table.last_of(pool)
            for _ in range(count):
                index = blocks.allocate(index)
                table.append(pool, index)
            num_blocks -= count
        return True

    def find(self, keys: Sequence[Key]) -> list[Block]:
        """The blocks that hold the tokens of the first `keys`, as far as there are such blocks."""
        found = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def is_held(self, block: Block) -> bool:
        return self.pools[block.pool].num_holders(block.number) > 0

    def share(self, table: BlockTable, blocks: Sequence[Block]) -> None:
        """Append published blocks to the table, which holds them too."""
        for pool, index in blocks:
            self.pools[pool].hold(index)
            table.append(pool, index)

    def publish(self, table: BlockTable, number: int, key: Key) -> None:
        """Let others find the request's block `number`, which is full, by its `key`, unless another is found by it."""
        if key in self._published:
            return
        block = table.block(number)
        self._published[key] = block
        self._keys[block] = key
        self.pools[block.pool].value(block.number)

    def free(self, table: BlockTable) -> None:
        """Give all blocks of the table back, the last first: of what is kept, a prefix stays longest. It is as new."""
        for pool, index in zip(reversed(table.pools), reversed(table.indices), strict=True):
            self.pools[PoolId(pool)].free(index)
        del table.pools[:], table.indices[:]
        table.first = 0

    def free_before(self, table: BlockTable, number: int) -> None:
        """Give back the blocks before block `number` of the request, as far as they are still there."""
        count = number - table.first
        if count <= 0:
            return
        for pool, index in zip(table.pools[:count], table.indices[:count], strict=True):
            self.pools[PoolId(pool)].free(index)
        del table.pools[:count], table.indices[:count]
        table.first = number

    def free_from(self, table: BlockTable, number: int) -> None:
        """Give back the request's blocks from block `number` on, the last first; others cannot have found them yet."""
        while table.end > max(number, table.first):
            pool, index = table.pools.pop(), table.indices.pop()
            assert Block(PoolId(pool), index) not in self._keys
            self.pools[PoolId(pool)].free(index)

    def _forget(self, pool: PoolId, index: int) -> None:
        del self._published[self._keys.pop(Block(pool, index))]


def _lacks_activations(kv: BlockPool, activation: BlockPool) -> bool:
    """Whether one more block in use makes the activations' part of used blocks smaller than that of all blocks."""
    num_blocks, num_used = kv.num_blocks + activation.num_blocks, kv.num_used + activation.num_used
    return activation.num_used * num_blocks < activation.num_blocks * (num_used + 1)
