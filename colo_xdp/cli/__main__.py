# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m colo_xdp.cli`: the same as the command `colo-xdp`."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()
