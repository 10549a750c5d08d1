# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs without a controller: doctor, replay, explain, suggest, pki, cleanup, corpus."""
