"""Whether a request suits the model: checked before anything is done for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsrpc.errors import InvalidRequestError
from hsrpc.prompt import Chat, Prompt, Text, field_of
from hsrpc.request import SamplingParams

_MAX_CHARACTERS_PER_TOKEN = 64
"""More than any tokenizer packs into one on average."""


def max_characters(max_model_len: int) -> int:
    """Most characters of a text that could fit so many tokens."""
    return max_model_len * _MAX_CHARACTERS_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Validator:
    """Checks prompts and token ids against one model; each raises InvalidRequestError naming the field."""

    vocab_size: int
    max_model_len: int

    def check_length(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """What cannot fit is refused for its length alone, whatever it holds; `params` None: it is no request's."""
        if not isinstance(prompt, str | Text | Chat):
            self._check_count(len(prompt), "token_ids", params)
            return
        length = len(prompt) if isinstance(prompt, str) else prompt.num_characters
        most = max_characters(self.max_model_len)
        if length > most:
            raise InvalidRequestError(field_of(prompt), f"{length} characters; at most {most} can fit the context")

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Check ids to be turned into text: no more than a prompt and its output together."""
        if len(token_ids) > self.max_model_len:
            found = f"{len(token_ids)} ids; at most {self.max_model_len} fit the context (max_model_len)"
            raise InvalidRequestError("token_ids", found)
        self._check_vocabulary(token_ids, "token_ids")

    def check_prompt(self, token_ids: Sequence[int], field: str, params: SamplingParams) -> None:
        """Check that there is at least one token, and room for one more where any is to be generated."""
        if not token_ids:
            raise InvalidRequestError(field, "the prompt is empty; give at least one token")
        self._check_count(len(token_ids), field, params)
        self._check_vocabulary(token_ids, field)

    def check_params(self, params: SamplingParams) -> None:
        """The token ids in the settings."""
        self._check_vocabulary(params.stop_token_ids, "stop_token_ids")
        for token_id in params.logit_bias:
            self._check_token(token_id, f"logit_bias[{token_id}]")

    def _check_count(self, count: int, field: str, params: SamplingParams | None) -> None:
        only_scores = params is not None and params.only_scores
        max_count = self.max_model_len - (not only_scores)
        if count > max_count:
            bound = "max_model_len" if only_scores else "max_model_len less one"
            raise InvalidRequestError(field, f"{count} prompt tokens; at most {max_count} fit ({bound})")

    def _check_vocabulary(self, token_ids: Sequence[int], field: str) -> None:
        """Check all ids at once, and each only to name a wrong one: a long prompt would hold the event loop up."""
        if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < self.vocab_size:
            return
        for position, token_id in enumerate(token_ids):
            self._check_token(token_id, f"{field}[{position}]")

    def _check_token(self, token_id: object, field: str) -> None:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
            raise InvalidRequestError(field, f"{token_id!r} is no token id; use 0 to {self.vocab_size - 1}")
