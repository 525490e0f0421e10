"""Blocks that several hold or that are kept; keys of blocks; who computes which. Scheduling: test_scheduler.py."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hsrpc.request import FinishReason, SamplingParams
from hsrpc.schedule.blocks import Block, BlockManager, BlockPool, BlockTable, PoolId
from hsrpc.schedule.prefixes import BlockKeys, Claims
from hsrpc.schedule.request_state import Request
from hsrpc.schedule.scheduler import Scheduler, SchedulerLimits
from hsrpc.schedule.step import BufferLimits, RowCosts

TOKENS = st.lists(st.integers(0, 3), max_size=20)


@given(first=TOKENS, second=TOKENS, salts=st.tuples(st.text(max_size=1), st.text(max_size=1)), size=st.integers(1, 5))
def test_keys_are_equal_as_far_as_tokens_and_salts_are(
    first: list[int], second: list[int], salts: tuple[str, str], size: int
) -> None:
    """Whole blocks alone have keys, and one token before the block's end makes another."""
    count = min(len(first), len(second)) // size
    mine = BlockKeys(salts[0]).first(count, first, size)
    others = BlockKeys(salts[1]).first(count, second, size)
    for number in range(count):
        end = (number + 1) * size
        assert (mine[number] == others[number]) == (first[:end] == second[:end] and salts[0] == salts[1])


@given(tokens=st.lists(st.integers(0, 100), min_size=12, max_size=30), at=st.lists(st.integers(0, 3), max_size=5))
def test_keys_are_those_of_all_tokens_whenever_they_are_asked_for(tokens: list[int], at: list[int]) -> None:
    keys = BlockKeys("")
    found = [keys.first(count, tokens, 4) for count in at]
    whole = BlockKeys("").first(3, tokens, 4)
    assert found == [whole[:count] for count in at]


def test_who_computes_a_block() -> None:
    claims: Claims[str] = Claims()
    claims.claim([b"1", b"2"], "a")
    claims.claim([b"2", b"3"], "b")
    assert [claims.is_others(key, "a") for key in (b"1", b"2", b"3", b"4")] == [False, False, True, False]
    claims.drop([b"1", b"2", b"3"], "b")
    assert [claims.is_others(key, "c") for key in (b"1", b"2", b"3")] == [True, True, False]
    claims.drop([b"1", b"2"], "a")
    assert len(claims) == 0


class SharingMachine(RuleBasedStateMachine):
    """Tables that share what they find, and what a block holds, written down when it is taken."""

    @initialize(budgets=st.fixed_dictionaries({pool: st.integers(0, 8) for pool in PoolId}))
    def make(self, budgets: dict[PoolId, int]) -> None:
        self.manager = BlockManager(budgets)
        self.tables = [BlockTable() for _ in range(5)]
        self.texts: list[list[int]] = [[] for _ in self.tables]
        self.held: dict[Block, tuple[int, ...]] = {}
        """Tokens up to the end of each block that somebody wrote."""

    def keys(self, which: int) -> list[bytes]:
        text = self.texts[which]
        return BlockKeys("").first(len(text), text, 1)

    @rule(which=st.integers(0, 4), text=st.lists(st.integers(0, 1), max_size=6))
    def begin(self, which: int, text: list[int]) -> None:
        """A request gives its blocks back, and another takes its place: what it finds holds its own tokens."""
        table = self.tables[which]
        self.manager.free(table)
        self.texts[which] = text
        found = self.manager.find(self.keys(which))
        free = self.manager.num_free
        taken = sum(not self.manager.is_held(block) for block in found)
        self.manager.share(table, found)
        assert self.manager.num_free == free - taken
        assert [self.held[block] for block in found] == [tuple(text[: end + 1]) for end in range(len(found))]
        if not self.manager.grow(table, len(text) - table.end):
            self.manager.free(table)
            self.texts[which] = []
            return
        for number in range(len(found), len(text)):
            self.held[table.block(number)] = tuple(text[: number + 1])

    @rule(which=st.integers(0, 4), count=st.integers(0, 6))
    def publish(self, which: int, count: int) -> None:
        for number, key in enumerate(self.keys(which)[:count]):
            if number >= self.tables[which].first:
                self.manager.publish(self.tables[which], number, key)

    @rule(which=st.integers(0, 4), number=st.integers(0, 6))
    def free_before(self, which: int, number: int) -> None:
        self.manager.free_before(self.tables[which], min(number, self.tables[which].end))

    @invariant()
    def every_block_is_free_held_or_kept(self) -> None:
        holders = Counter(
            Block(PoolId(pool), number)
            for table in self.tables
            for pool, number in zip(table.pools, table.indices, strict=True)
        )
        for pool, blocks in self.manager.pools.items():
            counts = [holders[pool, number] for number in range(blocks.num_blocks)]
            assert [blocks.num_holders(number) for number in range(blocks.num_blocks)] == counts
            assert blocks.num_free == counts.count(0)
            assert 0 <= blocks.num_kept <= blocks.num_free


