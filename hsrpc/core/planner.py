"""The planner: what lies where, how much of the cache is activations, how many requests run at once.

The model of a step is the paper's (HybridServe, arXiv 2501.01792) with two additions, resident weights and
device blocks. For each layer, with `n` requests of `context` cached tokens each, of which a share lies on the host:

    bus = (streamed weights + host tokens * ((1-a) * kv_bytes + a * activation_bytes)) / load bandwidth
    gpu = forward(n) + tokens * a * regenerate_flop / gemm rate + attention
    layer = max(bus, gpu)

Batch size, resident weights, blocks of each kind and tier and the share `a` are chosen together by trying them out: the
model costs microseconds, so a grid is simpler than a solver and finds the optimum wherever it lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial

from hsrpc.config import CachePolicy, EngineConfig, Placement, format_bytes
from hsrpc.core.batch import BufferLimits, RowCosts
from hsrpc.core.blocks import PoolId
from hsrpc.core.plan import BUFFERS, REGENERATE_ROWS, SAMPLE_ELEMENTS, Budgets, Hardware, Plan, StepPrediction
from hsrpc.core.sizes import ModelSizes
from hsrpc.errors import ConfigError

DEFAULT_PREFILL_TOKENS = 2048
_REFINEMENTS = 4
_SHARES = tuple(i / 100 for i in range(101))
_MAX_BATCH = 512
_TARGET_BUFFER_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One point of the grid, with what follows from it."""

    share: float
    batch: int
    buffers: BufferLimits
    resident: tuple[frozenset[str], ...]
    device_tokens: int
    host_tokens: int
    prediction: StepPrediction


