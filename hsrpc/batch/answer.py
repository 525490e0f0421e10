"""Answers in the forms of OpenAI's endpoints, and the lines of output that they stand in."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hsrpc.batch.call import Call
from hsrpc.batch.line import Endpoint, Line
from hsrpc.batch.refusal import Fault, Refusal
from hsrpc.request import Finish, FinishReason, TokenLogprob

LEAST_LOGPROB = -9999.0
"""Stands for all that are less, as JSON has no infinity."""
_STOPS = (FinishReason.EOS, FinishReason.STOP_STRING, FinishReason.STOP_TOKEN)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt in front of its output."""

    text: str
    first_token_id: int


@dataclass(frozen=True, slots=True)
class Output:
    """All that a request gave."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    finish: Finish
    prompt_logprobs: Sequence[TokenLogprob] = ()
    """Log-probabilities of the prompt's tokens but the first, where they are wanted."""
    echo: Echo | None = None
    """Text of the prompt, where it comes back."""

    def named_ids(self) -> set[int]:
        """Token ids whose texts an answer with logprobs has."""
        items = [*self.prompt_logprobs, *self.logprobs]
        first = set() if self.echo is None else {self.echo.first_token_id}
        chosen = {item.token_id for item in items}
        return first | chosen | {token_id for item in items for token_id, _ in item.top}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave: an output for each of its requests, in order."""

    request_id: str
    call: Call
    outputs: Sequence[Output]
    texts: Mapping[int, str]
    """Text of each token that logprobs name."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts; each prompt counts once, however many outputs it has."""
        return sum(output.finish.usage.prompt_tokens for output in self.outputs[:: self.call.n])

    @property
    def cached_tokens(self) -> int:
        """Those of `prompt_tokens` that were found in blocks of other requests, and not computed."""
        return sum(output.finish.usage.cached_tokens for output in self.outputs[:: self.call.n])

    @property
    def completion_tokens(self) -> int:
        return sum(output.finish.usage.completion_tokens for output in self.outputs)

    def as_json(self) -> dict[str, object]:
        """The body of the response."""
        is_chat = self.call.endpoint is Endpoint.CHAT
        choice = self._chat_choice if is_chat else self._choice
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.request_id}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": self.call.model,
            "choices": [
                {"index": index, **choice(output), "finish_reason": _reason(output.finish)}
                for index, output in enumerate(self.outputs)
            ],
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            },
        }

    def _chat_choice(self, output: Output) -> dict[str, object]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        logprobs = None
        if "logprobs" in self.call.settings:
            logprobs = {"content": [self._chat_logprob(item) for item in output.logprobs], "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def _chat_logprob(self, item: TokenLogprob) -> dict[str, object]:
        chosen = self._token(item.token_id, item.logprob)
        return chosen | {"top_logprobs": [self._token(*each) for each in item.top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, object]:
        text = self.texts[token_id]
        # A part of a character has bytes that its text does not tell.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}

    def _choice(self, output: Output) -> dict[str, object]:
        logprobs = self._logprobs(output) if "logprobs" in self.call.settings else None
        text = output.text if output.echo is None else output.echo.text + output.text
        return {"text": text, "logprobs": logprobs}

    def _logprobs(self, output: Output) -> dict[str, object]:
        """Lists with an entry for each token; the first of a prompt that comes back has no logprob."""
        echo, items = output.echo, [*output.prompt_logprobs, *output.logprobs]
        first = [] if echo is None else [self.texts[echo.first_token_id]]
        nothing = [None] * len(first)
        tokens = first + [self.texts[item.token_id] for item in items]
        lengths = list(map(len, tokens))
        if echo is not None and not echo.text.startswith(tokens[0]):
            lengths[0] = 0  # a token that the text itself does not have
        return {
            "tokens": tokens,
            "token_logprobs": [*nothing, *(max(item.logprob, LEAST_LOGPROB) for item in items)],
            "top_logprobs": [*nothing, *map(self._best, items)],
            "text_offset": list(accumulate(lengths, initial=0))[:-1],
        }

    def _best(self, item: TokenLogprob) -> dict[str, float]:
        """The most probable tokens, and the one that is there."""
        found = (*item.top, (item.token_id, item.logprob))
        return {self.texts[token_id]: max(logprob, LEAST_LOGPROB) for token_id, logprob in found}


def _reason(finish: Finish) -> str:
    return "stop" if finish.reason in _STOPS else "length"


def output_line(line: Line, result: Answer | Refusal | Fault, request_id: str) -> bytes:
    """The line of output, or of errors, with its newline."""
    response: dict[str, object] | None = None
    if not isinstance(result, Fault):
        status = result.status if isinstance(result, Refusal) else 200
        response = {"status_code": status, "request_id": request_id, "body": result.as_json()}
    error = result.as_json() if isinstance(result, Fault) else None
    whole = {"id": line.id, "custom_id": line.custom_id, "response": response, "error": error}
    # A lone surrogate becomes its escape, which JSON has too.
    return json.dumps(whole, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
