# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a host keeps what can be made anew: compiled programs, a view of the kernel's headers."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the directory, which need not exist yet."""
    own = os.environ.get("COLO_XDP_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "/var/cache")) / "colo-xdp"
