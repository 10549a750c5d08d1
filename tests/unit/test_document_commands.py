# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of documents: how they are read, what they cost a person, and who runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.commands import (
    BOLD,
    ByHand,
    PageError,
    Run,
    blocks,
    joined,
    steps,
    unseen,
)

OPERATOR = Path(__file__).parents[2] / "docs/operator"
QUICKSTART = (OPERATOR / "quickstart.md").read_text()
PAGE = """# Page

## Part: 2 steps, 3 minutes

### 1. One (1 minute)

Prose, and `code`.

```sh
# on hosta
a \\
    --long
b

# on both hosts, please
c
```

```text
seen ...
```

    indented, and no step's

### 2. Two (2 minutes)

**Pull the plug.**

This is **bold.**
"""


def test_a_page_is_read_in_its_order() -> None:
    one, two = steps(PAGE)
    assert (one.title, one.minutes, one.part) == ("1. One", 1, "Part: 2 steps, 3 minutes")
    assert one.doings == [
        Run(9, ("hosta",), ["a \\\n    --long", "b"]),
        Run(9, ("hosta", "hostb"), ["c"], ["seen ..."]),
    ]
    assert two.doings == [ByHand(27, "Pull the plug")]
    assert [b.kind for b in blocks(PAGE)] == ["sh", "text", "indented"]
    assert (one.least, two.least) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("# on hosta\n", "", "no comment says on which host"),
        ("# on hosta\n", "# on hostc\n", "names none of"),
        (
            "# on hosta\na \\\n    --long\nb\n\n# on both hosts, please\nc\n",
            "",
            "without a command",
        ),
        ("c\n", "", "without a command"),
        ("(2 minutes)", "", "line 25: a step without its minutes"),
        ("### 2. Two", "### Two", "without a number"),
        ("```text", "```toml", "a block of the kind 'toml'"),
        ("```sh", "```text", "of which commands"),
        ("### 1. One (1 minute)\n", "", "a block in no step"),
        ("seen ...\n```\n", "seen ...\n", "a block without an end"),
    ],
)
def test_what_is_not_clear_is_refused(old: str, new: str, said: str) -> None:
    assert PAGE.count(old) == 1
    with pytest.raises(PageError, match=said):
        steps(PAGE.replace(old, new))


def test_what_is_seen() -> None:
    said = "web1  primary\n  OK: fine, 12 s\nlast\n"
    assert unseen(["web1 primary", "OK: ..., ... s"], said) == []
    assert unseen(["web1"], said) == ["web1"]
    assert unseen(["last", "web1 ..."], said) == ["web1 ..."], "in this order"


# ---- the page that is run


def test_the_page_tells_what_it_costs_a_person() -> None:
    """Each part's heading counts its steps and minutes; to a protected pair it is less than ten."""
    found = steps(QUICKSTART)
    assert [s.title.partition(".")[0] for s in found] == [str(i + 1) for i in range(len(found))]
    total: dict[str, int] = {}
    for part in dict.fromkeys(s.part for s in found):
        of = [s for s in found if s.part == part]
        m = re.fullmatch(r"(.*): (\d+) steps, (\d+) minutes", part)
        assert m, part
        total[m[1]] = sum(s.minutes for s in of)
        assert (int(m[2]), int(m[3])) == (len(of), total[m[1]]), part
    assert total["To a protected pair"] < 10
    for s in found:
        assert s.minutes >= s.least, f"{s.title}: {s.least} minutes for its blocks alone"


def test_no_bold_line_is_neither_prose_nor_a_deed() -> None:
    """A deed that the reader of the page does not notice would not be done in the test."""
    found = [x for x in QUICKSTART.splitlines() if "**" in x]
    assert found and all(BOLD.match(x) for x in found)


#: blocks of install.md that the quickstart does not have, by their first command, and why
NOT_RUN = {
    "apt-get install make python3-bpfcc python3-venv linux-headers-$(uname -r)":
        "one host of tests/hosts/test_systemd.py gets what `make install` makes, before it boots",
    "ip tuntap add dev tap-web1 mode tap vnet_hdr":
        "until the next boot only: networkd's example makes the tap in tests/hosts/test_systemd.py",
    "colo-xdp pki init /root/web1-pki --pair web1":
        "in tests/unit/tools/test_pki.py; tests/hosts/pair.py makes its certificates so, too",
    "qemu-system-x86_64 ... \\\n  -qmp unix:/run/colo-vm/web1.qmp,server=on,wait=off \\\n"
    "  -netdev tap,id=n0,ifname=tap-web1,script=no,downscript=no,vnet_hdr=on \\\n"
    "  -device virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,guest_announce=off":
        "a part of a command line; tests/hosts/pair.py has it for the lab's guest",
    "systemctl enable --now vm@web1":
        "the example units are enabled, and started by the boot, in tests/hosts/test_systemd.py",
    "ip route change 192.0.2.0/24 dev eth2 src 192.0.2.1 quickack 1":
        "until the next boot only: networkd's example does it in tests/hosts/test_systemd.py",
    "colo-xdp doctor /etc/colo-xdp/web1.toml":
        "the quickstart does this with the units that `init` makes",
}  # fmt: skip


def commands_of(page: str) -> Iterator[list[str]]:
    """Return the commands of each block that is no configuration, without their comments."""
    for b in blocks((OPERATOR / f"{page}.md").read_text()):
        if b.kind in ("sh", "indented"):
            yield [re.sub(r"\s+#.*", "", c) for c in joined(b.lines)]


def test_each_command_of_install_is_run_or_has_a_reason() -> None:
    run = {c for s in steps(QUICKSTART) for d in s.doings if isinstance(d, Run) for c in d.commands}
    assert [b[0] for b in commands_of("install") if not run.issuperset(b)] == list(NOT_RUN)
