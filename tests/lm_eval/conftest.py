"""Tests with a real lm-eval on this machine, which `make lm-eval` installs and asks for: hundreds of megabytes."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read as the packages load
collect_ignore_glob = [] if os.environ.get("HSRPC_TEST_LM_EVAL") == "1" else ["test_*.py"]
