# SPDX-License-Identifier: GPL-2.0-or-later
"""Installing a bundle: all or nothing, whatever goes wrong, and nothing is overwritten unasked."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.setup import init, transaction
from colo_xdp.setup.flags import AnswersError
from colo_xdp.setup.join import Refused, join
from colo_xdp.setup.transaction import InstallError

from .pairs import FLAGS, bundles, flags, made, root, tree

NO_DISKS: dict[str, Any] = {"disk": ()}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return root(tmp_path / "root")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundles(tmp_path / "made")["primary"]


def done(bundle: Path, here: Path, **options: Any) -> str:
    return "\n".join(join(bundle, root=here, **options))


def refusal(bundle: Path, here: Path, **options: Any) -> str:
    with pytest.raises(InstallError) as e:
        done(bundle, here, **options)
    return str(e.value)


def test_files_are_in_place_and_the_commands_are_told(bundle: Path, here: Path) -> None:
    text = done(bundle, here)
    found = tree(here / "etc")
    assert found["colo-xdp/web1/primary.key"][0] & 0o777 == 0o600
    assert found["colo-xdp/web1/qemu"][0] & 0o777 == 0o755
    assert (here / "var/lib/colo-xdp/web1").stat().st_mode & 0o777 == 0o700
    assert not [name for name in found if "/." in name or name.endswith("~")]
    last = text.partition("now run:\n")[2].split("\n")
    assert [line.split()[0] for line in last] == ["systemctl", "colo-xdp", "systemctl"]
    assert "/sbin/off is not there yet: without it nothing fences" in text
    assert "are there already, and are the same" in done(bundle, here)
    assert tree(here / "etc") == found


def test_a_dry_run_changes_nothing(bundle: Path, here: Path) -> None:
    before = tree(here)
    assert f"would write {here}/etc/colo-xdp/web1.toml" in done(bundle, here, dry_run=True)
    assert tree(here) == before


def test_the_other_hosts_bundle_is_refused(tmp_path: Path, here: Path) -> None:
    other = bundles(tmp_path / "made")["secondary"]
    before = tree(here)
    text = refusal(other, here)
    assert "for hostb, the secondary host of web1, and this host is hosta" in text
    assert tree(here) == before
    assert "wrote" in done(other, here, called="hostb")


@pytest.mark.parametrize(
    ("own", "wanted", "same"),
    [("hosta", "hosta.example.org", True), ("HOSTA.example.org", "hosta", True),
     ("hosta.example.org", "hosta.example.com", False), ("hosta", "hostab", False)],
)  # fmt: skip
def test_a_domain_counts_only_if_both_names_have_one(own: str, wanted: str, same: bool) -> None:
    from colo_xdp.setup import host

    assert host.is_called(own, wanted) is same


def test_what_is_there_and_differs_needs_permission_and_is_kept(bundle: Path, here: Path) -> None:
    done(bundle, here)
    config = here / "etc/colo-xdp/web1.toml"
    mine = config.read_text() + "# mine\n"
    config.write_text(mine)
    before = tree(here)
    assert f"{config} is there already, and is different" in refusal(bundle, here)
    assert tree(here) == before
    for n in (1, 2):
        config.write_text(mine)
        assert f"(before: {config}.~{n}~)" in done(bundle, here, replace=True)
        assert Path(f"{config}.~{n}~").read_text() == mine != config.read_text()


def test_a_key_that_others_can_read_is_written_again(bundle: Path, here: Path) -> None:
    done(bundle, here)
    key = here / "etc/colo-xdp/web1/primary.key"
    key.chmod(0o644)
    assert f"{key} is there already" in refusal(bundle, here)
    done(bundle, here, replace=True)
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_masked_unit_or_a_directory_in_its_place(bundle: Path, here: Path) -> None:
    unit = here / "etc/systemd/system/colo-qemu@web1.service"
    unit.parent.mkdir(parents=True)
    unit.symlink_to("/dev/null")
    assert f"{unit} is there already" in refusal(bundle, here)
    done(bundle, here, replace=True)
    assert unit.is_file() and os.readlink(f"{unit}.~1~") == "/dev/null"
    unit.unlink()
    unit.mkdir()
    before = tree(here)
    assert f"{unit} is a directory; nothing was changed" in refusal(bundle, here, replace=True)
    assert tree(here) == before


def test_bundles_of_another_init_do_not_mix(tmp_path: Path, here: Path, bundle: Path) -> None:
    """Certificates of two authorities would be found out only when the hosts meet."""
    done(bundle, here)
    other = bundles(tmp_path / "again")["primary"]
    assert "web1/ca.crt is there already, and is different" in refusal(other, here)


def test_the_other_role_of_the_same_pair_is_refused(tmp_path: Path, here: Path) -> None:
    both = bundles(tmp_path / "made")
    done(both["primary"], here)
    text = refusal(both["secondary"], here, called="hostb", replace=True)
    assert "is that of the primary of web1, and the bundle's of the secondary" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "[network] peer_link: device eth1 is that of pair web1"),
        ({"peer_link": "eth9"}, "[peer] local: port 9846 is that of pair web1 ([peer] local"),
        ({"peer_link": "eth9", "base_port": "9900", "tap": "tap-web1"},
         "[network] tap: device tap-web1 is that of pair web1"),
    ],
)  # fmt: skip
def test_a_pair_that_meets_another_is_refused(
    tmp_path: Path, here: Path, bundle: Path, changes: dict[str, Any], said: str
) -> None:
    done(bundle, here)
    before = tree(here)
    second = bundles(tmp_path / "second", pair="web2", **changes)["primary"]
    assert said in refusal(second, here, replace=True)
    assert tree(here) == before


def test_twenty_pairs_on_a_host(tmp_path: Path, here: Path) -> None:
    """Bundles that are made one after the other, before any is joined, have ports of their own."""
    where = tmp_path / "made"
    where.mkdir()
    for n in range(20):
        f = flags(pair=f"web{n}", peer_link=f"eth1.{n}", **NO_DISKS)
        list(init.write(init.resolve(f, root=here, where=where), where))
    before: dict[str, Any] = {}
    for n in range(20):
        done(where / f"web{n}-primary.bundle", here)
        now = tree(here)
        assert {k: now[k] for k in before} == before
        before = now
    # and once more for one of them: it keeps its ports
    assert init.resolve(flags(pair="web7", **NO_DISKS), root=here).ports.base == 9846 + 70
    assert init.resolve(flags(pair="new", **NO_DISKS), root=here).ports.base == 9846 + 200


def test_an_unreadable_file_of_another_pair(tmp_path: Path, here: Path, bundle: Path) -> None:
    (here / "etc/colo-xdp").mkdir()
    (here / "etc/colo-xdp/old.toml").write_text("pair = \n")
    with pytest.raises(AnswersError, match="old.toml: not TOML.*(?s:.*)with --base-port"):
        init.resolve(FLAGS, root=here)
    assert init.resolve(flags(base_port="9900"), root=here).ports.base == 9900
    assert "old.toml: not TOML" in done(bundle, here)


def test_a_device_that_is_configured_already_stays_so(here: Path, bundle: Path) -> None:
    own = here / "etc/systemd/network/20-eth1.network"
    own.parent.mkdir(parents=True)
    own.write_text("[Match]\nName=eth0 eth1\n[Network]\nVLAN=eth1.11\nVLAN=eth1.12\n")
    (own.parent / "90-any.network").write_text("[Match]\nName=*\n[Network]\nDHCP=yes\n")
    assert f"eth1.network is not written: {own} configures eth1 already" in done(bundle, here)
    assert not (own.parent / "30-colo-xdp.web1.eth1.network").exists()
    assert (own.parent / "30-colo-xdp.web1.tap-web1.network").exists()


def test_the_file_for_quickack_has_to_be_there(tmp_path: Path, here: Path) -> None:
    made_ = bundles(tmp_path / "made", migration_network="20-eth2.network")["primary"]
    assert "--migration-network 20-eth2.network: systemd-networkd has no such file" in (
        refusal(made_, here)
    )
    there = here / "usr/lib/systemd/network/20-eth2.network"
    there.parent.mkdir(parents=True)
    there.write_text("[Match]\nName=eth2\n")
    done(made_, here)
    drop_in = here / "etc/systemd/network/20-eth2.network.d/50-colo-xdp.web1.conf"
    assert "QuickAck=yes" in drop_in.read_text()


def test_an_unknown_user_is_named(tmp_path: Path, here: Path) -> None:
    made_ = bundles(tmp_path / "made", qemu_user="nobody-here")["primary"]
    assert "--qemu-user nobody-here: there is no such user" in refusal(made_, here)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away")
def test_a_directory_is_given_away_and_nothing_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's user owns its parent, and is quick."""
    theirs, mkdir = tmp_path / "theirs", os.mkdir
    theirs.mkdir(mode=0o755)

    def raced(path: Any, mode: int = 0o777, **kwargs: Any) -> None:
        mkdir(path, mode, **kwargs)
        if Path(path).name == "overlays":
            Path(path).rmdir()
            Path(path).symlink_to(theirs)

    wanted = transaction.Directory(tmp_path / "overlays", 0o700, (12345, 12345))
    with monkeypatch.context() as m, pytest.raises(InstallError):
        m.setattr(os, "mkdir", raced)
        transaction.install(tmp_path / "journal", [], [wanted])
    assert (theirs.stat().st_uid, theirs.stat().st_mode & 0o777) == (os.geteuid(), 0o755)
    (tmp_path / "overlays").unlink()
    transaction.install(tmp_path / "journal", [], [wanted])
    st = (tmp_path / "overlays").stat()
    assert (st.st_uid, st.st_gid, st.st_mode & 0o777) == (12345, 12345, 0o700)


