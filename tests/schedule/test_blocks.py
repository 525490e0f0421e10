"""Blocks: owned once or free, from the front or all at once; handed out in runs, kinds in the planned share."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hsrpc.schedule.blocks import (
    POOLS_OF_KIND,
    POOLS_OF_TIER,
    BlockKind,
    BlockManager,
    BlockPool,
    BlockTable,
    PoolId,
    Tier,
)

BUDGETS = st.fixed_dictionaries({pool: st.integers(0, 8) for pool in PoolId})


def owned(tables: list[BlockTable]) -> list[tuple[int, int]]:
    return [block for table in tables for block in zip(table.pools, table.indices, strict=True)]


def contents(table: BlockTable) -> tuple[list[int], list[int]]:
    return list(table.pools), list(table.indices)


class PoolMachine(RuleBasedStateMachine):
    """A pool against the set of blocks that were taken."""

    @initialize(num_blocks=st.integers(0, 12), slot_size=st.integers(1, 5))
    def make(self, num_blocks: int, slot_size: int) -> None:
        self.pool = BlockPool(num_blocks, slot_size)
        self.slots = [set(range(i, i + slot_size)) for i in range(0, num_blocks - slot_size + 1, slot_size)]
        self.taken: set[int] = set()

    @rule(after=st.none() | st.integers(-1, 12))
    def allocate(self, after: int | None) -> None:
        """The neighbour where it is free, else the first block of a free slot, else the lowest one, else IndexError."""
        free = set(range(self.pool.num_blocks)) - self.taken
        if not free:
            with pytest.raises(IndexError):
                self.pool.allocate(after)
            return
        neighbour = None if after is None else after + 1
        index = self.pool.allocate(after)
        slot = next((slot for slot in self.slots if slot <= free), free)
        assert index == (neighbour if neighbour in free else min(slot))
        self.taken.add(index)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.taken)))
        self.pool.free(index)
        self.taken.remove(index)

    @precondition(lambda self: len(self.taken) < self.pool.num_blocks)
    @rule(data=st.data())
    def free_twice(self, data: st.DataObject) -> None:
        """A free block cannot be given back, and nothing changes."""
        index = data.draw(st.sampled_from(sorted(set(range(self.pool.num_blocks)) - self.taken)))
        with pytest.raises(ValueError, match=f"block {index} is free already"):
            self.pool.free(index)

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_used == len(self.taken)
        assert self.pool.num_free == self.pool.num_blocks - len(self.taken)


class ManagerMachine(RuleBasedStateMachine):
    """A manager with five tables that grow and are freed at random."""

    @initialize(budgets=BUDGETS)
    def make(self, budgets: dict[PoolId, int]) -> None:
        self.budgets = budgets
        self.manager = BlockManager(budgets)
        self.tables = [BlockTable() for _ in range(5)]

    @rule(which=st.integers(0, 4), num_blocks=st.integers(0, 12))
    def grow(self, which: int, num_blocks: int) -> None:
        """All blocks or none: the table's old blocks stay as they are either way."""
        table, free = self.tables[which], self.manager.num_free
        before = contents(table)
        grown = self.manager.grow(table, num_blocks)
        assert grown == (num_blocks <= free)
        after = contents(table)
        assert len(table) == len(before[0]) + (num_blocks if grown else 0)
        assert (after[0][: len(before[0])], after[1][: len(before[1])]) == before

    @rule(which=st.integers(0, 4), behind=st.integers(0, 20))
    def free_from(self, which: int, behind: int) -> None:
        """The last blocks of the table become free, and the others stay as they are."""
        table = self.tables[which]
        first, kept, free = table.first, contents(table), self.manager.num_free
        left = min(len(kept[0]), max(0, behind - first))
        self.manager.free_from(table, behind)
        assert contents(table) == (kept[0][:left], kept[1][:left])
        assert table.first == first
        assert self.manager.num_free == free + len(kept[0]) - left

    @rule(which=st.integers(0, 4), before=st.integers(0, 20))
    def free_before(self, which: int, before: int) -> None:
        """The first blocks of the table become free, once, and the others keep their numbers."""
        table = self.tables[which]
        first, kept, free = table.first, contents(table), self.manager.num_free
        before = min(before, table.end)
        count = max(0, before - first)
        self.manager.free_before(table, before)
        assert contents(table) == (kept[0][count:], kept[1][count:])
        assert (table.first, table.end) == (max(first, before), first + len(kept[0]))
        assert self.manager.num_free == free + count

    @rule(which=st.integers(0, 4))
    def free(self, which: int) -> None:
        """All blocks of the table, and no other, become free."""
        table = self.tables[which]
        expected = self.manager.num_free + len(table)
        self.manager.free(table)
        assert len(table) == len(table.indices) == table.first == 0
        assert self.manager.num_free == expected

    @invariant()
    def every_block_is_owned_once_or_free(self) -> None:
        blocks = owned(self.tables)
        assert len(set(blocks)) == len(blocks)
        used = Counter(pool for pool, _ in blocks)
        for pool, budget in self.budgets.items():
            assert all(0 <= index < budget for p, index in blocks if p == pool)
            assert self.manager.pools[pool].num_used == used[pool]
            assert self.manager.pools[pool].num_free == budget - used[pool]
        assert self.manager.num_blocks == sum(self.budgets.values())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)
TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=60, stateful_step_count=25)


@given(budgets=BUDGETS, growths=st.lists(st.integers(0, 9), max_size=12))
def test_kinds_follow_the_pools(budgets: dict[PoolId, int], growths: list[int]):
    """In each tier the activation blocks in use are its pools' part of all in use, to within one, at every moment."""
    manager = BlockManager(budgets)
    tables = []
    for num_blocks in growths:
        tables.append(BlockTable())
        for _ in range(num_blocks):
            manager.grow(tables[-1], 1)
            for kv, activation in POOLS_OF_TIER:
                check_proportion(budgets, owned(tables), kv, activation)


def check_proportion(budgets: dict[PoolId, int], blocks: list[tuple[int, int]], kv: PoolId, activation: PoolId) -> None:
    used = Counter(pool for pool, _ in blocks)
    share = budgets[activation] / max(1, budgets[kv] + budgets[activation])
    assert abs(used[activation] - share * (used[kv] + used[activation])) < 1


@given(share=st.sampled_from((0.25, 0.5, 0.75)), freed=st.sets(st.integers(0, 9)))
def test_the_proportion_recovers_after_frees(share: float, freed: set[int]):
    """Whatever kinds were freed, growing on brings the blocks in use back to the pools' proportion."""
    budgets = dict.fromkeys(PoolId, 0) | {
        PoolId.HOST_KV: int(600 * (1 - share)),
        PoolId.HOST_ACTIVATION: int(600 * share),
    }
    manager = BlockManager(budgets)
    tables = [BlockTable() for _ in range(10)]
    for table in tables:
        assert manager.grow(table, 7)
    for i in freed:
        manager.free(tables[i])
    assert manager.grow(tables[0], 300)
    check_proportion(budgets, owned(tables), PoolId.HOST_KV, PoolId.HOST_ACTIVATION)


@given(budgets=BUDGETS)
def test_every_block_can_be_used(budgets: dict[PoolId, int]):
    """Growth fails only when nothing is free in any pool."""
    manager, table = BlockManager(budgets), BlockTable()
    assert manager.grow(table, sum(budgets.values()))
    assert manager.num_free == 0
    assert not manager.grow(table, 1)
    assert Counter(table.pools) == {pool: count for pool, count in budgets.items() if count}


@pytest.mark.parametrize("device", [PoolId.DEVICE_KV, PoolId.DEVICE_ACTIVATION])
@pytest.mark.parametrize("host", [PoolId.HOST_KV, PoolId.HOST_ACTIVATION])
def test_the_device_comes_first(device: PoolId, host: PoolId):
    """Blocks lie on the device as long as it has room, whatever its kind and that of the host."""
    manager, table = BlockManager({device: 3, host: 3}), BlockTable()
    assert manager.grow(table, 6)
    assert list(table.pools) == [device] * 3 + [host] * 3


