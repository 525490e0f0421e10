"""Each kernel against the same computation written plainly; every element of the output is written."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from hsrpc.device.kernels import copy_rows
from hsrpc.model.attention import Attention, Extras, HeadShape, InPlaceRows, PackedRows
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.lossless import BLOCK, WORD, encode
from hsrpc.model.formats.rows import CodedRows, Codes
from hsrpc.model.kernels import decode_attention as decode_kernel
from hsrpc.model.kernels import lossless
from hsrpc.model.kernels.decode_attention import decode_attention
from hsrpc.model.kernels.fused import gate, rotate_heads_
from hsrpc.model.kernels.lossless import WeightDecoder, encode_weights
from hsrpc.model.kernels.packed_attention import packed_attention
from hsrpc.model.kernels.rows import coding_of
from hsrpc.model.layers import Activation, ClampedGate, Gate
from hsrpc.model.rope import HeadNorms, Unscaled, make_table, rotate_

BLOCK_SIZE = 16
NUM_BLOCKS = 12
HEADS = [
    HeadShape(2, 2, 16, 16),
    HeadShape(6, 6, 64, 64),
    HeadShape(4, 2, 80, 80),
    HeadShape(8, 1, 32, 32),
    HeadShape(16, 8, 32, 32),
    HeadShape(3, 3, 128, 128),
    HeadShape(3, 3, 192, 128),
    HeadShape(4, 2, 40, 24),
    HeadShape(40, 1, 72, 64, shares=True),
    HeadShape(4, 1, 576, 512, shares=True),
]
"""One head a group, several; packs of heads; sizes that are no powers of two; values narrower than keys, and a part of
them, with more query heads than a program takes."""
SOME_HEADS = [
    HeadShape(4, 2, 80, 80),
    HeadShape(3, 3, 16, 16),
    HeadShape(2, 1, 256, 256),
    HeadShape(4, 2, 40, 24),
    HeadShape(6, 1, 40, 24, shares=True),
]
"""A head of each kind, and the widest."""
REQUESTS = [(130, 0, 5), (0, 40, 0), (16, 0, 0), (0, 0, 17), (33, 18, 1), (1, 1, 63)]
"""Keys in place, rebuilt, and behind: parts that end within a tile and with it, and single ones."""


EXTRAS = [(None, False), (0.7, False), (None, True), (1.5, True)]
"""Cap of the scores, and whether there are sinks."""


def dense(
    query: torch.Tensor,
    rows: torch.Tensor,
    heads: HeadShape,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[o] for one query [q] and rows of keys and values, in float64."""
    q = query.double().unflatten(0, (-1, heads.key_dim))
    k, v = (part.double().repeat_interleave(len(q) // heads.num_kv_heads, 1) for part in heads.keys_values(rows))
    scores = torch.einsum("hd,khd->hk", q, k) * heads.key_dim**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = torch.cat((scores, sinks.double()[:, None]), 1).softmax(-1)[:, :-1]
    return torch.einsum("hk,khd->hd", weights, v).flatten()


SKIPS = [47, 0, 15, 0, 16, 1]
"""Keys in place that a window hides: within a block, at its end, in several, and all that there are."""


def rows_of(request: int, tables: torch.Tensor, skips: list[int] | None) -> list[int]:
    """Pool rows of a request's keys in place."""
    keys = range(skips[request] if skips else 0, REQUESTS[request][0])
    return [int(tables[request, key // BLOCK_SIZE]) * BLOCK_SIZE + key % BLOCK_SIZE for key in keys]


@pytest.mark.parametrize(
    ("dtype", "parts", "skips"),
    [(torch.float32, 1, None), (torch.float32, 4, SKIPS), (torch.float16, 4, None), (torch.float16, 1, SKIPS)],
    ids=str,
)
@pytest.mark.parametrize(
    ("heads", "softcap", "has_sinks"),
    [(heads, None, False) for heads in HEADS] + [(heads, *more) for heads in SOME_HEADS for more in EXTRAS[1:]],
    ids=str,
)
def test_decode_attention(
    heads: HeadShape,
    softcap: float | None,
    has_sinks: bool,
    dtype: torch.dtype,
    parts: int,
    skips: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any mix of keys in place, rebuilt and behind, in one part or in several; queries are strided rows."""
    monkeypatch.setattr(decode_kernel, "_num_parts", lambda *_: parts)
    sinks = torch.randn(heads.num_heads).to(dtype) if has_sinks else None
    check_decode_attention(heads, dtype, skips=skips, softcap=softcap, sinks=sinks)


CODED = [(Codes.FP8, False), (Codes.FP8, True), (Codes.INT8, False)]
"""Codes, and whether the hardware converts them."""


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, 4), (torch.float16, 1)])
@pytest.mark.parametrize(("codes", "is_native"), CODED)
@pytest.mark.parametrize("heads", [*SOME_HEADS, HeadShape(16, 8, 32, 32), HeadShape(3, 3, 192, 128)], ids=str)
def test_decode_attention_to_codes(
    heads: HeadShape, codes: Codes, is_native: bool, dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to what they mean, however large and small the scales of heads and tokens are."""
    monkeypatch.setattr(decode_kernel, "_num_parts", lambda *_: parts)
    rows = CodedRows(heads.row_shape, dtype, codes)
    check_decode_attention(heads, dtype, skips=SKIPS, rows=rows, is_native=is_native)


def check_decode_attention(
    heads: HeadShape,
    dtype: torch.dtype,
    *,
    skips: list[int] | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    rows: CodedRows | None = None,
    is_native: bool = False,
) -> None:
    """Against dense attention to all of a request's keys."""
    torch.manual_seed(heads.row_size)
    width, count = heads.row_size, len(REQUESTS)
    rebuilt = [0, *accumulate(front for _, front, _ in REQUESTS)]
    behind = [rebuilt[-1], *accumulate((rest for *_, rest in REQUESTS), initial=rebuilt[-1])][1:]
    pool = torch.randn(NUM_BLOCKS * BLOCK_SIZE, width).to(dtype)
    buffer = torch.randn(behind[-1], width).to(dtype)
    tables = torch.stack([torch.randperm(NUM_BLOCKS)[:9] for _ in REQUESTS]).int()
    queries = torch.randn(count, 3 * heads.query_size).to(dtype)[:, : heads.query_size]
    found = torch.full((count, heads.out_size), torch.nan, dtype=dtype)
    coding = None
    if rows is not None:
        pool, buffer = (rows.encode(spread(each, heads)) for each in (pool, buffer))
        coding = coding_of(rows, queries.device)._replace(is_native=is_native)
    decode_attention(
        queries,
        pool,
        buffer,
        found,
        tables=tables,
        in_place=torch.tensor([first for first, *_ in REQUESTS]).int(),
        skips=None if skips is None else torch.tensor(skips).int(),
        rebuilt_starts=torch.tensor(rebuilt).int(),
        key_starts=torch.tensor(behind).int(),
        heads=heads,
        block_size=BLOCK_SIZE,
        scale=heads.key_dim**-0.5,
        max_keys=200,
        softcap=softcap,
        sinks=sinks,
        coding=coding,
    )
    if rows is not None:
        pool, buffer = rows.decode(pool), rows.decode(buffer)
    for i in range(count):
        keys = (
            pool[rows_of(i, tables, skips)],
            buffer[rebuilt[i] : rebuilt[i + 1]],
            buffer[behind[i] : behind[i + 1]],
        )
        wanted = dense(queries[i], torch.cat(keys), heads, softcap, sinks)
        assert (found[i].double() - wanted).norm() <= (1e-6 if dtype is torch.float32 else 2e-3) * wanted.norm()


def spread(rows: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    """Rows whose tokens and heads have scales of their own, from large to small."""
    factors = 2.0 ** torch.randint(-6, 3, (len(rows), heads.num_kv_heads, 1))
    for part in heads.keys_values(rows)[: 1 if heads.shares else 2]:
        part.mul_(factors.to(part.dtype))
        factors = factors.roll(1, 0) / 8
    return rows


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.float16, 1), (torch.float32, 50)])
@pytest.mark.parametrize(("softcap", "has_sinks"), EXTRAS)
@pytest.mark.parametrize("heads", SOME_HEADS, ids=str)
def test_packed_attention(
    heads: HeadShape, softcap: float | None, has_sinks: bool, dtype: torch.dtype, window: int | None
) -> None:
    """Ragged requests, of a query and of more than a tile of them, with and without cached keys before them."""
    sinks = torch.randn(heads.num_heads).to(dtype) if has_sinks else None
    check_packed_attention(heads, dtype, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.float16, 50)])
@pytest.mark.parametrize(("codes", "is_native"), CODED)
@pytest.mark.parametrize("heads", SOME_HEADS, ids=str)
def test_packed_attention_to_codes(
    heads: HeadShape, codes: Codes, is_native: bool, dtype: torch.dtype, window: int | None
) -> None:
    """As to what they mean."""
    rows = CodedRows(heads.row_shape, dtype, codes)
    check_packed_attention(heads, dtype, window=window, rows=rows, is_native=is_native)


def check_packed_attention(
    heads: HeadShape,
    dtype: torch.dtype,
    *,
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    rows: CodedRows | None = None,
    is_native: bool = False,
) -> None:
    """Against dense attention to the keys that some of the queries see."""
    torch.manual_seed(heads.row_size)
    lengths = [(1, 70), (67, 0), (3, 33), (1, 0)]
    starts = [0, *accumulate(new for new, _ in lengths)]
    key_starts = [2, *accumulate((new + cached for new, cached in lengths), initial=2)][1:]
    queries = torch.randn(starts[-1], 3 * heads.query_size).to(dtype)[:, : heads.query_size]
    kv = torch.randn(key_starts[-1] + 1, heads.row_size).to(dtype)
    coding = None
    if rows is not None:
        kv = rows.encode(spread(kv, heads))
        coding = coding_of(rows, kv.device)._replace(is_native=is_native)
    found = packed_attention(
        queries,
        kv,
        query_starts=torch.tensor(starts).int(),
        key_starts=torch.tensor(key_starts).int(),
        max_queries=67,
        heads=heads,
        scale=heads.key_dim**-0.5,
        window=window,
        softcap=softcap,
        sinks=sinks,
        coding=coding,
    )
    kv = kv if rows is None else rows.decode(kv)
    for request, (new, cached) in enumerate(lengths):
        for number in {0, new // 2, new - 1}:
            end = key_starts[request] + cached + number + 1
            start = key_starts[request] if window is None else max(key_starts[request], end - window)
            row = starts[request] + number
            wanted = dense(queries[row], kv[start:end], heads, softcap, sinks)
            assert (found[row].double() - wanted).norm() <= (1e-6 if dtype is torch.float32 else 2e-3) * wanted.norm()


@pytest.mark.parametrize(("softcap", "has_sinks"), EXTRAS[1:])
def test_a_gpu_attends_with_extras_as_the_cpu_does(softcap: float | None, has_sinks: bool) -> None:
    """Chunks with a window, and single queries in place, in float32: both go to the kernels."""
    heads = HeadShape(4, 2, 16, 16)
    on_cpu, on_gpu = (
        Attention(heads, 0.3, BLOCK_SIZE, torch.device(device), torch.float32, extras=Extras(softcap, has_sinks))
        for device in ("cpu", "cuda")
    )
    queries, kv, sinks = torch.randn(5, 64), torch.randn(40, 64), torch.randn(4) if has_sinks else None
    chunk = PackedRows(torch.tensor([0, 5]).int(), torch.tensor([0, 30]).int(), (0, 5), (0, 30), 5, 30)
    for window in (None, 7):
        wanted = on_cpu.packed(queries, kv, chunk, window, sinks)
        torch.testing.assert_close(on_gpu.packed(queries, kv, chunk, window, sinks), wanted)
    rows = InPlaceRows(
        tables=torch.tensor([[1]]).int(),
        counts=torch.tensor([13]).int(),
        rebuilt_starts=torch.tensor([0, 2]).int(),
        key_starts=torch.tensor([2, 3]).int(),
        max_keys=64,
    )
    found, wanted = torch.empty(1, 64), torch.empty(1, 64)
    on_gpu.in_place(queries[:1], kv, kv, rows, found, sinks=sinks)
    on_cpu.in_place(queries[:1], kv, kv, rows, wanted, sinks=sinks)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_request_without_keys_gets_zeros(has_sinks: bool) -> None:
    """As the padding of a graph's batch is."""
    nothing = torch.zeros(2).int()
    found = torch.full((1, 32), torch.nan)
    decode_attention(
        torch.randn(1, 32),
        torch.randn(BLOCK_SIZE, 64),
        torch.randn(1, 64),
        found,
        tables=torch.zeros(1, 2).int(),
        in_place=nothing[:1],
        rebuilt_starts=nothing,
        key_starts=nothing,
        heads=HeadShape(2, 2, 16, 16),
        block_size=BLOCK_SIZE,
        scale=0.25,
        max_keys=8,
        sinks=torch.randn(2) if has_sinks else None,
    )
    assert torch.equal(found, torch.zeros(1, 32))


@pytest.mark.parametrize(("programs", "keys", "parts"), [(1024, 9999, 1), (1, 100, 1), (32, 4096, 32), (8, 600, 4)])
def test_parts_are_a_power_of_two(programs: int, keys: int, parts: int) -> None:
    """Enough to fill a large GPU, none of them with hardly any keys."""
    assert decode_kernel._num_parts(programs, keys) == parts


@pytest.mark.parametrize("width", [8, 2048, 2056, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_copy_rows(width: int, dtype: torch.dtype) -> None:
    """Rows of a strided source to rows of the target; all others stay; no rows at all is no error."""
    source = torch.randn(9, 2 * width).to(dtype)[:, width:]
    target = torch.full((20, width), 7.0, dtype=dtype)
    wanted = target.clone()
    source_rows, target_rows = torch.tensor([8, 0, 3, 3]), torch.tensor([1, 19, 0, 7])
    wanted[target_rows] = source[source_rows]
    copy_rows(target, target_rows, source, source_rows)
    copy_rows(target, target_rows[:0], source, source_rows[:0])
    assert torch.equal(target, wanted)


@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_weights(dtype: torch.dtype, spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bit of coded weights, with few and with many exponents out of the ordinary; nothing behind the last.

    Of several tensors at once, each with exponents and sizes of its own, one of more blocks than a group of programs.
    """
    monkeypatch.setattr(lossless, "_GROUP", 2)
    coded, targets, wanted = [], [], []
    for count in (WORD, BLOCK, 3 * BLOCK + 5 * WORD, 2 * WORD):
        values = (torch.randn(count) * 0.5 ** len(wanted) * 2.0 ** torch.randint(-spread, spread + 1, (count,))).to(
            dtype
        )
        values[::7] = -0.0
        targets.append(torch.full((count + 9,), 3.0, dtype=dtype))
        coded.append(Encoded(*encode(values), targets[-1][:count]))
        wanted.append(values)
    decode = WeightDecoder.of(coded)
    decode.run()
    for target, values in zip(targets, wanted, strict=True):
        assert torch.equal(target[: len(values)].view(torch.int16), values.view(torch.int16))
        assert torch.equal(target[len(values) :], torch.full((9,), 3.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_are_left_out_are_not_decoded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a table that is read when they are decoded."""
    monkeypatch.setattr(lossless, "_GROUP", 2)
    values = [torch.randn(BLOCK + WORD).to(dtype) for _ in range(3)]
    targets, moves = [torch.zeros_like(each) for each in values], torch.tensor([0, -1, -1])
    parts = zip(values, targets, range(3), strict=True)
    decode = WeightDecoder.of([Encoded(*encode(each), target, number) for each, target, number in parts], moves)
    decode.run()
    assert torch.equal(targets[0], values[0])
    assert not targets[1].any()
    moves.copy_(torch.tensor([-1, 0, -1]))
    targets[0].zero_()
    decode.run()
    assert torch.equal(targets[1], values[1])
    assert not torch.stack(targets[::2]).any()


def test_weights_of_two_types_are_not_decoded_together() -> None:
    """They have kernels of their own."""
    values = [torch.ones(WORD, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    with pytest.raises(ValueError, match="unpack"):
        WeightDecoder.of([Encoded(*encode(each), each) for each in values])


@pytest.mark.parametrize("count", [WORD, BLOCK, 3 * BLOCK + 5 * WORD])
@pytest.mark.parametrize("spread", [0, 6, 60])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encode_weights(dtype: torch.dtype, spread: int, count: int) -> None:
    """The same bytes as those of the host, where no value has a code of the next levels and where most are escapes."""
    values = (torch.randn(count) * 0.02 * 2.0 ** torch.randint(-spread, spread + 1, (count,))).to(dtype)
    values[::7] = -0.0
    for tensor in (values.view(-1, WORD), torch.ones_like(values), torch.arange(count).to(torch.int16).view(dtype)):
        coding, data = encode_weights(tensor)
        wanted, bytes_wanted = encode(tensor)
        assert coding == wanted
        assert torch.equal(data, bytes_wanted)


@pytest.mark.parametrize(("heads", "head_dim", "width"), [(1, 8, 8), (16, 128, 128), (21, 80, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotate_heads(dtype: torch.dtype, heads: int, head_dim: int, width: int) -> None:
    """As in several passes; what lies behind a head's first dimensions, and between the rows, stays as it is.

    The interpreter truncates to bfloat16.
    """
    positions = torch.tensor([0, 1, 77, 4095, 12])
    frequencies, factor = Unscaled().frequencies(1e4, width, 4096), 1.25
    whole = torch.randn(len(positions), heads * head_dim + 24).to(dtype)
    found, wanted = whole.clone(), whole.clone()
    table = make_table(positions, frequencies, factor, dtype)
    rotate_(wanted[:, :-24].unflatten(1, (heads, head_dim))[..., :width], table)
    rotate_heads_(found[:, :-24].unflatten(1, (heads, head_dim)), positions, frequencies, factor)
    rotate_heads_(found[:0, :-24].unflatten(1, (heads, head_dim)), positions[:0], frequencies, factor)
    atol = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 2**-3}[dtype]
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
    assert torch.equal(found[:, -24:], whole[:, -24:])


def test_the_last_dimensions_of_heads_are_rotated() -> None:
    """Heads that lie apart: what is before them stays."""
    positions, frequencies = torch.tensor([0, 1, 77]), Unscaled().frequencies(1e4, 8, 4096)
    whole = torch.randn(3, 5, 20)
    found, wanted = whole.clone(), whole.clone()
    rotate_(wanted[..., 12:], make_table(positions, frequencies, 1.0, torch.float32))
    rotate_heads_(found[..., 12:], positions, frequencies, 1.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert torch.equal(found[..., :12], whole[..., :12])


@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(0, 3, 8), (20, 4, 128), (5, 5, 80)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_are_normed_as_they_are_rotated(
    dtype: torch.dtype, offset: float, queries: int, keys: int, head_dim: int
) -> None:
    """As by a norm of the queries, one of the keys, and a rotation, but for the last bits."""
    positions, frequencies = torch.tensor([0, 1, 4095]), Unscaled().frequencies(1e4, head_dim, 4096)
    norms = HeadNorms(*torch.randn(2, head_dim).to(dtype), queries, 1e-3, offset)
    found = (3 * torch.randn(len(positions), queries + keys, head_dim)).to(dtype)
    wanted = found.clone()
    norms.apply_(wanted)
    rotate_(wanted, make_table(positions, frequencies, 1.0, dtype))
    rotate_heads_(found, positions, frequencies, 1.0, norms)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("of", [*Activation, ClampedGate(7.0, 1.702)], ids=lambda each: each.gating.name)
@pytest.mark.parametrize("width", [1, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gate(dtype: torch.dtype, width: int, of: Gate) -> None:
    """As in several passes, but for the last bit."""
    gate_up = (8 * torch.randn(3, 2 * width)).to(dtype)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(gate(gate_up, of.gating), of.gated(gate_up), **tolerance)
    assert gate(gate_up[:0], of.gating).shape == (0, width)
