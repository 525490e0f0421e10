"""Attention over packed rows of ragged requests: new queries against each request's own keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from hsrpc.model.formats.rows import Rows, RowShape, ValueRows

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_DIM = 256
"""Dimensions of a head that flash attention takes, at most."""
_MANY_KEYS = 1 << 20


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads of an attention, and what a row holds that its queries attend to."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    """At most `key_dim`."""
    shares: bool = False
    """A row has keys alone, and the first `value_dim` dimensions of each are its value; else it is [K|V]."""

    @property
    def key_size(self) -> int:
        """Elements of a row's keys."""
        return self.num_kv_heads * self.key_dim

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return self.key_size + (0 if self.shares else self.num_kv_heads * self.value_dim)

    @property
    def row_shape(self) -> RowShape:
        """The numbers of a row."""
        widths = (self.key_dim,) if self.shares else (self.key_dim, self.value_dim)
        return RowShape(self.num_kv_heads, widths)

    @property
    def query_size(self) -> int:
        """Elements of all heads' queries."""
        return self.num_heads * self.key_dim

    @property
    def out_size(self) -> int:
        """Elements of what attention gives for all heads."""
        return self.num_heads * self.value_dim

    def keys_values(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, kv_heads, key_dim] and values [n, kv_heads, value_dim] of rows [n, row_size], as views."""
        keys = rows[:, : self.key_size].unflatten(-1, (self.num_kv_heads, self.key_dim))
        if self.shares:
            return keys, keys[..., : self.value_dim]
        return keys, rows[:, self.key_size :].unflatten(-1, (self.num_kv_heads, self.value_dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlaceRows:
    """What `d` requests of one query each attend to: int32 on the device, a query sees all its keys."""

    tables: torch.Tensor
    """[d, b] blocks of the pool."""
    counts: torch.Tensor
    """[d] tokens in them."""
    skips: torch.Tensor | None = None
    """[d] of these, how many from the first on are hidden by the window; None: the layer has no window."""
    rebuilt_starts: torch.Tensor
    """[d+1] rows of the buffer, from one to the next."""
    key_starts: torch.Tensor
    """[d+1] more rows of the buffer."""
    max_keys: int
    """Bound on the keys of a request."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a model's attention does beside softmax(scale * q K^T) V."""

    softcap: float | None = None
    """A score s becomes softcap * tanh(s / softcap)."""
    has_sinks: bool = False
    """Each layer has a score for each head, of a key without a value that every query sees."""


PLAIN = Extras()


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Where each of `r` requests' rows begin. Its queries are the last of its keys, in order (causal, bottom right)."""

    query_starts: torch.Tensor
    """int32 [r+1] on the device."""
    key_starts: torch.Tensor
    """int32 [r+1] on the device."""
    query_offsets: tuple[int, ...]
    """First query row of each request, then the total, on the host; `key_offsets` alike."""
    key_offsets: tuple[int, ...]
    max_queries: int
    max_keys: int


