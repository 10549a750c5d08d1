# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp init`, `join` and `leave`, as the command line calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config.file import ConfigError, load
from ..config.schema import PAIR_NAME, DataPathKeys
from . import init as making
from . import running
from .files import config_path
from .flags import AnswersError, Flags, ask, missing
from .guest import Guest
from .join import join as put_in_place
from .leave import leave as take_away
from .transaction import InstallError

#: what either command may raise; a ValueError is a wrong answer
MISTAKES = (AnswersError, InstallError)

Prompt = Callable[..., Any]


def _guest(given: Mapping[str, Any]) -> Guest | None:
    pid, domain = given["from_qemu"], given["from_libvirt"]
    if pid and domain:
        raise AnswersError([f"--from-qemu {pid}: not with --from-libvirt, which is another guest"])
    if pid and not given["pair"]:
        raise AnswersError(["--pair is missing: --from-qemu needs it for the name of the tap"])
    if pid:
        return running.from_qemu(pid, given["pair"])
    return running.from_libvirt(domain) if domain else None


def init(given: Mapping[str, Any], prompt: Prompt | None) -> Iterator[str]:
    """Make the bundles. `given`: the flags by name; `prompt`: asks a person, None: nobody is there.

    Raises AnswersError and InstallError.
    """
    flags = Flags(**{f.name: given[f.name] for f in fields(Flags)})
    guest = _guest(given)
    if prompt is not None and missing(flags, guest):
        asked = prompt

        def question(text: str, default: str) -> str:
            return str(asked(text, default=default, show_default=bool(default)))

        flags = ask(flags, question, guest)
    try:
        answers = making.resolve(flags, guest, where=given["bundle"])
    except AnswersError as e:
        if missing(flags, guest):
            e.errors.append("nobody can be asked for what is missing: there is no terminal")
        raise AnswersError(e.errors) from e
    if given["dry_run"]:
        yield from making.show(answers)
        return
    yield from making.write(answers, given["bundle"], replace_old=given["replace"])


def join(path: Path, root: Path, called: str, *, replace: bool, dry_run: bool) -> Iterator[str]:
    """Put a bundle's files in place.

    Raises InstallError.
    """
    yield from put_in_place(path, root=root, called=called, replace=replace, dry_run=dry_run)


def _in_use(pair: str) -> str:
    """Return why the files of a pair of this host are still needed; "" if they are not."""
    from ..tools.cleanup import in_use  # it knows the kernel's data path, which takes a while

    try:
        where = load(Path(config_path(pair))).datapath
    except (ConfigError, OSError):
        where = DataPathKeys()
    return in_use(pair, where.bpffs, where.run_dir)


def leave(pair: str, root: Path, *, dry_run: bool) -> Iterator[str]:
    """Remove the files of a pair, unless something here still needs them.

    Raises AnswersError and InstallError.
    """
    if wrong := PAIR_NAME(pair):
        raise AnswersError([f"{pair!r}: {wrong}"])
    if root == Path("/") and (why := _in_use(pair)):
        raise InstallError(f"{why}; nothing was removed")
    yield from take_away(pair, root=root, dry_run=dry_run)
