"""How other papers divide a cache between K and V and what they are rebuilt from, by our calibration.

Both rules are stated here in seconds that one cached token takes in one layer: `V` to load its K and V, `A` to load its
activation, `G` to rebuild K and V from it. Neither knows of the weights that stream beside: their papers' rules are
about the cache alone. What is taken from the papers is what their abstracts say of the rules; the formulas are those
sentences in our symbols.
"""

from __future__ import annotations

from hsrpc.plan.hardware import Hardware
from hsrpc.plan.layer_times import LayerTimes
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind
from hsrpc.schedule.step import RowCosts


def row_costs(sizes: ModelSizes, hardware: Hardware) -> RowCosts:
    """`V`, `A` and `G`, in seconds."""
    layer = LayerTimes(sizes, hardware)
    return RowCosts(
        load_kv=float(layer.load(sizes.mean_row_bytes(BlockKind.KV))),
        load_activation=float(layer.load(sizes.mean_row_bytes(BlockKind.ACTIVATION))),
        regenerate=float(layer.regenerate(1)),
    )


def kvpr_blocks(costs: RowCosts, context: int, block_size: int) -> int:
    """Blocks of a request's first tokens that KVPR rebuilds, of `context` cached tokens.

    KVPR (arXiv 2411.17089) sends the activations of the first `l` tokens; then the GPU rebuilds their K and V while
    those of the other tokens are sent. Its scheduler chooses the `l` for which that is done first:

        l * A + max(l * G, (context - l) * V)

    Only whole blocks are tried: what a block holds is of one kind.
    """

    def seconds(blocks: int) -> float:
        first = min(blocks * block_size, context)
        return first * costs.load_activation + max(first * costs.regenerate, (context - first) * costs.load_kv)

    return min(range(-(-context // block_size) + 1), key=seconds)


def hcache_layers(costs: RowCosts, num_layers: int) -> int:
    """Layers in which HCache keeps hidden states; in the others it keeps K and V.

    HCache (arXiv 2410.05004) divides the layers so that bus and GPU are done at the same time, neither waiting for the
    other. With hidden states in `n` of `L` layers that is the `n` with the least

        max(n * A + (L - n) * V, n * G)

    Where the bus is the slower one even with hidden states in all layers, HCache recomputes some layers from the tokens
    instead. That is not emulated: the answer is then all layers.
    """

    def seconds(hidden: int) -> float:
        bus = hidden * costs.load_activation + (num_layers - hidden) * costs.load_kv
        return max(bus, hidden * costs.regenerate)

    return min(range(num_layers + 1), key=seconds)