def test_a_bundle_that_others_can_read(bundle: Path, here: Path) -> None:
    assert "can be read by others" not in done(bundle, here)
    bundle.chmod(0o644)
    assert f"note: {bundle} can be read by others, and contains a private key" in done(bundle, here)


def test_no_bundle(tmp_path: Path, here: Path) -> None:
    assert f"{tmp_path}/none: No such file" in refusal(tmp_path / "none", here)
    (tmp_path / "empty").touch()
    with pytest.raises(Refused, match="empty: it is no bundle, or was cut short"):
        done(tmp_path / "empty", here)


# ---- what goes wrong on the way

CHANGES = ("mkdir", "chmod", "fchmod", "fsync", "rename", "link")
CALLS = ("open", "mkdir", "chmod", "fchmod", "fsync", "rename", "link", "unlink")


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    error: Callable[[], BaseException],
    *,
    on: bool = False,
    calls: tuple[str, ...] = CALLS,
) -> Iterator[list[int]]:
    """Let the call number `at` fail, and with `on` those behind it, too; yields how many it saw."""
    count = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == at or (on and count[0] > at):
                raise error()
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as m:
        for name in calls:
            m.setattr(os, name, wrap(getattr(os, name)))
        yield count


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")


@pytest.fixture
def replaced(tmp_path: Path, here: Path) -> tuple[Path, Path]:
    """A host with files of the pair, of which each differs from what is to replace it."""
    where = tmp_path / "made"
    done(bundles(where)["primary"], here)
    for path in (here / "etc").rglob("*"):
        if path.is_file() and path.name != "hostname":
            path.write_text("as it was\n")
    (here / "etc/colo-xdp/web1.toml").write_text("pair = 'web1'\n")
    (here / "etc/systemd/network/30-colo-xdp.web1.eth1.network").unlink()
    return where / "web1-primary.bundle", here


