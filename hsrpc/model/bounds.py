"""What no model goes beyond: a file that says more is wrong, and is refused before anything is made of it.

Each bound is several times what the largest published models have, and small enough that whatever a file within the
bounds describes is described in a second and a few hundred MiB. Whether it fits the machine is the planner's question.
"""

from __future__ import annotations

MAX_LAYERS = 2**12
"""Four times the deepest decoder published (1,000 layers); sizes, tensors and a plan are made for each."""
MAX_EXPERTS = 2**18
"""Experts of all layers: 8 times the most published (about 30,000); two tensors are described for each."""
MAX_WIDTH = 2**20
"""Elements of one token's row in a layer: 12 times the widest published (an MLP of 81,920); the heads together too."""
MAX_VOCAB_SIZE = 2**24
"""Tokens: 16 times the largest vocabulary published (about a million)."""
MAX_CONTEXT = 2**31 - 1
"""Tokens: an int32 in the protocol."""
MAX_MODEL_BYTES = 2**50
"""Weights: more memory than any machine can address; whole numbers in the planner's floats are exact below 2**53."""
MAX_DIMENSIONS = 64
"""Sizes in the shape of a tensor: torch computes with no more."""
MAX_FILE_BYTES = 2**63 - 1
"""The largest offset that a file can have."""
MAX_JSON_BYTES = 100_000_000
"""Length of a file or header that is parsed as a whole: the safetensors format's limit. Indexes have a few MB."""
