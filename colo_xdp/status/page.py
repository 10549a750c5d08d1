# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page: one HTML file that needs nothing but /status.json and /history.json.

Its parts lie beside this module. The policy lets a browser run this script and no other, and reach
nothing but this endpoint, whatever text the status contains.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path


def _source(suffix: str) -> str:
    return Path(__file__).with_name(f"page.{suffix}").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


_CSS, _JS = _source("css"), _source("js")

HTML: bytes = _source("html").replace("/* page.css */", _CSS).replace("/* page.js */", _JS).encode()

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash(_JS)}",
        f"style-src {_hash(_CSS)}",
        "connect-src 'self'",
        "img-src data:",  # its icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