TestSharing = SharingMachine.TestCase
TestSharing.settings = settings(max_examples=100, stateful_step_count=40)


def kept_in(num_blocks: int, forget: list[int]) -> BlockPool:
    """A pool all of whose blocks were held and valued, and then given back in order."""
    pool = BlockPool(num_blocks, forget=forget.append)
    for index in range(num_blocks):
        assert pool.allocate() == index
        pool.value(index)
    for index in range(num_blocks):
        pool.free(index)
    return pool


def test_what_was_not_used_for_longest_makes_room() -> None:
    """Nothing does while another block is free, or is held."""
    forgotten: list[int] = []
    pool = kept_in(3, forgotten)
    assert (pool.num_free, pool.num_kept) == (3, 3)
    pool.hold(0)
    pool.free(0)
    assert [pool.allocate(), forgotten] == [1, [1]]
    pool.free(1)
    assert [pool.allocate(), forgotten] == [1, [1]]
    pool.hold(2)
    assert [pool.allocate(), forgotten] == [0, [1, 0]]
    with pytest.raises(IndexError):
        pool.allocate()


def test_several_neighbours_make_room_at_once() -> None:
    """In a large pool: what is taken then lies together."""
    forgotten: list[int] = []
    pool = kept_in(256, forgotten)
    taken = [pool.allocate()]
    while len(taken) < 8:
        taken.append(pool.allocate(taken[-1]))
    assert taken == [0, 1, 2, 3, 4, 5, 6, 7]
    assert forgotten == taken[:4] + taken[4:]


def test_a_block_is_held_as_often_as_it_is_given_back() -> None:
    pool = BlockPool(1)
    with pytest.raises(ValueError, match="block 0 is free"):
        pool.hold(0)
    index = pool.allocate()
    pool.hold(index)
    pool.free(index)
    assert pool.num_free == 0
    pool.free(index)
    assert (pool.num_free, pool.num_kept) == (1, 0)
    with pytest.raises(ValueError, match="block 0 is free already"):
        pool.free(index)


def test_a_prefix_is_kept_longer_than_what_follows_it() -> None:
    manager, table = BlockManager({PoolId.HOST_KV: 4}), BlockTable()
    keys = BlockKeys("").first(3, [1, 2, 3], 1)
    manager.grow(table, 3)
    for number, key in enumerate(keys):
        manager.publish(table, number, key)
    manager.free(table)
    manager.grow(table, 2)
    assert len(manager.find(keys)) == 2


def test_nothing_is_held_after_twenty_thousand_requests() -> None:
    """Few beginnings and two salts, in blocks for some requests; they end, are aborted, and give way to others."""
    random = Random(5)
    limits = SchedulerLimits(
        max_batch=32,
        max_model_len=400,
        max_prefill_tokens=64,
        max_idle_prefill_tokens=256,
        block_size=16,
        shares_prefixes=True,
        max_draft_tokens=4,
        buffers=BufferLimits(rows=4000, activation_rows=4000, queries=400),
        costs=RowCosts(1.0, 0.5, 0.1, 0.6),
    )
    pools = {PoolId.DEVICE_KV: 8, PoolId.HOST_KV: 30, PoolId.HOST_ACTIVATION: 30}
    scheduler, added = Scheduler(BlockManager(pools, limits.max_batch), limits, ()), 0
    beginnings = [random.choices(range(50), k=200) for _ in range(6)]
    while added < 20_000 or scheduler.has_work:
        while added < 20_000 and scheduler.num_waiting < 40:
            prompt = [*random.choice(beginnings)[: random.randrange(200)], *random.choices(range(50), k=30)]
            params = SamplingParams(max_tokens=random.randrange(1, 120), ignore_eos=True)
            scheduler.add(Request(str(added), prompt, params, added, 0.0, salt=random.choice(("", "b"))))
            added += 1
        for request, max_tokens in scheduler.draft_candidates():
            request.draft = random.choices(range(50), k=random.randrange(max_tokens + 1))
        step, live = scheduler.schedule(0.0), list(scheduler.live())
        if live and random.random() < 0.3:
            scheduler.finish(random.choice(live).request_id, FinishReason.ABORTED)
        if step is not None:
            chunks = [chunk for chunk in step.chunks if chunk.samples]
            rows = [token for chunk in chunks for token in (*chunk.draft, random.randrange(50))]  # half of them right
            tokens = [token if random.random() < 0.5 else random.randrange(50) for token in rows]
            scheduler.commit(step.step_id, tokens, 1.0)
        assert not any(name.startswith("blocks") for name in scheduler.integrity())
    assert scheduler.integrity() == {}
    assert scheduler.blocks[0].num_free == scheduler.blocks[0].num_blocks
    assert scheduler.preemptions > 100
    assert scheduler.cached_tokens > 100_000
    assert 100_000 < scheduler.accepted_tokens < scheduler.drafted_tokens
