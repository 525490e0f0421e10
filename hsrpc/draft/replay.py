"""A drafter that knows the outputs: for tests and measurements."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

from hsrpc.draft.drafter import Wanted


class ReplayDrafter:
    """Drafts what requests are known to go on with, but each token wrong with a given rate.

    A request whose output is not what was known has no drafts from there on.
    """

    def __init__(
        self, outputs: Mapping[tuple[int, ...], Sequence[int]], acceptance: float = 1.0, seed: int = 0
    ) -> None:
        """`outputs`: of each prompt, by its token ids; `acceptance`: probability that a token is the right one."""
        self._outputs = outputs
        self._acceptance = acceptance
        self._seed = seed
        self._known: dict[str, Sequence[int]] = {}
        """Outputs of live requests."""

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        return [self._draft(each) for each in wanted]

    def forget(self, request_ids: Collection[str]) -> None:
        for request_id in request_ids:
            self._known.pop(request_id, None)

    def _draft(self, wanted: Wanted) -> Sequence[int]:
        output = self._known.get(wanted.request_id)
        if output is None:
            prompt = tuple(wanted.token_ids[: wanted.num_prompt_tokens])
            output = self._known[wanted.request_id] = self._outputs.get(prompt, ())
        first = len(wanted.token_ids) - wanted.num_prompt_tokens
        if not first or first > len(output) or wanted.token_ids[-1] != output[first - 1]:
            return ()
        rest = enumerate(output[first : first + wanted.max_tokens], first)
        return [token_id if self._is_right(wanted, at) else _another(token_id) for at, token_id in rest]

    def _is_right(self, wanted: Wanted, position: int) -> bool:
        """The same at the same place of the same request, however often it is asked."""
        what = f"{self._seed} {wanted.request_id} {position}".encode(errors="surrogatepass")
        drawn = int.from_bytes(blake2b(what, digest_size=8).digest()) / 2**64
        return drawn < self._acceptance


def _another(token_id: int) -> int:
    return token_id - 1 if token_id else 1
