"""hsrpc convert: pickled checkpoints and GGUF files to safetensors."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hsrpc.cli.options import Commands, add_command, add_trust_links
from hsrpc.config import DType

_EXAMPLES = """\
  hsrpc convert ./opt-13b-pickled ./opt-13b
  hsrpc convert facebook/opt-1.3b ./opt-1.3b
  hsrpc convert Qwen3-8B-Q4_K_M.gguf ./qwen3-8b
  hsrpc convert gemma-3-27b-it-Q4_0.gguf ./gemma-3-27b --keep-quantized
  hsrpc convert Llama-3.3-70B-BF16-00001-of-00003.gguf ./llama-3.3-70b --dtype bfloat16
"""


def add_parser(commands: Commands) -> None:
    summary = "rewrite a pickled checkpoint (.bin, .pt) or a GGUF file as safetensors"
    parser = add_command(commands, "convert", summary, _EXAMPLES)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="GGUF file, of several shards any; directory with one, or in Hugging Face format; or hub id",
    )
    parser.add_argument("target", type=Path, metavar="DST", help="directory to make; must be empty or not exist")
    parser.add_argument(
        "--dtype",
        choices=[each.value for each in DType],
        default=DType.AUTO,
        help="element type of a GGUF file's weights; auto: float16 and float32 for such files, bfloat16 for all others "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--keep-quantized",
        action="store_true",
        help="keep codes that a GGUF file's layers have in Q8_0, Q5_0, Q4_0, IQ4_NL or MXFP4, as compressed-tensors or "
        "gpt-oss has them; all others, such as K-quants, become values",
    )
    add_trust_links(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Convert."""
    from hsrpc.model.convert import convert_checkpoint  # loads torch, which --help does not
    from hsrpc.model.foreign import is_gguf
    from hsrpc.model.hub import resolve_model

    file = Path(options.source).expanduser()
    source = file if is_gguf(file) else resolve_model(options.source, pickled=True, trust_links=options.trust_links)
    convert_checkpoint(
        source,
        options.target,
        dtype=DType(options.dtype),
        keep_quantized=options.keep_quantized,
        progress=sys.stderr.isatty(),
    )
    print(f"saved {options.target}; serve it with: hsrpc serve --model {options.target}")
