# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host's own packet filter does with what nothing allows."""

from __future__ import annotations

from .netlink import NetlinkError, nftables

NF_INET_LOCAL_IN, NF_DROP = 1, 0
_NFPROTO = {1: "inet", 2: "ip", 10: "ip6"}


def dropping() -> list[str]:
    """Return the nftables chains that drop what comes to this host unless a rule allows it.

    Empty on a kernel without nf_tables, and where the rules cannot be read.
    """
    out = []
    try:
        with nftables() as nft:
            for m in nft.get_chains():
                family = _NFPROTO.get(m["nfgen_family"])
                hook = m.get_attr("NFTA_CHAIN_HOOK")
                if family is None or hook is None or m.get_attr("NFTA_CHAIN_POLICY") != NF_DROP:
                    continue
                if hook.get_attr("NFTA_HOOK_HOOKNUM") == NF_INET_LOCAL_IN:
                    table, chain = m.get_attr("NFTA_CHAIN_TABLE"), m.get_attr("NFTA_CHAIN_NAME")
                    out.append(f"{family} {table} {chain}")
    except (NetlinkError, OSError):
        return []
    return out
