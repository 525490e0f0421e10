"""How long a step takes: the paper's model (HybridServe, arXiv 2501.01792), for many candidate plans at once.

For each layer, of `n` requests with `context` cached tokens each:

    bus    = (streamed weights + host tokens * bytes of their kind) / load bandwidth
    gpu    = forward + recomputed tokens + regeneration + gather + attention
    layer  = max(bus, gpu, launches)        (near the balance of bus and GPU a little more: `beside`)

Several GPUs load parts of what streams for each other, and hold what is spread together. What a GPU gets from the
others is on neither its bus nor its compute units, and is the third bound:

    peers  = bytes from other GPUs / gather bandwidth

A layer is computed once it is whole, and its buffer is filled again after that: with two buffers, a layer takes no less
than half of all that is done with one, one after the other.

Experts that come on demand are loaded when nothing else can be done: that time is added to all three. Where cached
tokens are loaded too, no products are computed meanwhile (`StepModel._beside`).

A request that drafts k tokens has 1 + k queries, which cost the GPU and no byte on the bus, and gets tau tokens:

    tokens/s = n * tau / step


Beyond the paper: resident weights, blocks on the device, the host's launches and step boundary, and the prompts that
keep coming. Every number may be an array; all are of one layer but those in `StepTimes`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from hsrpc.plan.device_memory import sampled_at_once
from hsrpc.plan.drafting import NO_DRAFT_TIME, DraftTime
from hsrpc.plan.fitted import PACKED_QUERIES, WAITING
from hsrpc.plan.hardware import Hardware
from hsrpc.plan.layer_times import LayerTimes, beside
from hsrpc.plan.sizes import ModelSizes, Number
from hsrpc.schedule.blocks import BlockKind
from hsrpc.schedule.recompute import BALANCE
from hsrpc.schedule.sweep import BUFFERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a request costs while it lives: its tokens, and the prompts that come in its steps' time."""

    context: int
    """Tokens that a running request holds on average; a layer with a sliding window reads fewer."""
    prompt: int
    output: int
    longest: int
    """Most tokens of a request."""
    shared: int = 0
    """First tokens that are the same in all requests, which are part of `context` and of `prompt`."""
    acceptance: float = 0.0
    """Part of the drafted tokens that are accepted, of those before which all were."""
    draft_time: DraftTime = NO_DRAFT_TIME
    """What proposing them takes."""

    def tokens_per_step(self, drafts: Number) -> Number:
        """Tokens that a step gives a request on average which drafts so many: what is accepted, and one more."""
        if self.acceptance == 1.0:
            return drafts + 1.0
        found: Number = (1 - self.acceptance ** (drafts + 1.0)) / (1 - self.acceptance)
        return found

    def distinct(self, batch: Number, length: int) -> Number:
        """Cached tokens of `batch` requests of `length` tokens each, what they share once."""
        return batch * length - self.repeated(batch)

    def repeated(self, times: Number) -> Number:
        """Tokens that so many have in common, beyond those of one."""
        return np.maximum(0.0, times - 1) * self.shared

    @property
    def at_end(self) -> int:
        """Tokens of a request that ends as expected."""
        return min(self.prompt + self.output, self.longest)

    @property
    def prompt_tokens_per_output(self) -> float:
        """Prompt tokens to compute that come in for each token that goes out, in steady state."""
        return max(0, self.prompt - self.shared) / self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What the time of a step depends on; all may be arrays."""

    batch: Number
    streamed: Number
    """Weight bytes that cross the bus, a layer, on average."""
    from_buses: Number = 0.0
    """Weight bytes that come from other GPUs, which have loaded them."""
    from_devices: Number = 0.0
    """Weight bytes that come from other GPUs, which hold them."""
    decode_traffic: Number = 0.0
    """Bytes of device memory that decoding reads and writes, but for experts."""
    expert_traffic: Number = 0.0
    """The same for all experts."""
    spared_traffic: Number = 0.0
    """What of the first a step saves whose rows are few, see `multiplies_few`."""
    on_demand: Number = 0.0
    """1 where experts come on demand, else 0."""
    missed: Number = 0.0
    """Part of the experts that a step needs and that it has to load then."""
    on_device: Number
    """Part of the cached tokens that lies on the device, where requests are as long as expected."""
    on_device_at_end: Number
    """Part of the cached tokens that lies on the device, where all requests are at the end of their output."""
    device_share: Number
    """Activations' part of the device's tokens."""
    host_share: Number
    """Activations' part of the host's tokens."""
    recomputed: Number
    """Part of the tokens that no block holds and every step recomputes; they leave the host's blocks first."""
    chunk: Number
    """Prompt tokens a step at most, beside decoding."""
    prompt_queries: Number
    """Prompt tokens and recomputed ones of a mini-batch, at most."""
    rows: Number
    """Rows of the buffer that single queries read: of a mini-batch's kv buffer, or of its activation buffer."""
    absorbs: npt.NDArray[np.bool_] | bool = False
    """Single queries attend to activations as they are stored; all blocks hold activations."""
    drafts: Number = 0
    """Tokens that each request drafts in a step. Unless all of it lies where single queries read, its queries are a
    chunk's then: what they attend to is copied to the kv buffer, or rebuilt there."""

    @property
    def queries(self) -> Number:
        """New tokens of the requests in a step: one of each, and drafted ones."""
        return self.batch * (1 + self.drafts)

    @property
    def uses_no_buffer(self) -> npt.NDArray[np.bool_]:
        """Whether all of every request lies where single queries read it, and nothing is computed anew."""
        lies_on_device = np.equal(self.on_device, 1) & np.equal(self.recomputed, 0)
        return lies_on_device & (np.equal(self.device_share, 0) | self.absorbs)

    @property
    def is_in_place(self) -> npt.NDArray[np.bool_]:
        """Whether all queries are single ones, which read blocks on the device where they lie: a request's one, or each
        of those that it has with drafts, where it uses no buffer.
        """
        return np.equal(self.drafts, 0) | self.uses_no_buffer

    @property
    def absorbed(self) -> npt.NDArray[np.bool_]:
        """Whether queries attend to activations as they are stored: those of a chunk attend to K and V."""
        return np.asarray(self.absorbs) & self.is_in_place


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkTimes:
    """Seconds of each kind of work of a step, all layers."""

    mini_batches: Number
    bus: Number
    peers: Number
    forward: Number
    regenerate: Number
    gather: Number
    attention: Number
    head: Number
    experts: Number
    prefill: Number

    @property
    def gpu(self) -> Number:
        """What the compute units do in turn; without prompts."""
        return self.forward + self.regenerate + self.gather + self.attention + self.head


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes(WorkTimes):
    """Seconds, all layers; the fields are those of `StepPrediction`."""

    tokens_per_request: Number
    launch: Number
    boundary: Number
    step: Number
    longest_step: Number
    mean_step: Number


