# SPDX-License-Identifier: GPL-2.0-or-later
"""Write the man pages colo-xdp(8) and colo-xdp.toml(5) from the code and the shipped examples.

    python -m tests.docs.man DIRECTORY

Their texts are those of `--help` and of docs/reference. `make deb` and `make install` run this;
tests/unit/test_man.py looks for every command, option and key.
"""

from __future__ import annotations

import datetime
import inspect
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer.models import OptionInfo

from colo_xdp import __version__, cli, validate
from colo_xdp.config.schema import Config

from . import generate

SUMMARY = "COLO proxy in eBPF for QEMU"
OPTIONS = {
    "--version": "Print the version and exit.",
    "--help": "Print what a command is for, and its options. Also behind each command.",
}
ENVIRONMENT = {
    "COLO_XDP_RUN_DIR": f"directory of the control sockets; default: {cli.RUN_DIR}",
    "COLO_XDP_CACHE": "directory of the compiled programs; default: /var/cache/colo-xdp",
    "COLO_XDP_LOG": "least level that a controller logs (DEBUG, INFO, WARNING, ERROR)",
    "BCC_KERNEL_SOURCE": "kernel headers to compile with, in place of those that are found",
    "NO_COLOR": "set to anything: no colours in help texts and messages",
}
FILES = {
    f"{cli.CONFIG_DIR}/PAIR.toml": "configuration of a pair on this host; see colo-xdp.toml(5)",
    f"{cli.RUN_DIR}": "control sockets, and what is attached to which device",
    f"{cli.BPFFS}": "BPF file system with the pinned programs and maps",
    "/var/cache/colo-xdp": "compiled programs, which may be removed at any time",
    "/usr/share/doc/colo-xdp": "documents, examples, alert rules, a dashboard",
}


def escaped(text: str) -> str:
    """Return text that roff shows as it is, with `code` in bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    text = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", text)
    return re.sub(r"^\.", r"\\&.", text, flags=re.M)


def heading(macro: str, text: str) -> str:
    """Return a macro with one argument."""
    quoted = escaped(text).replace('"', "\\(dq")
    return f'.{macro} "{quoted}"\n'


def paragraphs(text: str) -> str:
    """Return paragraphs, with a .PP between two."""
    parts = re.split(r"\n\s*\n", text.strip())
    return ".PP\n".join(f"{escaped(' '.join(part.split()))}\n" for part in parts)


def items(rows: Iterable[tuple[str, str]]) -> str:
    """Return a list of terms, in bold, and what each means."""
    return "".join(f".TP\n\\fB{escaped(a)}\\fR\n{escaped(b) or chr(92) + '&'}\n" for a, b in rows)


def verbatim(text: str) -> str:
    """Return text in which lines stay as they are."""
    return f".PP\n.nf\n{escaped(text).rstrip()}\n.fi\n"


def title(name: str, section: int, summary: str) -> str:
    """Return a page's head; its date is SOURCE_DATE_EPOCH, by default now."""
    at = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    day = datetime.datetime.fromtimestamp(at, datetime.UTC).date()
    manual = {5: "File formats", 8: "System administration"}[section]
    return (
        f'.TH {name.upper()} {section} {day} "colo\\-xdp {__version__}" "{manual}"\n'
        f".SH NAME\n{escaped(name)} \\- {escaped(summary)}\n"
    )


def _command(path: str, callback: Any) -> str:
    params = sorted(generate.parameters(callback), key=lambda p: isinstance(p[2], OptionInfo))
    rows = []
    for name, kind, info, default in params:
        what = name.upper()
        if isinstance(info, OptionInfo):
            value = generate.value_name(kind)
            what = ", ".join(
                f"{n} {value}".strip() for n in generate.option_names(name, kind, info)
            )
        shown = generate.shown_default(default).strip("`")
        said = [generate.sentence(info.help or "")]
        if shown not in ("", "required") and "default" not in said[0]:
            said.append(f"Default: {shown}.")
        if info.envvar:
            said.append(f"Environment: {info.envvar}.")
        rows.append((what, " ".join(said)))
    return (
        heading("SS", generate.usage(path, params).removeprefix("colo-xdp "))
        + paragraphs(inspect.cleandoc(callback.__doc__ or ""))
        + items(rows)
    )


