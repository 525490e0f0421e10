"""The kernel that decodes codes, compiled for Hopper as Triton does on a GPU; the interpreter takes more than it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

KINDS = {
    "fp8": {"CODE": 0, "BITS": 8, "SCALE": 0},
    "chosen": {"CODE": 1, "BITS": 4, "SCALE": 3, "MOVES": True},
    "nvfp4": {"CODE": 1, "BITS": 4, "SCALE": 4, "FACTOR": 2},
    "w4-order": {"CODE": 2, "BITS": 4, "SCALE": 1, "ZEROS": True, "EACH": True, "GROUPS": True, "TILES": 2},
}
"""By what a kernel is compiled for; see `_decode_units`."""
_USUAL = {"ZEROS": False, "FACTOR": 0, "EACH": False, "GROUPS": False, "ALIGNED": True}
_USUAL |= {"MOVES": False, "THREADS": 128, "TILES": 8, "GROUP": 16, "FIELDS": 16}
_COMPILE = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hsrpc.model.kernels.scaled import _decode_units as kernel

def compiled(settings):
    constants = {"DTYPE": tl.bfloat16, **settings}
    signature = {name: "constexpr" if name in constants else "*i64" for name in kernel.arg_names}
    signature["owners"] = "*i32"
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(number,): [["tt.divisibility", 16]] for number in (0, 1)},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return made.asm["ptx"], made.metadata.shared

print(json.dumps({name: compiled(settings) for name, settings in json.load(sys.stdin).items()}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[str, int]]:
    """PTX and bytes of shared memory by kind, of a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = json.dumps({name: _USUAL | kind for name, kind in KINDS.items()})
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], input=given, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_are_written_as_words_of_16_bytes(kind: str, compiled: dict[str, tuple[str, int]]) -> None:
    """Nothing is exchanged between threads for that; and the least float32 are not taken for 0."""
    ptx, shared = compiled[kind]
    assert ptx.count("st.global.v4.b32") == ptx.count("st.global") == {**_USUAL, **KINDS[kind]}["TILES"]
    assert shared == 0
    assert "ftz" not in ptx