def each_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here_: Path, bundle_: Path,
    error: Callable[[], BaseException], *, on: bool,
) -> Iterator[tuple[int, Path, BaseException | None]]:  # fmt: skip
    """Install into copies of the host, each time with a failure at the next call."""
    for at in range(1, 1000):
        copy = tmp_path / f"copy{at}"
        shutil.copytree(here_, copy, symlinks=True)
        raised: BaseException | None = None
        with failing(monkeypatch, at, error, on=on) as count:
            try:
                done(bundle_, copy, replace=True)
            except (InstallError, Killed) as e:
                raised = e
        if count[0] < at:
            assert at > 60 and raised is None
            return
        yield at, copy, raised
        shutil.rmtree(copy)


def test_any_failure_leaves_everything_as_it_was(
    tmp_path: Path, replaced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_, here_ = replaced
    before, refused = tree(here_), 0
    for at, copy, e in each_call(tmp_path, monkeypatch, here_, bundle_, no_space, on=False):
        if e is None:
            # what had failed does not matter: the files are in place
            assert "are the same" in done(bundle_, copy), f"call {at}"
            continue
        refused += 1
        assert "No space left on device" in str(e)
        assert tree(copy) == before, f"after a failure of call {at}"
    assert refused > 60


def test_a_process_that_is_killed_is_undone_by_the_next(
    tmp_path: Path, replaced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_, here_ = replaced
    before, found, files = tree(here_), 0, []
    for at, copy, e in each_call(tmp_path, monkeypatch, here_, bundle_, Killed, on=True):
        left = tree(copy)
        files = [name for name, what in before.items() if what[1] != b"/"]
        assert set(files) <= set(left), f"call {at}: each file is there, old or new"
        journal = copy / "etc/colo-xdp/.web1.join"
        if isinstance(e, Killed) and not journal.exists() and left != before:
            # it was complete already, or had not begun: half a journal is in nobody's way
            stray = [name for name in left if name not in before and ".web1.join" not in name]
            assert not stray or "are the same" in done(bundle_, copy), f"call {at}"
            continue
        found += journal.exists()
        transaction.undo_interrupted(journal)
        assert tree(copy) == before, f"killed at call {at}"
    assert found > 50 and files


def test_a_disk_that_becomes_read_only_on_the_way(
    tmp_path: Path, replaced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then undoing fails, too; what is left is undone later."""
    bundle_, here_ = replaced
    before = tree(here_)

    def read_only() -> OSError:
        return OSError(errno.EROFS, os.strerror(errno.EROFS), "x")

    for at, copy, e in each_call(tmp_path, monkeypatch, here_, bundle_, read_only, on=True):
        assert e is None or "Read-only file system" in str(e)
        left = tree(copy)
        assert "wrote" in done(bundle_, copy, replace=True) or e is None, f"call {at}, {left}"
        assert not list((copy / "etc/colo-xdp").glob(".web1*"))
    assert tree(here_) == before


def test_the_next_join_goes_on_after_a_kill(
    replaced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_, here_ = replaced
    before = tree(here_)
    renames = [0]

    def third_dies(*args: Any) -> None:
        renames[0] += 1
        if renames[0] > 5:
            raise Killed
        real(*args)

    real = os.rename
    with monkeypatch.context() as m:
        m.setattr(transaction.os, "rename", third_dies)
        with pytest.raises(Killed):
            done(bundle_, here_, replace=True)
    assert tree(here_) != before
    text = done(bundle_, here_, replace=True)
    assert "an earlier `join` of web1 was interrupted" in text
    assert "wrote" in text and not list((here_ / "etc/colo-xdp").glob(".web1*"))


def test_a_damaged_journal_is_named(bundle: Path, here: Path) -> None:
    (here / "etc/colo-xdp").mkdir()
    (here / "etc/colo-xdp/.web1.join").write_text("{")
    assert ".web1.join: damaged" in refusal(bundle, here)


def test_two_at_once(bundle: Path, here: Path) -> None:
    etc = here / "etc/colo-xdp"
    etc.mkdir()
    before = tree(here)
    fd = os.open(etc, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert "another `colo-xdp init`, `join` or `leave` is at work here" in refusal(bundle, here)
        assert tree(here) == before
    finally:
        os.close(fd)
    assert "wrote" in done(bundle, here)


def test_many_at_once_give_one_whole_result(bundle: Path, here: Path) -> None:
    """Real processes: each succeeds or is told that another one is at work."""
    code = (
        "import sys; from pathlib import Path; from colo_xdp.setup.join import join\n"
        "from colo_xdp.setup.transaction import InstallError\n"
        "try: print('\\n'.join(join(Path(sys.argv[1]), root=Path(sys.argv[2]))))\n"
        "except InstallError as e: sys.exit(str(e))"
    )
    run = [subprocess.Popen([sys.executable, "-c", code, str(bundle), str(here)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
           for _ in range(6)]  # fmt: skip
    ends = [(p.communicate(), p.returncode) for p in run]
    assert any(rc == 0 for _, rc in ends)
    for (_, err), rc in ends:
        assert rc == 0 or "at work here" in err, err
    assert "are the same" in done(bundle, here)


@contextmanager
def mounted(where: Path, size: str) -> Iterator[None]:
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@needs_root
def test_a_full_disk(bundle: Path, here: Path) -> None:
    with mounted(here / "etc/colo-xdp", "24k"):
        before = tree(here)
        text = refusal(bundle, here)
        assert "No space left on device; nothing was changed" in text
        assert tree(here) == before
        subprocess.run(["mount", "-o", "remount,size=1m", here / "etc/colo-xdp"], check=True)
        assert "wrote" in done(bundle, here)


@needs_root
@pytest.mark.parametrize("where", ["etc", "etc/colo-xdp", "etc/systemd/network"])
def test_a_read_only_file_system(bundle: Path, here: Path, where: str) -> None:
    with mounted(here / where, "1m"):
        (here / "etc/hostname").write_text("hosta\n")
        subprocess.run(["mount", "-o", "remount,ro", here / where], check=True)
        before = tree(here)
        text = refusal(bundle, here)
        assert "Read-only file system" in text and str(here) in text
        assert tree(here) == before


# ---- init


def test_init_overwrites_nothing_and_keeps_its_authority(tmp_path: Path) -> None:
    where = tmp_path / "made"
    bundles(where)
    before = tree(where)
    with pytest.raises(InstallError, match="web1-primary.bundle and .*: there already"):
        list(init.write(made(), where))
    assert tree(where) == before
    lines = list(init.write(made(), where, replace_old=True))
    assert (where / "web1-primary.bundle.~1~").read_bytes() == before["web1-primary.bundle"][1]
    assert (where / "web1-primary.bundle").read_bytes() == before["web1-primary.bundle"][1]
    assert any(line.startswith("used") for line in lines)
    assert (where / "web1-primary.bundle").stat().st_mode & 0o777 == 0o600


def test_init_uses_no_authority_of_another_pair(tmp_path: Path) -> None:
    where = tmp_path / "made"
    bundles(where)
    (where / "web1-pki").rename(where / "web2-pki")
    with pytest.raises(InstallError, match="web2-pki/primary.crt is that of .*/web1/primary"):
        list(init.write(made(pair="web2", peer_link="eth2"), where))


@pytest.mark.parametrize("harm", ["mode", "owner"])
def test_init_uses_no_keys_that_others_may_know(tmp_path: Path, harm: str) -> None:
    """In a directory like /tmp, somebody may have put an authority of theirs there before."""
    where = tmp_path / "made"
    bundles(where)
    for bundle_ in where.glob("*.bundle"):
        bundle_.unlink()
    if harm == "mode":
        (where / "web1-pki").chmod(0o777)
    elif os.geteuid():
        pytest.skip("gives a directory away")
    else:
        os.chown(where / "web1-pki", 12345, 12345)
    with pytest.raises(InstallError, match="may have been filled by"):
        list(init.write(made(), where))
    assert not list(where.glob("*.bundle"))


def test_init_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(1, 1000):
        where = tmp_path / f"made{at}"
        with failing(monkeypatch, at, no_space, calls=CHANGES) as count:
            try:
                list(init.write(made(), where))
            except InstallError as e:
                assert "No space left" in str(e)
                assert not where.exists(), f"after a failure of call {at}: {tree(where)}"
        if count[0] < at:
            assert at > 15
            break


def test_what_a_killed_init_has_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "made/.web1-pki.abcd"
    left.mkdir(parents=True)
    (left / "ca.key").write_text("secret")
    bundles(tmp_path / "made")
    assert not left.exists()


def test_a_dry_run_shows_every_file_and_no_key() -> None:
    text = "\n".join(init.show(made()))
    for path in ("/etc/colo-xdp/web1.toml", "/etc/colo-xdp/web1/secondary.key"):
        assert f"---- {path} " in text
    assert "PRIVATE KEY" not in text
