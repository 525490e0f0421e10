"""Tests with a real lm-eval on this machine, which `make lm-eval` installs and asks for: hundreds of megabytes."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

collect_ignore_glob = ["test_*.py"]
if os.environ.get("HSRPC_TEST_LM_EVAL") == "1":
    collect_ignore_glob = []
    _home = TemporaryDirectory(prefix="hsrpc-lm-eval-")  # until the process ends
    # Read as the packages load: nothing is fetched, and what they keep is gone afterwards.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": _home.name}
