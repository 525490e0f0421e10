"""The Triton kernels run on the CPU in Triton's interpreter, which `make kernels` installs and asks for."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
