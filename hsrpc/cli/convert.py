"""hsrpc convert: pickled checkpoints to safetensors."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hsrpc.cli.options import Commands, add_command, add_trust_links

_EXAMPLES = """\
  hsrpc convert ./opt-13b-pickled ./opt-13b
  hsrpc convert facebook/opt-1.3b ./opt-1.3b
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "convert", "rewrite a pickled checkpoint (.bin, .pt) as safetensors", _EXAMPLES)
    parser.add_argument("source", metavar="SRC", help="directory in Hugging Face format, or hub id")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to make; must be empty or not exist")
    add_trust_links(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Convert."""
    from hsrpc.model.convert import convert_checkpoint  # loads torch, which --help does not
    from hsrpc.model.hub import resolve_model

    source = resolve_model(options.source, pickled=True, trust_links=options.trust_links)
    convert_checkpoint(source, options.target, progress=sys.stderr.isatty())
    print(f"saved {options.target}; serve it with: hsrpc serve --model {options.target}")
