# SPDX-License-Identifier: GPL-2.0-or-later
"""Leaving a pair: what `join` has written goes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colo_xdp.cli import FAILED, USAGE, app
from colo_xdp.setup import transaction
from colo_xdp.setup.join import join
from colo_xdp.setup.leave import leave
from colo_xdp.setup.transaction import InstallError

from .pairs import bundles, root, tree

RECORD = "etc/colo-xdp/web1/joined.json"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A host with a network of its own."""
    made = root(tmp_path / "root")
    for name in ("systemd/network/20-eth2.network", "systemd/system/other.service"):
        (made / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
        (made / "etc" / name).write_text("[Match]\nName=eth2\n")
    (made / "etc/colo-xdp").mkdir()
    (made / "var/lib/colo-xdp").mkdir(parents=True)
    return made


@pytest.fixture
def joined(tmp_path: Path, here: Path) -> Path:
    made = bundles(tmp_path / "made", migration_network="20-eth2.network")
    list(join(made["primary"], root=here))
    return here


def said(here: Path, pair: str = "web1", **options: bool) -> str:
    return "\n".join(leave(pair, root=here, **options))


def test_everything_is_as_it_was_before_the_join(tmp_path: Path, here: Path) -> None:
    before = tree(here)
    made = bundles(tmp_path / "made", migration_network="20-eth2.network")
    list(join(made["primary"], root=here))
    assert len(tree(here)) > len(before) + 10
    text = said(here)
    assert tree(here) == before
    assert text.partition("now run:\n")[2].split("\n") == [
        "    systemctl daemon-reload && networkctl reload", "    ip link delete tap-web1",
    ]  # fmt: skip
    list(join(made["primary"], root=here))


def test_a_second_join_changes_no_record(tmp_path: Path, joined: Path) -> None:
    before = tree(joined)
    text = "\n".join(join(tmp_path / "made/web1-primary.bundle", root=joined))
    assert "wrote" not in text and tree(joined) == before


def test_what_was_changed_stays_and_is_named(joined: Path) -> None:
    toml = joined / "etc/colo-xdp/web1.toml"
    toml.write_text(toml.read_text() + "# mine\n")
    key = joined / "etc/colo-xdp/web1/primary.key"
    text = key.read_text()
    key.unlink()
    (joined / "elsewhere").write_text(text)
    key.symlink_to("../../../elsewhere")
    disk = joined / "var/lib/colo-xdp/web1/root.overlay"
    disk.touch()
    out = said(joined)
    for kept in (toml, key):
        assert f"kept {kept}: it is not as `join` has written it" in out
        assert kept.exists()
    assert f"kept {disk.parent}: something is in it" in out and disk.exists()
    left = [p for p in tree(joined / "etc") if "web1" in p]
    assert left == ["colo-xdp/web1", "colo-xdp/web1/primary.key", "colo-xdp/web1.toml"]
    with pytest.raises(InstallError, match="has set up no pair web1 here"):
        said(joined)


def test_a_device_that_another_file_configured_is_not_ours(tmp_path: Path, here: Path) -> None:
    own = here / "etc/systemd/network/30-mine.netdev"
    own.write_text("[NetDev]\nName=tap-web1\nKind=tap\n")
    list(join(bundles(tmp_path / "made")["primary"], root=here))
    assert "ip link delete" not in said(here) and own.exists()


def test_a_bundle_that_replaced_another_leaves_nothing_of_either(
    tmp_path: Path, here: Path
) -> None:
    list(join(bundles(tmp_path / "a")["primary"], root=here))
    list(join(bundles(tmp_path / "b", tap="tap7")["primary"], root=here, replace=True))
    record = json.loads((here / RECORD).read_text())
    assert set(record["devices"]) == {"tap-web1", "tap7"}
    assert not list((here / RECORD).parent.glob("joined.json.*"))
    said(here)
    left = [p for p in tree(here) if "web1" in p]
    assert all(p.endswith(("~", "colo-xdp/web1")) for p in left), "what was there before the second"


def test_another_pair_stays(tmp_path: Path, joined: Path) -> None:
    before = tree(joined)
    made = bundles(
        tmp_path / "made", pair="web2", base_port="9900", peer_link="eth3",
        migration_network="20-eth2.network",
    )  # fmt: skip
    list(join(made["primary"], root=joined))
    said(joined, "web2")
    assert tree(joined) == before


def test_a_dry_run_changes_nothing(joined: Path) -> None:
    before = tree(joined)
    assert f"would remove {joined}/etc/colo-xdp/web1.toml" in said(joined, dry_run=True)
    assert tree(joined) == before


def test_one_that_was_interrupted_is_repeated(
    joined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []
    real = transaction._remove

    def three_times(path: Path | str) -> None:
        if len(removed) == 3:
            raise OSError(28, "No space left on device", str(path))
        removed.append(Path(path))
        real(path)

    with monkeypatch.context() as m:
        m.setattr(transaction, "_remove", three_times)
        with pytest.raises(InstallError, match="so repeat it"):
            said(joined)
    assert (joined / RECORD).exists() and not removed[0].exists()
    assert "kept" not in said(joined)
    assert not [p for p in tree(joined) if "web1" in p]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": {"/x": 1}, "devices": [], '
                                  '"directories": []}'])  # fmt: skip
def test_a_damaged_record_is_named(joined: Path, text: str) -> None:
    (joined / RECORD).write_text(text)
    before = tree(joined)
    with pytest.raises(InstallError, match=r"joined\.json: it is damaged"):
        said(joined)
    assert tree(joined) == before


def test_the_command(joined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    at = ["--root", str(joined)]
    r = run(app, ["leave", "../x", *at])
    assert r.exit_code == USAGE and "1 to 10 of a-z" in r.output
    r = run(app, ["leave", "web9", *at])
    assert r.exit_code == FAILED and "has set up no pair web9 here" in r.output
    r = run(app, ["leave", "web1", *at])
    assert r.exit_code == 0 and "ip link delete tap-web1" in r.output
    monkeypatch.setattr("colo_xdp.setup.command._in_use", lambda pair: f"{pair} runs")
    r = run(app, ["leave", "web1"])
    assert r.exit_code == FAILED and "web1 runs; nothing was removed" in r.output
