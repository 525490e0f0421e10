"""Libraries that make masks of a grammar, on one thread: seconds to compile, to copy and for each token's mask.

    pip install --no-deps --target DIR xgrammar apache-tvm-ffi
    PYTHONPATH=.:DIR python -m benchmarks.structured_output --json structured-output.json

The tokenizer is one of 128,000 tokens that litellm brings. Each constraint is followed through a document that
satisfies it, token by token; a mask's seconds are those of taking the token before and filling the bits. All seconds
are a processor's, on one thread. Then, which documents are let pass that a schema forbids. What is not installed is
left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.record import header, write_json
from hsrpc.engine.grammars.notation import LIMITS

PROGRAM = "python -m benchmarks.structured_output"
_TOKENIZER = "litellm_core_utils/tokenizers/deepseek_tokenizer.json"
_EOS = 1
_COPIES = 20
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{6}$"},
        "customer": _PERSON,
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "article": {"enum": [f"article-{number}" for number in range(500)]},
                    "count": {"type": "integer"},
                    "price": {"type": "number"},
                    "note": {"anyOf": [{"type": "string", "maxLength": 200}, {"type": "null"}]},
                },
                "required": ["article", "count", "price", "note"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["id", "customer", "lines"],
    "additionalProperties": False,
}
_SOMEBODY = {"name": "Ada Lovelace", "age": 36, "email": "ada@example.com", "tags": ["mathematics", "first of all"]}
_LINES = [
    {"article": f"article-{7 * number}", "count": number, "price": 19.5 + number, "note": "as soon as you can, please"}
    for number in range(1, 12)
]
_ARITHMETIC = """start: sum
sum: product | sum "+" product | sum "-" product
product: atom | product "*" atom
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]+/
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A constraint and a text that satisfies it."""

    name: str
    kind: str
    constraint: str
    document: str


_MANY = {
    "type": "object",
    "properties": {f"p{number}": {"type": "string", "maxLength": 100} for number in range(1000)},
    "additionalProperties": False,
}
CASES = (
    Case("person", "json_schema", json.dumps(_PERSON), json.dumps(_SOMEBODY)),
    Case(
        "order",
        "json_schema",
        json.dumps(_ORDER),
        json.dumps({"id": "ABC-123456", "customer": _SOMEBODY, "lines": _LINES}),
    ),
    Case("any object", "json_schema", '{"type": "object"}', json.dumps({"order": _LINES, "by": _SOMEBODY}, indent=2)),
    Case(
        "regex", "regex", r"[A-Z][a-z]+( [a-z]+){1,40}\.", "The quick brown fox jumps over the lazy dog and runs away."
    ),
    Case("grammar", "grammar", _ARITHMETIC, "(12+34)*56-(7*(8+9)-1234567)*(3+4)+99"),
    Case(
        "choice of 1000",
        "choice",
        json.dumps([f"the answer that has number {number}" for number in range(1000)]),
        "the answer that has number 777",
    ),
    Case("1000 properties", "json_schema", json.dumps(_MANY), '{"p0": "a"}'),
    Case("long repetition", "regex", "((a|b){1,500}c){1,500}", "abc" * 40),
)


FORBIDDEN = (
    Case("uniqueItems", "json_schema", '{"type": "array", "uniqueItems": true}', "[1,1]"),
    Case("not", "json_schema", '{"not": {"type": "string"}}', '"a"'),
    Case("multipleOf", "json_schema", '{"type": "integer", "multipleOf": 7}', "15"),
    Case("oneOf", "json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "1"),
    Case("contains", "json_schema", '{"type": "array", "contains": {"const": 7}}', "[1]"),
    Case("$ref elsewhere", "json_schema", '{"$ref": "https://example.com/schema"}', "1"),
)
"""Documents that the schema does not describe."""


class Run(Protocol):
    """A constraint under way."""

    def fill(self, bits: np.ndarray[Any, np.dtype[np.int32]]) -> None: ...
    def take(self, token_id: int) -> bool: ...


class Library(Protocol):
    """What is compared; `vocab_size` tokens."""

    vocab_size: int

    def compile(self, case: Case) -> Callable[[], Run]:
        """Something that makes a fresh run."""
        ...


class LLGuidance:
    """One matcher a request, each a copy of the compiled one, within hsrpc's bounds."""

    def __init__(self, text: str, eos: int) -> None:
        self._library = import_module("llguidance")
        self._tokenizer = self._library.LLTokenizer(text, eos_token=eos)
        self.vocab_size = self._tokenizer.vocab_size

    def compile(self, case: Case) -> Callable[[], Run]:
        kind = "lark" if case.kind == "grammar" else case.kind
        matcher = self._library.LLMatcher(
            self._tokenizer, self._library.grammar_from(kind, case.constraint), limits=LIMITS
        )
        if matcher.get_error():
            raise ValueError(f"{case.name}: {matcher.get_error()}")
        return lambda: _LLGuidanceRun(matcher.deep_copy())


class _LLGuidanceRun:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, bits: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)

    def take(self, token_id: int) -> bool:
        return bool(self._matcher.consume_token(token_id))


