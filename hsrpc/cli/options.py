"""Flags that several commands share, and the engine settings made from them."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, NoReturn, TypeAlias

from hsrpc.cli.terminal import print_error
from hsrpc.config import (
    AUTO,
    BUNDLED_MODEL,
    MAX_STEP_TIME,
    CacheCoding,
    CachePolicy,
    DeviceKind,
    DraftMethod,
    DType,
    EngineConfig,
    ExpertLoading,
    GenerationDefaults,
    LatentAttention,
    Placement,
    ResidentWeights,
    Seconds,
    WeightCoding,
)
from hsrpc.errors import ConfigError
from hsrpc.request import SamplingParams

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop", "ignore_eos")

ABSENT: object = object()
"""The value of an option that no flag gave."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and where help is; takes no abbreviated flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**(settings | {"allow_abbrev": False}))
        self.fill_in: Callable[[argparse.Namespace], None] | None = None
        """Called with what the flags gave; a value that none gave is ABSENT."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as the base does; what the flags leave open comes from elsewhere where the command wants it."""
        parsed, unknown = super().parse_known_args(args, namespace or self._empty())
        if self.fill_in is not None:
            self.fill_in(parsed)
        return parsed, unknown

    def _empty(self) -> argparse.Namespace:
        """Namespace without values, or marked ABSENT where flags must be told from defaults."""
        names = [action.dest for action in self.options()] if self.fill_in is not None else []
        return argparse.Namespace(**dict.fromkeys(names, ABSENT))

    def options(self) -> list[argparse.Action]:
        """What its flags set, in the order of the help."""
        return [action for action in self._actions if action.option_strings and action.dest != "help"]

    def error(self, message: str) -> NoReturn:
        print_error(f"{self.prog}: error: {message}; see `{self.prog} --help`")
        sys.exit(2)


