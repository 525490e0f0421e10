"""What memory is for: the lines of a plan, and of a device's account of what it handed out."""

from __future__ import annotations

from enum import Enum


class DeviceUse(Enum):
    """Lines of the device budget; the value is the name that people see."""

    FIXED = "embeddings and head"
    CACHE_BUFFERS = "cache buffers"
    HIDDEN_STATES = "hidden states"
    WORKSPACE = "workspace"
    GRAPH_BUFFERS = "decode graphs' input and logits"
    GRAPHS = "decode graphs"
    RUNTIME = "runtime"
    WEIGHT_BUFFERS = "weight buffers"
    RESIDENT_WEIGHTS = "resident weights"
    SPREAD_WEIGHTS = "spread weights"
    """This GPU's pieces of those that several hold together. A line of plans in which there are some."""
    EXPERTS = "experts on demand"
    """A line of plans in which there are some."""
    CACHE_BLOCKS = "cache blocks"
    DRAFT_MODEL = "draft model"
    """All that it takes, by a plan of its own. A line of plans beside which there is one."""
    MEASUREMENT = "measurement"
    """Before there is a plan, and given back: no line of one."""


class HostUse(Enum):
    """Lines of the host budget."""

    STREAMED_WEIGHTS = "streamed weights"
    CACHE_BLOCKS = "cache blocks"
    MEASUREMENT = "measurement"
    """Before there is a plan, and given back: no line of one."""
