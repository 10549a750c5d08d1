# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one target under atheris: python -m tests.fuzz.run TARGET [libFuzzer's arguments]

It starts with the corpus in the tree; new inputs go to build/fuzz/TARGET, and so does a crash. A
crash that is understood becomes a file of the corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
FOUND = HERE.parents[1] / "build" / "fuzz"


def main() -> None:
    """Run until the arguments' limit is reached."""
    with atheris.instrument_imports(
        include=["colo_xdp", "tests.fuzz.targets", "tomllib", "scapy.utils"]
    ):
        from tests.fuzz.targets import TARGETS
    name, *rest = sys.argv[1:] or [""]
    if name not in TARGETS:
        sys.exit(f"one of: {', '.join(TARGETS)}")
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    place = [str(found), str(HERE / "corpus" / name)]
    atheris.Setup([sys.argv[0], f"-artifact_prefix={found}/", *rest, *place], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