@dataclass(frozen=True, slots=True)
class SecondsOption:
    """Type of an option that takes seconds: reads one of those that are allowed."""

    allowed: Seconds

    def __call__(self, text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if seconds not in self.allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not a time that it may be; give seconds, {self.allowed}")
        return seconds


MEASURED_TIME = SecondsOption(Seconds(0.001))
"""How long a benchmark takes, or what it should keep to."""


_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|([ntr\\]))")
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""Text of an option that is to be matched: \n, \t, \r, \\, \xNN and \uNNNN stand for one character, as in Python.

    A backslash before anything else stays as it is.
    """
    return _ESCAPE.sub(lambda found: _CONTROLS.get(found[3]) or chr(int(found[1] or found[2], 16)), text)


def add_command(commands: Commands, name: str, summary: str, examples: str) -> Parser:
    """A command's parser, with a summary and examples."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `SamplingParams` that commands have."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the model's own)")
    group.add_argument("--top-p", type=float, metavar="X", help="default: the model's own")
    group.add_argument("--top-k", type=int, metavar="N", help="0 is all tokens (default: the model's own)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="default: to the end of the context")
    group.add_argument(
        "--stop",
        action="append",
        type=unescaped,
        default=[],
        metavar="TEXT",
        help=r"end before this; \n is a newline, and \t, \r, \\, \xNN and \uNNNN are as in Python; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that these flags give.

    Raises:
        InvalidRequestError: a setting is wrong.
    """
    given = {name: getattr(options, name) for name in _SAMPLING if getattr(options, name) is not None}
    SamplingParams(**given)
    return given


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `EngineConfig`; each default is the dataclass's own."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        help="directory in Hugging Face format, hub id, or random:SHAPE, such as random:opt-13b or random:config.json, "
        "with weights as fp8, mxfp4, nvfp4, w4a16 or w8a16 where that follows, such as random:qwen3-32b:fp8 "
        "(default: bundled)",
    )
    add_trust_links(model)
    model.add_argument(
        "--chat-template", metavar="FILE", help="makes prompts of conversations (default: the model's own template)"
    )
    model.add_argument(
        "--dtype", choices=_values(DType), default=DType.AUTO, help="of weights and caches (default: auto)"
    )
    model.add_argument(
        "--generation-config",
        choices=_values(GenerationDefaults),
        default=GenerationDefaults.AUTO,
        help="auto takes the sampling settings that a request leaves out from the model's generation_config.json, none "
        "takes hsrpc's own (default: auto)",
    )
    model.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="most tokens of one request, prompt and output (default: the model's own, or, where the budgets have no "
        "room for one of that length at hardly less speed, its half and so on, not below 4096)",
    )
    model.add_argument("--seed", type=int, metavar="N", help="makes the seeds of requests that bring none reproducible")
    memory = parser.add_argument_group("device and memory")
    memory.add_argument("--device", choices=_values(DeviceKind), default=DeviceKind.AUTO, help="default: auto")
    memory.add_argument(
        "--gpus",
        type=_number_or_word,
        default=1,
        metavar="N",
        help="GPUs of this host that share one stream of weights, or all: each loads a part of every layer and gets "
        "the others from the others, and serves requests of its own (default: 1)",
    )
    memory.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="hard budget of device memory of each GPU, such as 24GiB (default: 90%% of it)",
    )
    memory.add_argument(
        "--host-memory", metavar="SIZE", help="hard budget of pinned host memory (default: 80%% of what is free)"
    )
    memory.add_argument(
        "--placement",
        choices=_values(Placement),
        default=Placement.AUTO,
        help="auto keeps on the device what fits; host keeps all layers and caches on the host, for measurements",
    )
    memory.add_argument(
        "--resident-share", type=float, metavar="X", help="0 to 1: most of the weights that stays on the device"
    )
    memory.add_argument(
        "--weight-coding",
        choices=_values(WeightCoding),
        default=WeightCoding.AUTO,
        help="lossless sends 16-bit weights that stream in fewer bytes: 0.86 (float16) or 0.67 (bfloat16) of their own "
        "(default: auto, on CUDA lossless where it pays)",
    )
    memory.add_argument(
        "--resident-weights",
        choices=_values(ResidentWeights),
        default=ResidentWeights.AUTO,
        help="coded and quantised weights that stay on the device: packed ones take fewer bytes there, so that more of "
        "them stay, and are decoded in every step, decoded ones once, when they are loaded (default: auto, planned)",
    )
    memory.add_argument(
        "--experts",
        choices=_values(ExpertLoading),
        default=ExpertLoading.AUTO,
        help="of a mixture of experts: stream sends all that are not resident in every step, demand those that the "
        "router has chosen, and keeps the ones used last (default: auto, planned)",
    )
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--cache-policy", choices=_values(CachePolicy), default=CachePolicy.AUTO, help="default: auto, planned"
    )
    cache.add_argument(
        "--cache-format",
        choices=_values(CacheCoding),
        default=CacheCoding.PLAIN,
        help="fp8 and int8 keep cached tokens in 8 bits, half of the bytes, and round them: int8 stays nearer to "
        "plain, fp8 rebuilds from activations faster (default: plain, as they are computed)",
    )
    cache.add_argument(
        "--latent-attention",
        choices=_values(LatentAttention),
        default=LatentAttention.AUTO,
        help="what single queries attend to where a model keeps latents: rebuild takes K and V, absorb latents as they "
        "are stored, for measurements (default: auto, planned)",
    )
    cache.add_argument("--activation-share", type=float, metavar="X", help="0 to 1, with --cache-policy hybrid")
    cache.add_argument(
        "--recompute-share",
        type=float,
        metavar="X",
        help="0 to 1: most of the tokens in use that are cached nowhere and recomputed in each step "
        "(default: planned under auto, 0 under other policies)",
    )
    cache.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute each prompt from its first token; without, requests share what is cached of equal beginnings",
    )
    cache.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens in a cache block (default: 16)")
    batch = parser.add_argument_group("batch")
    batch.add_argument(
        "--min-batch",
        type=int,
        default=1,
        metavar="N",
        help="requests that run at once where so many fit, even where fewer would be faster (default: 1)",
    )
    batch.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="most requests that run at once; fewer do where that is faster (default: planned)",
    )
    batch.add_argument("--max-prefill-tokens", type=int, metavar="N", help="most prompt tokens that one step computes")
    batch.add_argument(
        "--expected-context", type=int, metavar="N", help="tokens of a typical running request, to plan for"
    )
    batch.add_argument(
        "--expected-output", type=int, metavar="N", help="tokens that a typical request generates, to plan for"
    )
    batch.add_argument(
        "--expected-shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="first tokens that requests have in common, such as a system prompt, to plan for (default: 0)",
    )
    batch.add_argument(
        "--max-draft-tokens",
        type=_draft_tokens,
        metavar="N|auto",
        help="tokens that each request drafts in a step at most, which the same pass verifies; auto plans as many as "
        "pay (default: auto with --drafter or --draft-model, else 0)",
    )
    batch.add_argument(
        "--drafter",
        choices=[*DraftMethod],
        help="what drafts: suffix follows what came most often behind the same tokens, in the request and in outputs "
        "of others; ngram looks in the request alone (default: suffix)",
    )
    batch.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a small model with the same tokenizer that drafts: a directory, or a hub id",
    )
    batch.add_argument(
        "--expected-acceptance",
        type=float,
        default=0.5,
        metavar="X",
        help="0 to 1: part of the drafted tokens that turn out right, of those before which all did, to plan for "
        "(default: 0.5)",
    )
    batch.add_argument(
        "--max-step-time",
        type=SecondsOption(MAX_STEP_TIME),
        metavar="SECONDS",
        help="bound on the predicted time of a step (default: none)",
    )
    batch.add_argument("--max-queued-requests", type=int, default=1024, metavar="N", help="default: 1024")
    batch.add_argument(
        "--max-queued-tokens", type=int, default=1_048_576, metavar="N", help="of prompts that wait (default: 1048576)"
    )


def _number_or_word(text: str) -> int | str:
    """A number where it is one; what else it may be, the configuration checks."""
    return int(text) if text.isdecimal() else text


def _draft_tokens(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; give 0, 1 and so on, or {AUTO}") from None


def add_trust_links(parser: argparse._ActionsContainer) -> None:
    """The flag of `EngineConfig.trust_links`."""
    parser.add_argument(
        "--trust-links",
        action="store_true",
        help="read files of the model's directory that are links out of it; without, they are refused",
    )


def check_folders(options: argparse.Namespace, *names: str) -> None:
    """Check that the files of these options have a folder, before anything is measured that would be lost.

    Raises:
        ConfigError: a folder is not there.
    """
    for name in names:
        file = getattr(options, name)
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(name, str(file), "its directory is not there", "make it first")


def _values(kind: type[StrEnum]) -> list[str]:
    return [member.value for member in kind]


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine settings in parsed options.

    Raises:
        ConfigError: a setting is wrong.
    """
    return EngineConfig(**{field.name: getattr(options, field.name) for field in fields(EngineConfig)})
