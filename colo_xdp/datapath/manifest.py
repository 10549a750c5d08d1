# SPDX-License-Identifier: GPL-2.0-or-later
"""What one controller has attached to devices, kept on disk: all that detaching may remove."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any


def manifest_path(run_dir: str, pair: str, role: str) -> Path:
    """Return the path of the list of what is attached."""
    return Path(run_dir) / f"{pair}.{role}.attached"


class Manifest:
    """Record of what one controller has attached to devices, kept on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # devices are looked at in threads
        self.data: dict[str, list[Any]] = {
            "clsact": [],
            "filters": [],
            "xdp": [],
            "links": [],
            "promiscuous": [],
            "ports": [],
            "nics": [],  # their names
        }
        if path.exists():
            with contextlib.suppress(ValueError):
                old = json.loads(path.read_text())
                for k, v in self.data.items():
                    v.extend(old.get(k, []))

    def add(self, kind: str, item: Any) -> None:
        """Record one more item."""
        with self._lock:
            if item not in self.data[kind]:
                self.replace(kind, [*self.data[kind], item])

    def replace(self, kind: str, items: list[Any]) -> None:
        """Record these items in place of the former ones."""
        with self._lock:
            if items != self.data[kind]:
                self.data[kind] = items
                self.path.parent.mkdir(parents=True, exist_ok=True)
                tmp = self.path.with_suffix(".tmp")
                tmp.write_text(json.dumps(self.data))
                tmp.replace(self.path)