class Attention:
    """Chooses the fastest attention for the device and element type, once."""

    def __init__(
        self,
        heads: HeadShape,
        scale: float,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rows: Rows | None = None,
        windows: Sequence[int | None] = (None,),
        extras: Extras = PLAIN,
    ) -> None:
        """`rows`: those of pools and buffers; None: of numbers as they are."""
        self._rows = rows or ValueRows(heads.row_shape, dtype)
        self._block_size = block_size
        self._heads = heads
        self._scale = scale
        self._extras = extras
        self._windows = windows
        self._device, self._dtype = device, dtype
        self._uses_kernel = device.type == "cuda"
        fits_flash = dtype in _FLASH_DTYPES and heads.key_dim % 8 == 0 and heads.key_dim <= _FLASH_DIM
        is_plain = isinstance(self._rows, ValueRows)
        self._uses_flash = device.type == "cuda" and fits_flash and is_plain
        needs_kernel = extras.softcap is not None or not is_plain or (extras.has_sinks and not self._uses_flash)
        self._packs_by_kernel = device.type == "cuda" and needs_kernel

    def in_place(
        self,
        queries: torch.Tensor,
        pool: torch.Tensor,
        kv: torch.Tensor,
        rows: InPlaceRows,
        out: torch.Tensor,
        *,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Fill `out` [d, o] for one query a request [d, q], with rows in the pool and in the buffer [*, columns].

        `sinks` [num_heads] are those of the layer, where the model has them.
        """
        if not self._uses_kernel:
            self._in_place_one_by_one(queries, pool, kv, rows, out, sinks=sinks)
            return
        from hsrpc.model.kernels.decode_attention import decode_attention  # loads Triton
        from hsrpc.model.kernels.rows import coding_of

        decode_attention(
            queries,
            pool,
            kv,
            out,
            tables=rows.tables,
            in_place=rows.counts,
            skips=rows.skips,
            rebuilt_starts=rows.rebuilt_starts,
            key_starts=rows.key_starts,
            heads=self._heads,
            block_size=self._block_size,
            scale=self._scale,
            max_keys=rows.max_keys,
            softcap=self._extras.softcap,
            sinks=sinks,
            coding=coding_of(self._rows, self._device),
        )

    @torch.inference_mode()
    def compile(self) -> None:
        """Make both ready: what they would compile, import and load on their way would hold a step up for seconds."""
        if not self._uses_kernel:
            return
        heads = self._heads
        queries, out = (
            torch.zeros((1, size), dtype=self._dtype, device=self._device)
            for size in (heads.query_size, heads.out_size)
        )
        kv = torch.zeros((self._block_size, self._rows.columns), dtype=self._rows.dtype, device=self._device)
        sinks = queries.new_zeros(heads.num_heads) if self._extras.has_sinks else None
        tables, counts, starts = (torch.zeros(size, dtype=torch.int32, device=self._device) for size in ((1, 1), 1, 2))
        skipping = [None if window is None else counts for window in self._windows]
        for max_keys, skips in product((1, _MANY_KEYS), skipping):  # in one part, and in several
            rows = InPlaceRows(
                tables=tables, counts=counts, skips=skips, rebuilt_starts=starts, key_starts=starts, max_keys=max_keys
            )
            self.in_place(queries, kv, kv, rows, out, sinks=sinks)
        if heads.shares:  # rows that single queries alone attend to
            return
        one = torch.arange(2, dtype=torch.int32, device=self._device)
        self.packed(queries, kv, PackedRows(one, one, (0, 1), (0, 1), 1, 1), None, sinks)

    def _in_place_one_by_one(
        self,
        queries: torch.Tensor,
        pool: torch.Tensor,
        kv: torch.Tensor,
        rows: InPlaceRows,
        out: torch.Tensor,
        *,
        sinks: torch.Tensor | None,
    ) -> None:
        rebuilt, starts = rows.rebuilt_starts.tolist(), rows.key_starts.tolist()
        skips = [0] * len(rows.counts) if rows.skips is None else rows.skips.tolist()
        offsets = torch.arange(self._block_size)
        for i, (skip, count) in enumerate(zip(skips, rows.counts.tolist(), strict=True)):
            found = (rows.tables[i, :, None] * self._block_size + offsets).flatten()[skip:count]
            parts = (pool.index_select(0, found), kv[rebuilt[i] : rebuilt[i + 1]], kv[starts[i] : starts[i + 1]])
            keys = torch.cat(parts)
            alone = PackedRows(rows.counts, rows.counts, (0, 1), (0, len(keys)), 1, len(keys))
            out[i : i + 1] = self.packed(queries[i : i + 1], keys, alone, None, sinks)

    def packed(
        self,
        queries: torch.Tensor,
        kv: torch.Tensor,
        rows: PackedRows,
        window: int | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[n, o] for queries [n, q] and the buffer [*, columns].

        With a sliding `window` a query sees itself and the `window - 1` keys before it; keys are in order of position.
        `sinks` as in `in_place`.
        """
        if self._packs_by_kernel:
            return self._packed_by_kernel(queries, kv, rows, window, sinks)
        q = queries.unflatten(-1, (self._heads.num_heads, self._heads.key_dim))
        attend = self._flash if self._uses_flash else self._one_by_one
        return attend(q, kv, rows, window=window, sinks=sinks).flatten(1)

    def _packed_by_kernel(
        self, queries: torch.Tensor, kv: torch.Tensor, rows: PackedRows, window: int | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        from hsrpc.model.kernels.packed_attention import packed_attention  # loads Triton
        from hsrpc.model.kernels.rows import coding_of

        return packed_attention(
            queries,
            kv,
            query_starts=rows.query_starts,
            key_starts=rows.key_starts,
            max_queries=rows.max_queries,
            heads=self._heads,
            scale=self._scale,
            window=window,
            softcap=self._extras.softcap,
            sinks=sinks,
            coding=coding_of(self._rows, self._device),
        )

    def _flash(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        rows: PackedRows,
        *,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The operator behind `torch.nn.attention.varlen`, which takes the host three times as long to launch, and five
        seconds of imports for the first time where Python's compiled files are not kept.

        It takes keys and values of one width: narrower values are padded, and what comes of the padding is cut off.
        """
        k, v = self._heads.keys_values(kv)
        narrower = self._heads.key_dim - self._heads.value_dim
        if narrower:
            v = pad(v, (0, narrower))
        result: torch.Tensor
        result, log_sums, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            rows.query_starts,
            rows.key_starts,
            rows.max_queries,
            rows.max_keys,
            0.0,  # dropout
            False,  # the window makes it causal
            False,  # no mask to debug
            scale=self._scale,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )
        result = result[..., : self._heads.value_dim]
        return result if sinks is None else beside_sinks_(result, log_sums, sinks)

    def _one_by_one(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        rows: PackedRows,
        *,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        out = torch.empty((*q.shape[:2], self._heads.value_dim), dtype=q.dtype, device=q.device)
        bounds = zip(rows.query_offsets, rows.query_offsets[1:], rows.key_offsets, rows.key_offsets[1:], strict=False)
        for q0, q1, k0, k1 in bounds:
            k, v = self._heads.keys_values(self._rows.decode(kv[k0:k1]))
            out[q0:q1] = self._request(q[q0:q1], k, v, window, sinks)
        return out

    def _request(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        if self._extras != PLAIN:
            return self._with_extras(q, k, v, mask, sinks).squeeze(0).transpose(0, 1)
        gqa = self._heads.num_heads != self._heads.num_kv_heads
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale, enable_gqa=gqa)
        return attended.squeeze(0).transpose(0, 1)

    def _with_extras(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """[1, heads, queries, value_dim], by products in float32."""
        group = self._heads.num_heads // self._heads.num_kv_heads
        k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
        scores = q.float() @ k.mT * self._scale
        if (cap := self._extras.softcap) is not None:
            scores = cap * (scores / cap).tanh()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(-1, -1, q.shape[2], -1)), dim=-1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        return (weights @ v).to(q.dtype)


def beside_sinks_(attended: torch.Tensor, log_sums: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """`attended` [n, heads, value_dim], in place, as if each query had seen a key without a value beside its own.

    `log_sums` [heads, n]: logarithms of the sums of the exponentials of the scores; `sinks` [heads]: that key's score.
    """
    return attended.mul_(torch.sigmoid(log_sums - sinks[:, None]).t().unsqueeze(-1))


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """True where a query sees a key: [queries, keys]; None where every query sees every key."""
    if num_queries == 1 and (window is None or num_keys <= window):
        return None
    position = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    key = torch.arange(num_keys, device=device)
    visible = key <= position
    return visible if window is None else visible & (key > position - window)