@pytest.mark.parametrize(("kv", "activation"), [(3, 1), (1, 3), (5, 2), (4, 4)])
def test_activations_are_not_behind_their_share(kv: int, activation: int):
    """As many of any number of blocks are activations as their part of the pools, rounded up."""
    manager, table = BlockManager({PoolId.HOST_KV: kv, PoolId.HOST_ACTIVATION: activation}), BlockTable()
    for count in range(1, kv + activation + 1):
        assert manager.grow(table, 1)
        assert table.pools.count(PoolId.HOST_ACTIVATION) == -(-count * activation // (kv + activation))


def test_the_other_kind_of_a_tier_serves():
    """After frees that left one kind of the device full, the device's other kind still comes before the host."""
    manager, tables = BlockManager(dict.fromkeys(PoolId, 4)), [BlockTable(), BlockTable()]
    for pool in (PoolId.DEVICE_KV, PoolId.DEVICE_KV, PoolId.DEVICE_KV, PoolId.DEVICE_KV):
        tables[0].append(pool, manager.pools[pool].allocate())
    assert manager.grow(tables[1], 5)
    assert list(tables[1].pools[:4]) == [PoolId.DEVICE_ACTIVATION] * 4
    assert PoolId(tables[1].pools[4]).tier is Tier.HOST


def test_a_request_gets_neighbours():
    """Requests that grow in large pieces have runs of neighbours, in each pool apart."""
    manager = BlockManager(dict.fromkeys(PoolId, 40))
    tables = [BlockTable(), BlockTable()]
    for table in tables:
        assert manager.grow(table, 16)
    for table in tables:
        for pool in set(table.pools):
            indices = [i for p, i in zip(table.pools, table.indices, strict=True) if p == pool]
            assert indices == list(range(indices[0], indices[0] + len(indices)))


def test_a_request_finds_room_to_grow_behind_its_blocks():
    """Requests that come one after the other and then grow block by block stay in one piece each."""
    manager = BlockManager({PoolId.HOST_KV: 70}, max_batch=7)
    tables = [BlockTable() for _ in range(7)]
    for size in (6, 1, 1, 1, 1):
        for table in tables:
            assert manager.grow(table, size)
    assert sorted(table.indices[0] for table in tables) == list(range(0, 70, 10))
    assert all(list(table.indices) == list(range(table.indices[0], table.indices[0] + 10)) for table in tables)


def test_a_freed_block_is_handed_out_again():
    """A block that was taken as a neighbour while the heap still named it is handed out once, then again when freed."""
    pool = BlockPool(3)
    assert [pool.allocate(0), pool.allocate(), pool.allocate()] == [1, 0, 2]
    pool.free(1)
    pool.free(2)
    assert [pool.allocate(), pool.allocate()] == [1, 2]
    with pytest.raises(IndexError):
        pool.allocate()


def test_the_heaps_do_not_grow():
    """A block that is taken as a neighbour and freed again, over and over, keeps one entry in each heap."""
    pool = BlockPool(4)
    for _ in range(50):
        pool.free(pool.allocate(after=2))
    assert len(pool._free_blocks._heap) == len(pool._free_slots._heap) == 4


@pytest.mark.parametrize(
    ("pool", "kind", "tier"),
    [
        (PoolId.DEVICE_KV, BlockKind.KV, Tier.DEVICE),
        (PoolId.HOST_KV, BlockKind.KV, Tier.HOST),
        (PoolId.DEVICE_ACTIVATION, BlockKind.ACTIVATION, Tier.DEVICE),
        (PoolId.HOST_ACTIVATION, BlockKind.ACTIVATION, Tier.HOST),
    ],
)
def test_a_pool_names_kind_and_tier(pool: PoolId, kind: BlockKind, tier: Tier):
    """Kind and tier follow from the pool, and the pools of a kind list the device first."""
    assert (pool.kind, pool.tier) == (kind, tier)
    assert POOLS_OF_KIND[kind].index(pool) == [Tier.DEVICE, Tier.HOST].index(tier)


def test_last_of_finds_the_newest():
    """The neighbour is sought behind the newest block of the pool; a pool that was never used has none."""
    table = BlockTable()
    assert table.last_of(PoolId.HOST_KV) is None
    table.append(PoolId.HOST_KV, 4)
    table.append(PoolId.HOST_KV, 9)
    table.append(PoolId.DEVICE_KV, 1)
    assert table.last_of(PoolId.HOST_KV) == 9
    assert table.last_of(PoolId.HOST_ACTIVATION) is None