class StepModel:
    """Predicts steps of a model on a machine under a traffic."""

    def __init__(self, sizes: ModelSizes, hardware: Hardware, traffic: Traffic) -> None:
        self.sizes = sizes
        self.hardware = hardware
        self.traffic = traffic
        self.layer = LayerTimes(sizes, hardware)
        self.prompt_token = self.layer.prompt_token(traffic.prompt / 2)
        self.recompute_token = self.layer.prompt_token(traffic.context / 2)
        """Seconds of one token of a request that keeps no cache."""
        self.chunk_token = self.layer.prompt_token(traffic.longest)
        """Seconds of one token of a chunk at the end of the longest prompt: bounds use it."""

    def hidden_chunk(self, arrival: Number) -> Number:
        """Prompt tokens that compute in a layer for as long as its weights take to come, or its launches if longer.

        Launches count because no graph runs a step with prompts.
        """
        return np.maximum(arrival, self.hardware.prompt_launch_time) / self.prompt_token

    def prompt_tokens(self, batch: Number, drafts: Number = 0) -> Number:
        """Prompt tokens that come in during a step on average."""
        return batch * self.traffic.tokens_per_step(drafts) * self.traffic.prompt_tokens_per_output

    def balanced_share(self, at_zero: WorkTimes, at_one: WorkTimes) -> Number:
        """Share in [0, 1] at which bus and GPU balance, given the times at shares 0 and 1; both are linear in it."""
        lead = BALANCE * at_zero.bus - at_zero.gpu - at_zero.prefill
        closing = BALANCE * (at_zero.bus - at_one.bus) + (at_one.gpu - at_zero.gpu)
        share: Number = np.clip(np.where(closing > 0, lead, 0.0) / np.where(closing > 0, closing, 1.0), 0.0, 1.0)
        return share

    def balanced_recompute(self, c: Candidates, max_part: Number) -> Number:
        """Part of the tokens, up to `max_part`, that makes the GPU as busy as the bus when it is recomputed."""
        at_zero, at_max = (self.work(replace(c, recomputed=part)) for part in (0.0, max_part))
        return max_part * self.balanced_share(at_zero, at_max)

    def chunk_within(self, bound: Number, times: StepTimes) -> Number:
        """Prompt tokens that fit beside a step's decoding before it takes `bound` seconds."""
        return (bound - times.boundary - times.gpu) / (self.sizes.num_layers * self.chunk_token)

    def spare_prompt_tokens(self, batch: Number, times: StepTimes) -> Number:
        """Prompt tokens that take the GPU time of decoding one request: the room that each missing request leaves."""
        each = (times.regenerate + times.gather + times.attention) / batch
        found: Number = each / (self.sizes.num_layers * self.chunk_token)
        return found

    def predict(self, c: Candidates) -> StepTimes:
        """Times of the candidates' steps."""
        return self.steps(c, self.work(c))

    def work(self, c: Candidates) -> WorkTimes:
        """What is to be done in the candidates' steps; `Candidates.chunk` changes none of it."""
        context = self.traffic.context
        tokens = self.traffic.distinct(c.batch, context)
        device, host = _tiers(tokens, c.on_device, c.recomputed)
        gathered = np.where(c.absorbed, 0.0, device * c.device_share)
        to_buffer: Number = np.where(c.is_in_place, 0.0, device * (1 - c.device_share))
        recomputed_tokens = tokens * c.recomputed
        # The prefix came first: it lies on the device if there is room for it. Else each request has rows of it.
        in_host = self.traffic.shared > device
        is_copied: Number = np.where(in_host | ~c.is_in_place, 1.0, c.device_share) * ~c.absorbed
        copied = to_buffer + self.traffic.repeated(c.batch) * is_copied
        seen = self.sizes.largest(lambda layer: layer.seen_part(context))
        mini_batches = self._mini_batches(c, recomputed_tokens, seen * (host + gathered + copied))
        again = self.traffic.repeated(np.where(c.absorbed, c.batch, mini_batches))
        host = host + np.where(in_host, again, 0.0)
        regenerated = device * c.device_share + host * c.host_share + np.where(in_host, 0.0, again * c.device_share)
        regenerated = np.where(c.absorbed, 0.0, regenerated)
        queries, layers = c.queries - c.batch * c.recomputed, self.sizes.num_layers
        # Mini-batches that only decode form one group, which reads the weights once; with recomputed tokens each
        # mini-batch reads them itself.
        groups = np.where(recomputed_tokens > 0, mini_batches, 1.0)
        forward = layers * np.maximum(
            self.layer.forward(queries, groups), self.layer.forward(queries) + recomputed_tokens * self.recompute_token
        )
        is_few = multiplies_few(self.sizes, c.queries, (regenerated > 0) | (recomputed_tokens > 0))
        traffic = c.decode_traffic - np.where(is_few, c.spared_traffic, 0.0)
        forward = forward + layers * (self.layer.decode_weights(traffic) + self.layer.code_weight())
        forward = forward + self._decoded_experts(c, queries + recomputed_tokens)
        gemms = layers * self.layer.regenerate(regenerated, context)
        prompts = self.prompt_tokens(c.batch * (1 - c.recomputed), c.drafts)
        return WorkTimes(
            mini_batches=mini_batches,
            bus=self._contended(layers * self._bus(c, host, mini_batches), forward + gemms),
            peers=layers * self.layer.gather_weights(c.from_buses + c.from_devices),
            forward=forward,
            regenerate=gemms,
            gather=layers * (self.layer.gather(gathered, context) + self.layer.copy(copied, context)),
            attention=layers * self._attention(c),
            head=self.layer.head(c.queries, c.queries / sampled_at_once(c.batch, c.drafts)),
            experts=self._experts(c, queries + recomputed_tokens, groups),
            prefill=prompts * (layers * self.prompt_token),
        )

    def _attention(self, c: Candidates) -> Number:
        """Each single query reads what it attends to, as it does alone: that neighbours may find it in the device's
        caches is not counted. Those of a chunk read it once.
        """
        context, cached, each = self.traffic.context, c.batch * (1 - c.recomputed), 1 + c.drafts
        tokens = cached * np.where(c.is_in_place, each, 1) * context
        queries = cached * np.where(c.is_in_place, each, PACKED_QUERIES * np.ceil(each / PACKED_QUERIES))
        attention = self.layer.attention(tokens, queries, context)
        if not np.any(c.absorbed):
            return attention
        return np.where(c.absorbed, self.layer.absorbed(tokens, queries, context), attention)

    def steps(self, c: Candidates, times: WorkTimes) -> StepTimes:
        """Times of the candidates' steps, in which that work is to be done."""
        layers, bus, gpu = self.sizes.num_layers, times.bus, times.gpu
        prompts = self.prompt_tokens(c.batch * (1 - c.recomputed), c.drafts)
        launch, boundary, waiting = self._host(c, bus, times.mini_batches)
        shortest = self._between(c)
        # A mini-batch loads while the one before it computes: the step's first load or last compute overlaps nothing.
        boundary = boundary + np.minimum(bus, gpu) / (layers * times.mini_batches)
        work = np.maximum(self._together(c, times, bus), launch) + times.experts
        step = np.maximum(work + boundary, np.maximum(gpu + times.experts + waiting, shortest))
        hardware = self.hardware
        parts = np.ceil(c.chunk / c.prompt_queries)
        rest = np.maximum(0.0, times.mini_batches - parts)
        launches = layers * (rest * hardware.launch_time + parts * hardware.prompt_launch_time)
        more_experts = self._decoded_experts(c, c.queries + c.chunk) - self._decoded_experts(c, c.queries)
        with_chunk = np.maximum(bus, gpu + c.chunk * (layers * self.chunk_token) + more_experts)
        with_chunk = np.maximum(with_chunk, times.peers)
        with_chunk = np.maximum(with_chunk, launches) + self._experts(c, c.queries + c.chunk) + boundary
        # Requests come and go: prompts beside, and room for their outputs to grow.
        tokens = self.traffic.distinct(c.batch, self.traffic.context)
        later_host = _tiers(tokens, c.on_device_at_end, c.recomputed)[1]
        later_bus = layers * self._bus(c, later_host, times.mini_batches)
        prompt_work = times.prefill + self._chunked_part(c) * more_experts
        later_bus = self._contended(later_bus, times.forward + times.regenerate + prompt_work)
        later_bus = self._both_ways(later_bus, self._store(c, later_host / tokens))
        later_launch, later_boundary, later_waiting = self._host(c, later_bus, times.mini_batches)
        later_boundary = later_boundary + np.minimum(later_bus, gpu) / (layers * times.mini_batches)
        later = np.maximum(self._together(c, times, later_bus, prompt_work), later_launch)
        later = np.maximum(later + later_boundary, gpu + prompt_work + later_waiting)
        later = later + self._mean_experts(c, times.experts)
        # Where more prompt tokens come in than a chunk takes, newcomers wait and the batch is not full.
        queueing = np.maximum(1.0, prompts / np.maximum(c.chunk, 1.0))
        return StepTimes(
            **{each.name: getattr(times, each.name) for each in fields(WorkTimes)},
            tokens_per_request=self.traffic.tokens_per_step(c.drafts),
            launch=launch,
            boundary=boundary,
            step=step,
            longest_step=np.maximum(step, with_chunk),
            mean_step=np.maximum(step, later) * queueing,
        )

    def _beside(self, c: Candidates, times: WorkTimes, bus: Number, prompts: Number = 0.0) -> Number:
        """All layers' seconds until bus and GPU are done, but for experts that come on demand.

        These come behind the blocks of the next layer's first mini-batches, which fill all buffers: beside the products
        that wait for them, and the first attention behind these, no blocks are loaded.
        """
        attention = times.regenerate + times.gather + times.attention
        products = times.forward + times.head + prompts
        at_once = beside(bus, attention + products, WAITING)
        if not np.any(c.on_demand):
            return at_once
        blocks = np.maximum(0.0, bus - self.sizes.num_layers * self.layer.load(c.streamed))
        first = attention / times.mini_batches
        in_turn = np.maximum(at_once, beside(blocks, attention - first, WAITING) + first + products)
        part = c.on_demand * self.sizes.mean(lambda layer: float(layer.experts is not None))
        found: Number = part * in_turn + (1 - part) * at_once
        return found

    def _together(self, c: Candidates, times: WorkTimes, bus: Number, prompts: Number = 0.0) -> Number:
        """As `_beside`, with what comes from other GPUs."""
        found = self._beside(c, times, bus, prompts)
        if not np.any(c.from_buses + c.from_devices):
            return found
        layers, gather = self.sizes.num_layers, self.layer.gather_weights
        loaded, held = (layers * gather(size) for size in (c.from_buses, c.from_devices))
        in_turn: Number = np.maximum(bus, held) + loaded + times.gpu + prompts
        return np.maximum(np.maximum(found, held + loaded), in_turn / BUFFERS)

    def _bus(self, c: Candidates, host: Number, mini_batches: Number) -> Number:
        load = self.layer.load(c.streamed + host * seen_bytes(self.sizes, self.traffic.context, c.host_share))
        return load + np.where(load > 0, mini_batches * self.hardware.handover_time, 0.0)

    def _experts(self, c: Candidates, tokens: Number, groups: Number = 1.0) -> Number:
        """All layers' seconds for the experts of `tokens` tokens, where they come on demand."""
        found: Number = self.sizes.num_layers * c.on_demand * self.layer.on_demand(tokens, c.missed, groups)
        return found

    def _decoded_experts(self, c: Candidates, tokens: Number) -> Number:
        """All layers' seconds to decode the experts of `tokens` tokens, those of all groups once."""
        found: Number = self.sizes.num_layers * self.layer.decode_experts(c.expert_traffic, tokens)
        return found

    def _mean_experts(self, c: Candidates, decoding: Number) -> Number:
        """As `_experts` of `decoding` alone in the steps that have no prompt beside, and with a chunk in the others."""
        part, with_chunk = self._chunked_part(c), np.maximum(decoding, self._experts(c, c.queries + self._chunk(c)))
        found: Number = (1 - part) * decoding + part * with_chunk
        return found

    def _chunk(self, c: Candidates) -> Number:
        """Tokens of a prompt's chunk, at most."""
        chunk: Number = np.minimum(np.maximum(c.chunk, 1.0), max(1, self.traffic.prompt))
        return chunk

    def _chunked_part(self, c: Candidates) -> Number:
        """Part of the steps that have a prompt's chunk beside.

        Prompts come in as requests end: so many steps have one, if each prompt has chunks of its own.
        """
        traffic = self.traffic
        ended = c.batch * traffic.tokens_per_step(c.drafts) / traffic.output
        part: Number = np.minimum(1.0, ended * np.ceil(traffic.prompt / self._chunk(c)))
        return part

    def _contended(self, bus: Number, gemms: Number) -> Number:
        """Seconds that copies of `bus` seconds take beside products of `gemms` seconds, which slow them down."""
        share = self.hardware.contended_share
        found: Number = np.minimum(bus + (1 - share) * gemms, bus / share)
        return found

    def _mini_batches(self, c: Candidates, recomputed_tokens: Number, staged: Number) -> Number:
        """Mini-batches that the rows in the kv buffer need; K and V on the device are read in place, without rows."""
        new = np.where(c.uses_no_buffer, 0.0, c.queries - c.batch * c.recomputed)
        rows = staged + recomputed_tokens + new
        return np.maximum(np.maximum(1.0, np.ceil(rows / c.rows)), np.ceil(recomputed_tokens / c.prompt_queries))

    def _host(self, c: Candidates, bus: Number, mini_batches: Number) -> tuple[Number, Number, Number]:
        """Seconds: of the host to launch a step, that the boundary adds to it, and that the device waits in it.

        While weights stream, the boundary adds nothing to the bus's time for as long as the weight buffers are still
        being filled for the next step; the device waits meanwhile. With nothing on the bus, nor from other GPUs, graphs
        run the step where all of the cache is read in place, and the boundary is hidden beside the step itself, unless
        experts come on demand: nothing is launched ahead of a choice. Nor is a step with drafts: it is laid out when
        the tokens before it are known.
        """
        hardware = self.hardware
        each = np.where(c.recomputed > 0, hardware.prompt_launch_time, hardware.launch_time)
        is_loading = bus + c.from_devices > 0
        each = each + np.where(is_loading, hardware.hop_time, 0.0)
        launch = self.sizes.num_layers * mini_batches * each
        between, arrival = self._between(c), self.layer.arrival(c.streamed, c.from_buses, c.from_devices)
        exposed = np.maximum(0.0, between - BUFFERS * arrival)
        on_device = ~is_loading & (c.recomputed == 0)
        has_graphs = on_device & ((c.device_share == 0) | c.absorbs) & c.is_in_place
        hides = on_device & (c.on_demand == 0) & np.equal(c.drafts, 0)
        return np.where(has_graphs, 0.0, launch), np.where(hides, 0.0, exposed), np.where(hides, 0.0, between)

    def _between(self, c: Candidates) -> Number:
        """Seconds from a step's tokens to the next step, which take as long beside a step that is launched ahead."""
        host = self.hardware.boundary_time + c.batch * self.hardware.request_time
        return host + self.traffic.draft_time.seconds(c.batch, c.drafts)

    def _store(self, c: Candidates, on_host: Number) -> Number:
        """All layers' seconds to store the rows of new tokens that lie on the host."""
        tokens = self.prompt_tokens(c.batch, c.drafts) + c.queries
        size = tokens * on_host * token_bytes(self.sizes, c.host_share)
        return self.sizes.num_layers * size / self.hardware.store_bandwidth

    def _both_ways(self, load: Number, store: Number) -> Number:
        """Seconds for loads and stores at once, each given the time it takes alone."""
        return np.maximum(load, store) + np.minimum(load, store) * (1 / self.hardware.duplex_share - 1)