class Planner:
    """Finds the plan of highest predicted throughput within the budgets."""

    def __init__(self, sizes: ModelSizes, budgets: Budgets, hardware: Hardware, config: EngineConfig) -> None:
        self.sizes = sizes
        self.budgets = budgets
        self.hardware = hardware
        self.config = config
        self.max_model_len = self._max_model_len()
        self.context = min(config.expected_context or min(1024, self.max_model_len), self.max_model_len)
        self.policy, self.shares, self.reason = _cache_decision(config, sizes)
        self.recomputes = self.policy is CachePolicy.RECOMPUTE
        self.on_host = config.placement is Placement.HOST
        self._all_layers = sizes.num_layers * sizes.layer_bytes
        self._spread = cache(partial(spread_resident, sizes))

    def plan(self) -> Plan:
        """The best plan.

        Raises:
            ConfigError: the budgets are too small for the model, or `max_step_time` cannot be met.
        """
        return self._finish(self._best())

    def curve(self) -> list[tuple[float, StepPrediction]]:
        """Activation shares from 0 to 1 and the best prediction for each that fits, for a plot.

        Raises:
            ConfigError: as `plan`.
        """
        self._best()
        points = []
        for share in _SHARES[::5]:
            config = replace(self.config, cache_policy=CachePolicy.HYBRID, activation_share=share)
            with suppress(ConfigError):
                best = Planner(self.sizes, self.budgets, self.hardware, config)._best()
                points.append((share, best.prediction))
        return points

    def _best(self) -> _Candidate:
        fitting: list[_Candidate] = []
        bound = self.config.max_step_time
        for batches in self._batch_choices():
            found = [candidate for batch in batches for candidate in self._candidates(batch)]
            allowed = [c for c in found if bound is None or c.prediction.step <= bound]
            if allowed:
                return max(allowed, key=lambda c: (c.prediction.tokens_per_second, -c.share))
            fitting += found
        raise self._too_slow(fitting) if fitting else self._too_small()

    def _batch_choices(self) -> list[list[int]]:
        """Batch sizes to choose from: all, or the one that was asked for and only then the next smaller ones."""
        if self.config.max_batch is None:
            return [_doubling(_MAX_BATCH)]
        return [[batch] for batch in reversed(_doubling(self.config.max_batch))]

    def _candidates(self, batch: int) -> Iterator[_Candidate]:
        for share in self.shares:
            candidate = self._candidate(batch, share)
            if candidate is not None:
                yield candidate

    def _candidate(self, batch: int, share: float) -> _Candidate | None:
        """With buffers of the wanted size, or the smallest where those do not fit."""
        tried = (
            self._with_buffers(batch, share, self._buffers(batch, share, rows)) for rows in self._row_choices(batch)
        )
        return next((candidate for candidate in tried if candidate is not None), None)

    def _with_buffers(self, batch: int, share: float, buffers: BufferLimits) -> _Candidate | None:
        fixed = self._fixed_device_bytes(batch, buffers)
        room = self.budgets.device - sum(fixed.values())
        if room < 0:
            return None
        resident = self._resident(room)
        streamed = sum(self._streamed_bytes(resident))
        room -= self._resident_bytes(resident) + self._weight_buffers(resident)
        device_tokens = 0 if self.on_host else self._tokens(room, share)
        host_room = self.budgets.host - streamed
        if room < 0 or host_room < 0:
            return None
        host_tokens = self._tokens(host_room, share)
        block = self.config.block_size
        if not self._batch_fits(batch, device_tokens // block + host_tokens // block):
            return None
        on_host = 1 - min(1.0, device_tokens / max(1, batch * self.context))
        prediction = self._predict(batch, share, streamed, 0.0 if self.recomputes else on_host)
        return _Candidate(share, batch, buffers, resident, device_tokens, host_tokens, prediction)

    def _batch_fits(self, batch: int, blocks: int) -> bool:
        """`batch` requests of the expected length, and one of full length, have blocks."""
        if self.recomputes:
            return True
        per_request = -(-self.context // self.config.block_size)
        longest = -(-self.max_model_len // self.config.block_size)
        return blocks >= longest and (batch == 1 or blocks >= batch * per_request)

    def _resident(self, room: int) -> tuple[frozenset[str], ...]:
        """Tensors of each layer that stay on the device: all that fit, less two buffers for the rest."""
        if self.on_host:
            return self._spread(0)
        if self._all_layers <= room:
            return self._spread(self._all_layers)
        found = self._spread(max(0, room - BUFFERS * self.sizes.layer_bytes))
        for _ in range(_REFINEMENTS):
            # What stays makes the buffers smaller, which makes room for more to stay.
            more = self._spread(max(0, room - self._weight_buffers(found)))
            if self._resident_bytes(more) + self._weight_buffers(more) > room:
                break
            found = more
        return found

    def _streamed_bytes(self, resident: tuple[frozenset[str], ...]) -> tuple[int, ...]:
        return tuple(self.sizes.layer_bytes - self._bytes_of(names) for names in resident)

    def _resident_bytes(self, resident: tuple[frozenset[str], ...]) -> int:
        return sum(map(self._bytes_of, resident))

    def _weight_buffers(self, resident: tuple[frozenset[str], ...]) -> int:
        return BUFFERS * max(self._streamed_bytes(resident))

    def _bytes_of(self, names: frozenset[str]) -> int:
        return sum(map(self.sizes.tensor_bytes, names))

    def _tokens(self, room: int, share: float) -> int:
        """Cached tokens that `room` bytes hold, all layers."""
        if self.recomputes:
            return 0
        return int(room // (self.sizes.num_layers * self._token_bytes(share)))

    def _token_bytes(self, share: float) -> float:
        """Bytes of one cached token in one layer."""
        return (1 - share) * self.sizes.kv_bytes + share * self.sizes.activation_bytes

    def _max_model_len(self) -> int:
        given = self.config.max_model_len
        if given is not None and given > self.sizes.context_length:
            raise ConfigError(
                "max_model_len",
                given,
                f"the model's context has {self.sizes.context_length} tokens",
                "give at most that",
            )
        return given or min(self.sizes.context_length, 4096)

    def _prefill_tokens(self) -> int:
        return self.config.max_prefill_tokens or DEFAULT_PREFILL_TOKENS

    def _row_choices(self, batch: int) -> tuple[int, int]:
        """Rows of a mini-batch's buffers: for copies large enough to fill the bus; just for the longest request."""
        wanted = min(_TARGET_BUFFER_BYTES, self.budgets.device // 20) // self.sizes.kv_bytes
        longest = -(-self.max_model_len // self.config.block_size) * self.config.block_size
        return max(longest, min(wanted, batch * longest)), longest

    def _buffers(self, batch: int, share: float, rows: int) -> BufferLimits:
        queries = rows if self.recomputes else self._prefill_tokens() + batch
        return BufferLimits(rows, rows if share > 0 else 0, queries)

    def _fixed_device_bytes(self, batch: int, buffers: BufferLimits) -> dict[str, int]:
        sizes = self.sizes
        kv_rows = buffers.rows * sizes.kv_bytes
        activation_rows = buffers.activation_rows * sizes.activation_bytes
        step_tokens = batch * self.max_model_len if self.recomputes else buffers.queries
        return {
            "embeddings and head": sizes.fixed_bytes,
            "cache buffers": BUFFERS * (kv_rows + activation_rows),
            "hidden states": 2 * step_tokens * sizes.activation_bytes,
            "workspace": workspace_bytes(sizes, buffers, batch),
        }

    def _predict(self, batch: int, share: float, streamed: int, on_host: float) -> StepPrediction:
        sizes, hardware = self.sizes, self.hardware
        tokens = batch * self.context
        queries = tokens if self.recomputes else batch
        bus = (streamed / sizes.num_layers + tokens * on_host * self._token_bytes(share)) / hardware.load_bandwidth
        forward = max(queries * sizes.layer_flop / hardware.gemm_rate, sizes.layer_bytes / hardware.memory_bandwidth)
        regenerate = tokens * share * sizes.regenerate_flop / hardware.gemm_rate
        attention = max(
            tokens * sizes.kv_bytes / hardware.memory_bandwidth,
            queries * sizes.attention_flop(self.context) / hardware.gemm_rate,
        )
        layer = max(bus, forward + regenerate + attention, hardware.launch_time)
        layers = sizes.num_layers
        return StepPrediction(
            batch=batch,
            context=self.context,
            bus=layers * bus,
            forward=layers * forward,
            regenerate=layers * regenerate,
            attention=layers * attention,
            step=layers * layer,
        )

    def _finish(self, best: _Candidate) -> Plan:
        fixed = self._fixed_device_bytes(best.batch, best.buffers)
        streamed = self._streamed_bytes(best.resident)
        blocks = self._num_blocks(best)
        device_cache = self._cache_bytes(blocks, PoolId.DEVICE_KV, PoolId.DEVICE_ACTIVATION)
        return Plan(
            policy=self._named_policy(best.share),
            reason=self._full_reason(best),
            activation_share=best.share,
            block_size=self.config.block_size,
            max_batch=best.batch,
            max_model_len=self.max_model_len,
            max_prefill_tokens=best.batch * self.max_model_len if self.recomputes else self._prefill_tokens(),
            buffers=best.buffers,
            costs=self._row_costs(),
            resident=best.resident,
            streamed_bytes=streamed,
            num_blocks=blocks,
            device_bytes={
                **fixed,
                "weight buffers": self._weight_buffers(best.resident),
                "resident weights": self._resident_bytes(best.resident),
                "cache blocks": device_cache,
            },
            host_bytes={
                "streamed weights": sum(streamed),
                "cache blocks": self._cache_bytes(blocks, PoolId.HOST_KV, PoolId.HOST_ACTIVATION),
            },
            budgets=self.budgets,
            prediction=best.prediction,
            hardware=self.hardware,
        )

    def _full_reason(self, best: _Candidate) -> str:
        wanted = self.config.max_batch
        reason = self.reason + (self._share_reason(best) if len(self.shares) > 1 else "")
        if wanted is None or best.batch == wanted:
            return reason
        bound = "" if self.config.max_step_time is None else " and max_step_time"
        return f"{reason}; of max_batch={wanted} requests the budgets{bound} allow {best.batch} at once"

    def _share_reason(self, best: _Candidate) -> str:
        if best.share == 0:
            return ", but loading K and V is predicted to be faster here than rebuilding them: KV only"
        if best.share == 1:
            return ", and even so the bus is predicted to take longer than rebuilding them: activations only"
        return f": a share of {best.share:.2f} is predicted to balance bus and compute"

    def _named_policy(self, share: float) -> CachePolicy:
        if self.policy is not CachePolicy.AUTO:
            return self.policy
        return {0.0: CachePolicy.KV, 1.0: CachePolicy.ACTIVATION}.get(share, CachePolicy.HYBRID)

    def _num_blocks(self, best: _Candidate) -> dict[PoolId, int]:
        """Blocks of each pool: the share of each kind, no more than all requests at full length could use."""
        if self.recomputes:
            return dict.fromkeys(PoolId, 0)
        block = self.config.block_size
        most = best.batch * -(-self.max_model_len // block) + best.batch
        device = min(best.device_tokens // block, most)
        host = min(best.host_tokens // block, most - device)
        # Rounded to the kind that takes fewer bytes: the other way could exceed the budget.
        rounded = math.ceil if self.sizes.activation_ratio >= 1 else math.floor
        on_device, on_host = rounded(device * best.share), rounded(host * best.share)
        return {
            PoolId.DEVICE_KV: device - on_device,
            PoolId.HOST_KV: host - on_host,
            PoolId.DEVICE_ACTIVATION: on_device,
            PoolId.HOST_ACTIVATION: on_host,
        }

    def _cache_bytes(self, blocks: dict[PoolId, int], kv: PoolId, activation: PoolId) -> int:
        sizes = self.sizes
        block_bytes = blocks[kv] * sizes.kv_bytes + blocks[activation] * sizes.activation_bytes
        return sizes.num_layers * self.config.block_size * block_bytes

    def _row_costs(self) -> RowCosts:
        sizes, hardware = self.sizes, self.hardware
        return RowCosts(
            load_kv=sizes.kv_bytes / hardware.load_bandwidth,
            load_activation=sizes.activation_bytes / hardware.load_bandwidth,
            regenerate=sizes.regenerate_flop / hardware.gemm_rate,
        )

    def _too_slow(self, fitting: list[_Candidate]) -> ConfigError:
        fastest = min(candidate.prediction.step for candidate in fitting)
        return ConfigError(
            "max_step_time",
            self.config.max_step_time,
            f"the fastest step predicted takes {fastest:.4f} s",
            "raise it, or give more gpu_memory",
        )

    def _too_small(self) -> ConfigError:
        share = min(self.shares)
        smallest = self._buffers(1, share, self._row_choices(1)[1])
        needed = sum(self._fixed_device_bytes(1, smallest).values()) + BUFFERS * self.sizes.layer_bytes
        if self.budgets.device < needed:
            return ConfigError(
                "gpu_memory",
                format_bytes(self.budgets.device),
                f"too small for a context of {self.max_model_len}: buffers and embeddings take {format_bytes(needed)}",
                "raise it, or lower max_model_len or max_prefill_tokens",
            )
        cache = self.max_model_len * self.sizes.num_layers * self._token_bytes(share)
        return ConfigError(
            "host_memory",
            format_bytes(self.budgets.host),
            f"too small: weights take {format_bytes(self._all_layers)} less what stays on the device, "
            f"one request at full length {format_bytes(cache)}",
            "raise it or gpu_memory, or lower max_model_len or max_batch",
        )


def _cache_decision(config: EngineConfig, sizes: ModelSizes) -> tuple[CachePolicy, tuple[float, ...], str]:
    """Policy, the shares to try, and why."""
    policy, ratio = config.cache_policy, sizes.activation_ratio
    if policy is CachePolicy.KV:
        return policy, (0.0,), "KV only, as asked"
    if policy is CachePolicy.ACTIVATION:
        return policy, (1.0,), "activations only, as asked"
    if policy is CachePolicy.RECOMPUTE:
        return policy, (0.0,), "nothing is cached, as asked: every step recomputes every token"
    if config.activation_share is not None:
        return policy, (config.activation_share,), f"share {config.activation_share:g}, as asked"
    if ratio <= 1.0:
        why = f"an activation takes {1 / ratio:.2f} times the bytes of K and V (grouped-query attention): KV only"
        return policy, (0.0,), why
    return policy, _SHARES, f"K and V take {ratio:.2f} times the bytes of an activation"


def workspace_bytes(sizes: ModelSizes, buffers: BufferLimits, batch: int) -> int:
    """Upper bound of what one mini-batch's forward pass, and sampling, allocate beside the planned buffers."""
    width = 4 * sizes.hidden_size + 3 * sizes.num_heads * sizes.head_dim + 2 * sizes.kv_size + 3 * sizes.ffn_size
    forward = buffers.queries * (width * sizes.element_bytes + 8 * sizes.hidden_size)
    regenerate = 3 * min(buffers.activation_rows, REGENERATE_ROWS) * sizes.kv_bytes
    logits = batch * sizes.vocab_size
    sampling = 8 * logits + 48 * min(logits, SAMPLE_ELEMENTS)
    indices = 8 * 8 * (buffers.rows + buffers.queries)
    return forward + regenerate + sampling + indices


def spread_resident(sizes: ModelSizes, budget: int) -> tuple[frozenset[str], ...]:
    """Tensors that stay on the device in each layer: at most `budget` bytes in all, spread evenly over the layers.

    Layer by layer, largest first, the tensors stay that keep the running total within the budget's part so far.
    """
    names_by_size = sorted(sizes.layer_tensors, key=sizes.tensor_bytes, reverse=True)
    chosen: list[frozenset[str]] = []
    spent = 0
    for layer in range(1, sizes.num_layers + 1):
        names = []
        for name in names_by_size:
            size = sizes.tensor_bytes(name)
            if spent + size <= budget * layer // sizes.num_layers:
                names.append(name)
                spent += size
        chosen.append(frozenset(names))
    return tuple(chosen)


def _doubling(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to `most`, which is included."""
    steps = {n for power in range(20) for n in (2**power, 3 * 2**power) if n < most}
    return sorted(steps | {most})
