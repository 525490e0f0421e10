"""The order of copies to the device: between the blocks of one mini-batch and of the next goes a part of the weights.

Copies run one after the other, in the order in which they are sent. Blocks are wanted at once and their buffers come
free while the layer computes; weights are wanted a layer later. Sent whole, a layer's weights keep the blocks waiting,
and then the bus waits while the blocks' buffers are in use.
"""

from __future__ import annotations

import asyncio
import math


class BusOrder:
    """How far the blocks are: a position counts layers since the first step, parts of a layer included."""

    def __init__(self) -> None:
        self._position = math.inf
        self._moved = asyncio.Event()

    def move(self, position: float) -> None:
        """Blocks up to `position` are sent; infinity where none are to be sent for now."""
        self._position = position
        self._moved.set()

    async def beyond(self, position: float) -> float:
        """Where the blocks are, once that is beyond `position`."""
        while self._position <= position:
            self._moved.clear()
            await self._moved.wait()
        return self._position