def _tiers(tokens: Number, on_device: Number, recomputed: Number) -> tuple[Number, Number]:
    """Cached tokens on the device and on the host."""
    return tokens * np.minimum(on_device, 1.0 - recomputed), tokens * np.maximum(0.0, 1.0 - on_device - recomputed)


def multiplies_few(sizes: ModelSizes, rows: Number, rebuilds: npt.NDArray[np.bool_] | bool) -> npt.NDArray[np.bool_]:
    """Whether a step's rows are multiplied by weights as they lie, if these stay packed.

    They are few then, and no K and V are rebuilt.
    """
    found: npt.NDArray[np.bool_] = np.asarray(rows <= sizes.few_rows) & ~np.asarray(rebuilds)
    return found


def token_bytes(sizes: ModelSizes, share: Number) -> Number:
    """Bytes of one cached token in one layer, on average, where `share` of them are activations."""
    kv, activation = (sizes.mean_row_bytes(kind) for kind in BlockKind)
    return (1 - share) * kv + share * activation


def seen_bytes(sizes: ModelSizes, context: int, share: Number) -> Number:
    """Bytes that a layer reads for each of a request's `context` cached tokens, on average, as `token_bytes`."""
    return sizes.mean(
        lambda layer: layer.seen_part(context) * ((1 - share) * layer.kv.num_bytes + share * layer.activation.num_bytes)
    )