def commands() -> str:
    """Return colo-xdp(8)."""
    parts = [
        title("colo-xdp", 8, SUMMARY),
        ".SH SYNOPSIS\n.B colo\\-xdp\n.I COMMAND\n.RI [ OPTIONS ]\n",
        ".SH DESCRIPTION\n",
        paragraphs(
            "Two copies of a QEMU guest run in lock step on two hosts. A byte leaves only when "
            "both have sent it. When one host dies, the other guest goes on, and clients keep "
            "their connections.\n\n`colo-xdp run` is the controller of one pair on one host; the "
            "unit `colo-xdp@PAIR.service` starts it. Most other commands talk to a running "
            "controller through its control socket. `colo-xdp COMMAND --help` prints what is "
            "said here."
        ),
        ".SH OPTIONS\n",
        items(OPTIONS.items()),
        ".SH COMMANDS\n",
        *(_command(path, callback) for path, callback in generate.commands()),
        ".SH EXIT STATUS\n",
        items((str(code), generate.sentence(text)) for code, text in cli.EXIT_CODES.items()),
        ".SH ENVIRONMENT\n",
        items((name, generate.sentence(text)) for name, text in ENVIRONMENT.items()),
        ".SH FILES\n",
        items((name, generate.sentence(text)) for name, text in FILES.items()),
        ".SH SEE ALSO\n.BR colo\\-xdp.toml (5),\n.BR systemd (1),\n.BR qemu (1)\n.PP\n",
        paragraphs("/usr/share/doc/colo-xdp/docs/operator/install.md, and the pages beside it."),
    ]
    return "".join(parts)


def _key(name: str, field: Any) -> tuple[str, str]:
    kind, values = generate.key_type(str(field.type)), generate.allowed(field.metadata["check"])
    said = [generate.sentence(field.metadata["help"]), f"Type: {kind}."]
    if values:
        said.append(f"Values: {values}.")
    default = generate.default_value(field)
    said.append(f"Default: {default}." if default else "Required.")
    if field.metadata["unit"]:
        said.append(f"Unit: {field.metadata['unit']}.")
    return name, " ".join(said)


def _table(cls: type[Any]) -> str:
    return items(_key(name, field) for name, field in validate.keys(cls).items())


def configuration() -> str:
    """Return colo-xdp.toml(5)."""
    parts = [
        title("colo-xdp.toml", 5, f"configuration of a pair of {SUMMARY}"),
        ".SH DESCRIPTION\n",
        paragraphs(
            "A pair is described by one TOML file on each host, `/etc/colo-xdp/PAIR.toml`; the two "
            "mirror each other. An unknown key is an error. `colo-xdp config check FILE` reports "
            "all mistakes of a file at once, and `colo-xdp config show FILE` prints it with all "
            "defaults. A controller reads its file when it starts; `colo-xdp reload` reads the "
            "rules again."
        ),
        ".SH KEYS\n.SS Top level\n",
        _table(Config),
    ]
    for name, cls in generate.TABLES.items():
        several = name in ("rule", "disk")
        parts.append(heading("SS", f"[[{name}]]" if several else f"[{name}]"))
        doc = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
        about = re.sub(r"^(One )?\[+\w+\]+(: |\. )?", "", doc)
        parts.append(paragraphs(generate.sentence(about)))
        parts.append(_table(cls))
    parts += [
        ".SH EXAMPLE\n",
        paragraphs("On the primary host; the secondary's file is beside it among the examples."),
        verbatim((generate.ROOT / "deploy/examples/primary.toml").read_text()),
        ".SH FILES\n",
        items([("/usr/share/doc/colo-xdp/examples", "Examples for both hosts.")]),
        ".SH SEE ALSO\n.BR colo\\-xdp (8)\n.PP\n",
        paragraphs("/usr/share/doc/colo-xdp/docs/operator/configuration.md"),
    ]
    return "".join(parts)


PAGES = {"man8/colo-xdp.8": commands, "man5/colo-xdp.toml.5": configuration}


def main(directory: Path) -> None:
    """Write both pages, where `man` looks for them below a directory."""
    for name, page in PAGES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
