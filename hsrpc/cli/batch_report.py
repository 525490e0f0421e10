"""What hsrpc batch says at its end, and what it would say of a run: lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hsrpc.batch.progress import told_time
from hsrpc.batch.run import Tally

if TYPE_CHECKING:
    from hsrpc.batch.efficiency import Efficiency
    from hsrpc.batch.outlook import Outlook
    from hsrpc.plan.plan import Plan
    from hsrpc.plan.question import Question
    from hsrpc.plan.sizes import ModelSizes


def row(name: str, value: str) -> str:
    """One fact."""
    return f"{name:28} {value}"


def summary(tally: Tally, seconds: float, errors: Path, efficiency: Efficiency | None) -> Iterator[str]:
    """What a run has done."""
    in_error = f", {tally.errors} of them in error: {errors}" if tally.errors else ""
    yield row("lines", f"{tally.lines:,}{in_error}")
    found = f" ({tally.cached_tokens:,} of them found)" if tally.cached_tokens else ""
    yield row("tokens", f"{tally.prompt_tokens:,} of prompts{found}, {tally.completion_tokens:,} generated")
    generated, all_tokens = tally.completion_tokens, tally.completion_tokens + tally.prompt_tokens
    rates = f"{generated / seconds:,.1f} tokens/s generated, {all_tokens / seconds:,.1f} with prompts"
    yield row("time", f"{told_time(seconds)}: {rates}")
    if efficiency is not None and efficiency.share is not None:
        yield row("share of the limit", f"{efficiency.share:.2f} of what bus and device could do")
        yield row("requests at once", f"{efficiency.mean_batch:.1f} on average")


def advice(tally: Tally, question: Question, sizes: ModelSizes, plan: Plan) -> Iterator[str]:
    """What would have helped, by the planner's predictions for the requests that there were. Takes seconds."""
    from hsrpc.batch.outlook import Load, outlook

    load = Load(
        requests=tally.requests,
        prompt_tokens=tally.prompt_tokens,
        output_tokens=tally.completion_tokens,
        longest=tally.longest,
        shared_tokens=tally.cached_tokens,
    )
    yield from advice_rows("would have helped", outlook(question, sizes, plan, load, with_advice=True))


def advice_rows(title: str, found: Outlook) -> Iterator[str]:
    """Settings that suit the load better, then changes beyond them."""
    from hsrpc.plan.advice import best_advice

    rows = []
    if found.settings:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.settings.items())
        rows.append(f"{flags}: {found.seconds / found.seconds_with_settings - 1:+.0%}, predicted")
    rows += [f"{each.name}: {each.gain:+.0%}, predicted" for each in best_advice(found.advice or [])]
    for index, value in enumerate(rows or ["nothing that was tried"]):
        yield row("" if index else title, value)
