# SPDX-License-Identifier: GPL-2.0-or-later
"""What `colo-xdp status` prints."""

from __future__ import annotations

from colo_xdp.status.document import empty
from colo_xdp.status.text import text


def test_status_text_tells_why() -> None:
    doc = empty("web1", "secondary").to_json()
    doc["reason"] = "waiting for the primary"
    shown = text(doc, doc["since"] + 7)
    assert "web1 secondary: starting for 7 s" in shown and "waiting for the primary" in shown
    assert "NOT connected" in shown
