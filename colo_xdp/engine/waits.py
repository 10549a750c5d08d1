# SPDX-License-Identifier: GPL-2.0-or-later
"""Buckets of the histogram that shows how long frames of the PVM wait."""

#: upper bounds of the waiting times in seconds; one more bucket is above the last
WAIT_BUCKETS: tuple[float, ...] = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3,
    1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