class XGrammar:
    """One matcher a request, of a compiled grammar."""

    def __init__(self, text: str, eos: int) -> None:
        self._library = import_module("xgrammar")
        tokenizer = import_module("tokenizers").Tokenizer.from_str(text)
        vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        self.vocab_size = vocabulary[-1][1] + 1
        self._info = self._library.TokenizerInfo(
            [token for token, _ in vocabulary],
            self._library.VocabType.BYTE_LEVEL,
            vocab_size=self.vocab_size,
            stop_token_ids=[eos],
        )
        self._compiler = self._library.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)

    def compile(self, case: Case) -> Callable[[], Run]:
        compiler = self._compiler
        compiles: Mapping[str, Callable[[str], Any]] = {
            "json_schema": compiler.compile_json_schema,
            "regex": compiler.compile_regex,
            "grammar": compiler.compile_lark,
            "choice": lambda text: compiler.compile_grammar(
                "root ::= " + " | ".join(json.dumps(choice) for choice in json.loads(text))
            ),
        }
        compiled = compiles[case.kind](case.constraint)
        return lambda: _XGrammarRun(self._library.GrammarMatcher(compiled))


class _XGrammarRun:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, bits: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self._matcher.fill_next_token_bitmask(bits.reshape(1, -1))

    def take(self, token_id: int) -> bool:
        return bool(self._matcher.accept_token(token_id))


LIBRARIES: Mapping[str, Callable[[str, int], Library]] = {"llguidance": LLGuidance, "xgrammar": XGrammar}


def measure(library: Library, case: Case, token_ids: Sequence[int]) -> dict[str, Any]:
    """Seconds of one case; an error in their place where the constraint is refused."""
    start = time.thread_time()
    try:
        fresh = library.compile(case)
    except Exception as error:
        return {"error": str(error)[:200], "compile": time.thread_time() - start}
    compiled = time.thread_time() - start
    start = time.thread_time()
    runs = [fresh() for _ in range(_COPIES)]
    copied = (time.thread_time() - start) / _COPIES
    bits = np.zeros(-(-library.vocab_size // 32), dtype=np.int32)
    seconds: list[float] = []
    for run in runs[:2]:  # the second one may find what the first has made
        for position in range(len(token_ids) + 1):
            start = time.thread_time()
            if position and not run.take(token_ids[position - 1]):
                raise ValueError(f"{case.name}: the document does not satisfy the constraint")
            run.fill(bits)
            seconds.append(time.thread_time() - start)
    half = len(seconds) // 2
    first, again = np.array(seconds[:half]), np.array(seconds[half:])
    return {
        "compile": compiled,
        "copy": copied,
        "tokens": len(token_ids),
        "first_mask": float(first[0]),
        "mask_mean": float(first.mean()),
        "mask_max": float(first.max()),
        "again_mean": float(again.mean()),
        "again_max": float(again.max()),
    }


def lets_pass(library: Library, case: Case, token_ids: Sequence[int]) -> str:
    """What becomes of a document that the schema forbids."""
    try:
        run = library.compile(case)()
    except Exception:
        return "the schema is refused"
    bits = np.zeros(-(-library.vocab_size // 32), dtype=np.int32)
    is_taken = all(run.take(token_id) for token_id in token_ids)
    if is_taken:
        run.fill(bits)
    return "it passes" if is_taken and bits[_EOS // 32] >> _EOS % 32 & 1 else "it does not pass"


def _installed_bytes(package: str) -> int:
    distribution = metadata.distribution(package)
    return sum(Path(str(file.locate())).stat().st_size for file in distribution.files or [] if _is_there(file))


def _is_there(file: Any) -> bool:
    return Path(str(file.locate())).is_file()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=PROGRAM, description="masks of structured output")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(words)
    home = find_spec("litellm")
    if home is None or home.origin is None:
        parser.error("litellm, which brings the tokenizer, is not installed; run `pip install litellm`")
    text = (Path(home.origin).parent / _TOKENIZER).read_text(encoding="utf-8")
    tokenizer = import_module("tokenizers").Tokenizer.from_str(text)
    found = []
    for name, make in LIBRARIES.items():
        if find_spec(name) is None:
            print(f"{name} is not installed")
            continue
        start = time.thread_time()
        library = make(text, _EOS)
        entry: dict[str, Any] = {
            "library": name,
            "version": metadata.version(name),
            "installed_bytes": _installed_bytes(name),
            "requires": [each for each in metadata.requires(name) or [] if "extra ==" not in each],
            "vocab_size": library.vocab_size,
            "tokenizer": time.thread_time() - start,
        }
        print(entry, flush=True)
        cases = (*CASES, *FORBIDDEN)
        token_ids = {case: tokenizer.encode(case.document, add_special_tokens=False).ids for case in cases}
        entry["cases"] = [{"name": case.name, **measure(library, case, token_ids[case])} for case in CASES]
        entry["forbidden"] = {case.name: lets_pass(library, case, token_ids[case]) for case in FORBIDDEN}
        for case in [*entry["cases"], entry["forbidden"]]:
            print(name, case, flush=True)
        found.append(entry)
    write_json(options.json, {"header": header([*PROGRAM.split(), *words]), "result": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
