"""Tests with a real Ray on this machine, which `make ray` installs and asks for: they take longer than others."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("HSRPC_TEST_RAY") == "1" else ["test_*.py"]
