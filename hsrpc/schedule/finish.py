"""When a request ends by the tokens that it has; stop strings are found in the text (`text/stop_strings.py`)."""

from __future__ import annotations

from hsrpc.request import FinishReason
from hsrpc.schedule.request_state import Request


def finish_reason(request: Request, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """Why it ends with its newest token, which is `token_id`; None: it goes on."""
    params = request.params
    # A constrained output has an end token only where nothing else may follow, whatever it ignores.
    if token_id in eos_token_ids and (not params.ignore_eos or request.matcher is not None):
        return FinishReason.EOS
    if token_id in params.stop_token_ids:
        return FinishReason.STOP_TOKEN
    if len(request.token_ids) < request.max_total_tokens:
        return None
    is_enough = params.max_tokens is not None and request.num_output_tokens >= params.max_tokens
    return FinishReason.MAX_TOKENS if is_enough else FinishReason.CONTEXT_LENGTH


def goes_on(request: Request) -> bool:
    """It does not end with the token that is under way, unless by what that token is."""
    return request.finish_reason is None and len(request.token_ids) + 1 < request.max_total_tokens
