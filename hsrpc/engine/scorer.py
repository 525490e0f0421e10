"""Log-probabilities of prompt tokens: a few rows of logits at a time, so that a long prompt takes no more memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from hsrpc.engine.forward import DeviceBatch, Forward
from hsrpc.model.sampler import Sampler, read_logprob
from hsrpc.request import TokenLogprob
from hsrpc.schedule.step import Scores

_UNDER_WAY = 4
"""Tables that the host lets the device be ahead by: enough to keep it busy while those before are read."""


class Scorer:
    """Scores the rows of mini-batches whose last layer is computed. Called on the executor's thread."""

    def __init__(self, forward: Forward, sampler: Sampler, num_rows: int) -> None:
        """`num_rows`: rows of logits that there is memory for at a time."""
        self._forward = forward
        self._sampler = sampler
        self._num_rows = num_rows

    def score(self, scores: Scores, batch: DeviceBatch) -> list[TokenLogprob | None]:
        """What is wanted of a mini-batch, in the order of `scores`; None where its logits are not finite."""
        rows = (values for table in self._tables(scores, batch) for values in table.tolist())
        wanted = zip(scores.token_ids.tolist(), scores.tops.tolist(), rows, strict=True)
        return [_logprob(*each) for each in wanted]

    def _tables(self, scores: Scores, batch: DeviceBatch) -> Iterator[torch.Tensor]:
        assert batch.scores is not None  # they were uploaded with it
        top, under_way = int(scores.tops.max()), deque[Callable[[], torch.Tensor]]()
        for start in range(0, len(scores.rows), self._num_rows):
            wanted = slice(start, start + self._num_rows)
            logits = self._forward.prompt_logits(batch, wanted)
            under_way.append(self._sampler.score(logits, batch.scores.token_ids[wanted], top))
            del logits  # its memory is the next rows'
            if len(under_way) > _UNDER_WAY:
                yield under_way.popleft()()
        for table in under_way:
            yield table()


def _logprob(token_id: int, top: int, values: Sequence[float]) -> TokenLogprob | None:
    return None if math.isnan(values[0]) else read_logprob(token_id, values, top)
