# SPDX-License-Identifier: GPL-2.0-or-later
"""Write the generated parts of docs/reference from the tables in the code.

    python -m tests.docs.generate

A page marks a generated part with `<!-- generated: NAME -->` and `<!-- end -->`; everything else is
written by hand. tests/unit/test_reference.py fails when a page differs from what this gives.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import struct
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, OptionInfo

from colo_xdp import abi, cli, validate
from colo_xdp.compare.causes import DESCRIPTIONS, Cause
from colo_xdp.compare.policy import Rule
from colo_xdp.config.qemu import Disk
from colo_xdp.config.schema import SECTIONS, Config
from colo_xdp.engine.counters import COUNTERS
from colo_xdp.failover import states
from colo_xdp.failover.states import Role, State
from colo_xdp.peer import heartbeat_datagram, messages
from colo_xdp.status import document, history, metrics
from colo_xdp.tools.explain import ADVICE

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/reference"
MARK = re.compile(r"<!-- generated: ([\w.]+) -->\n(.*?)<!-- end -->\n", re.S)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.replace("|", "&#124;").strip() for c in cells) + " |\n"

    head = list(head)
    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(map(line, rows))


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


# ---- config.md


class _Nothing:
    """A value that no key takes."""


_TYPES = {"str": "string", "int": "integer", "bool": "boolean", "tuple": "list of strings"}
TABLES: dict[str, type[Any]] = {**SECTIONS, "rule": Rule, "disk": Disk}


def key_type(annotation: str) -> str:
    """The TOML type of a key."""
    return _TYPES.get(annotation.partition("[")[0], "string")


def allowed(check: validate.Check) -> str:
    """The values that a check accepts, in its own words."""
    text = (check(_Nothing()) or "").removeprefix("expected ")
    return re.sub(r"^(a whole number.*?from|true or false$)", "", text).strip()


def default_value(f: Field[Any]) -> str:
    """The default of a key as TOML writes it; nothing if the key is required."""
    if f.default is MISSING:
        return ""
    return json.dumps(list(f.default) if isinstance(f.default, tuple) else f.default)


def config(cls: type[Any]) -> str:
    """The keys of one section."""
    rows = []
    for name, f in validate.keys(cls).items():
        default = default_value(f)
        default = f"`{default}`" if default else "required"
        rows.append([
            f"`{name}`", key_type(str(f.type)), allowed(f.metadata["check"]), default,
            f.metadata["unit"], sentence(f.metadata["help"]),
        ])  # fmt: skip
    return table(("key", "type", "values", "default", "unit", "meaning"), rows)


# ---- cli.md


def parameters(callback: Callable[..., Any]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, type, typer's description and default of each parameter of a command."""
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, p in inspect.signature(callback).parameters.items():
        kind, info = hints[name], None
        if typing.get_origin(kind) is typing.Annotated:
            kind, info = typing.get_args(kind)[:2]
        yield name, kind, info, p.default


def value_name(kind: Any) -> str:
    """The name of an option's value; nothing for a flag."""
    args = [a for a in typing.get_args(kind) if a is not type(None)]
    if args:
        return value_name(args[0])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(m.value) for m in kind)
    names = {bool: "", int: "INTEGER", float: "NUMBER", Path: "PATH"}
    return names.get(kind, "TEXT")


def option_names(name: str, kind: Any, info: OptionInfo) -> list[str]:
    # In an annotation typer takes the first name for the default until it builds the command.
    names = [n for n in (info.default, *(info.param_decls or ())) if str(n).startswith("-")]
    if names:
        return [str(n) for n in names]
    plain = name.replace("_", "-")
    return [f"--{plain}", f"--no-{plain}"] if kind is bool else [f"--{plain}"]


def usage(path: str, params: list[tuple[str, Any, Any, Any]]) -> str:
    words, options = [path], False
    for name, kind, info, default in params:
        required = default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            shown = value_name(kind) if issubclass(_inner(kind), Enum) else name.upper()
            words.append(shown if required else f"[{shown}]")
        elif required:
            words.append(f"{option_names(name, kind, info)[-1]} {value_name(kind)}")
        else:
            options = True
    return " ".join(words + ["[OPTIONS]"] * options)


def _inner(kind: Any) -> type[Any]:
    args = [a for a in typing.get_args(kind) if a is not type(None)]
    inner = args[0] if args else kind
    return inner if isinstance(inner, type) else object


def shown_default(v: Any) -> str:
    if v is inspect.Parameter.empty:
        return "required"
    if v is None or v is False or v == "":
        return ""
    return f"`{v}`"


def commands() -> list[tuple[str, Callable[..., Any]]]:
    """Every command with its words, in the order of `--help`."""
    out: list[tuple[str, Callable[..., Any]]] = []

    def walk(app: typer.Typer, prefix: str) -> None:
        for c in app.registered_commands:
            assert c.callback is not None
            out.append((f"{prefix} {c.name or c.callback.__name__}", c.callback))
        for g in app.registered_groups:
            assert g.typer_instance is not None
            walk(g.typer_instance, f"{prefix} {g.name}")

    walk(cli.app, "colo-xdp")
    return out


def command_line() -> str:
    """Every command, with its arguments and options."""
    text = []
    for path, callback in commands():
        params = sorted(parameters(callback), key=lambda p: isinstance(p[2], OptionInfo))
        text += [f"### {path.removeprefix('colo-xdp ')}\n", f"    {usage(path, params)}\n"]
        text.append(inspect.cleandoc(callback.__doc__ or "") + "\n")
        rows = []
        for name, kind, info, default in params:
            what = f"`{name.upper()}`"
            if isinstance(info, OptionInfo):
                value = f" {value_name(kind)}".rstrip()
                what = ", ".join(f"`{n}{value}`" for n in option_names(name, kind, info))
            note = f" Environment: `{info.envvar}`." if info.envvar else ""
            rows.append([what, shown_default(default), sentence(info.help or "") + note])
        if rows:
            text.append(table(("argument or option", "default", "meaning"), rows))
    return "\n".join(text).rstrip() + "\n"


def exit_codes() -> str:
    """What a command's exit code means."""
    rows = ([str(code), sentence(text)] for code, text in cli.EXIT_CODES.items())
    return table(("code", "meaning"), rows)


# ---- metrics.md

SUFFIX = {"counter": "_total", "gauge": "", "histogram": ""}


def metric_names() -> str:
    """Every metric."""
    rows = (
        [f"`colo_xdp_{n}{SUFFIX[kind]}`", kind, ", ".join(f"`{x}`" for x in labels),
         sentence(text)]
        for n, (kind, text, labels) in metrics.METRICS.items()
    )  # fmt: skip
    return table(("metric", "type", "labels", "meaning"), rows)


def engine_events() -> str:
    """Values of the label `event`."""
    rows = [["primary", f"`{n}`", sentence(x)] for n, x in COUNTERS if n[:6] != "cause_"]
    rows += [["secondary", f"`{n}`", sentence(x)] for n, x in document.SECONDARY_COUNTERS]
    return table(("role", "event", "meaning"), rows)


# ---- status.md


def flat(fields: Mapping[str, document.Field], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields with their paths."""
    for name, f in fields.items():
        path = f"{prefix}{name}"
        yield path, f
        yield from flat(f.keys, f"{path}.")
        if f.items is not None:
            yield from flat(f.items.keys, f"{path}[].")


def status() -> str:
    """Every key of the status document."""
    rows = [[f"`{path}`", f.type, sentence(f.meaning)] for path, f in flat(document.FIELDS)]
    return table(("key", "type", "meaning"), rows)


def history_columns() -> str:
    """The columns of the history."""
    rows = ([f"`{name}`", sentence(text)] for name, text in history.COLUMNS.items())
    return table(("column", "meaning"), rows)


# ---- reasons.md

ABI_H = "bpf/lib/abi.h"


def comments(text: str, name: str) -> dict[str, str]:
    """The comment of each constant of an enum in C: behind it, or on the line above."""
    body = re.search(rf"enum {name} {{\n(.*?)\n}};", text, re.S)
    assert body, name
    token = r"/\*\s*(?P<text>.*?)\s*\*/|(?P<name>\w+)\s*=\s*\d+,[ \t]*(?:/\*\s*(?P<own>.*?)\s*\*/)?"
    found: dict[str, str] = {}
    above = ""
    for m in re.finditer(token, body[1], re.S):
        if m["name"]:
            found[m["name"]] = re.sub(r"\s*\n\s*\*?\s*", " ", m["own"] or above)
            above = ""
        else:
            above = m["text"]
    return found


def constants(enum: type[IntEnum], c_name: str, prefix: str) -> list[tuple[str, str]]:
    """Lower-case name and comment of each member."""
    found = comments((ROOT / ABI_H).read_text(), c_name)
    return [(m.name.lower(), found[prefix + m.name]) for m in enum if m.name != "MAX"]


def reasons() -> str:
    """Every counted reason."""
    rows = [[n.partition("_")[0], f"`{n}`", sentence(text)]
            for n, text in constants(abi.Reason, "colo_reason", "R_")]  # fmt: skip
    order = ["pass", "drop", "offload", "punt", "note"]
    rows.sort(key=lambda r: order.index(r[0]))
    return table(("prefix", "reason", "meaning"), rows)


def programs() -> str:
    """Every program that counts."""
    rows = [[f"`{n}`", sentence(text)] for n, text in constants(abi.Prog, "colo_prog", "PROG_")]
    return table(("program", "what it handles"), rows)


def causes() -> str:
    """Every cause of a checkpoint."""
    rows = [[f"`{c}`", sentence(DESCRIPTIONS[c]), sentence(ADVICE[c])] for c in Cause]
    return table(("cause", "meaning", "advice"), rows)


def pair_states() -> str:
    """Every state."""
    rows = [[f"`{s}`", sentence(states.MEANINGS[s])] for s in State]
    return table(("state", "meaning"), rows)


def diagram(role: Role) -> str:
    """Which state may follow which."""
    return f"```mermaid\n{states.diagram(role)}```\n"


# ---- messages.md

_SENDERS = {"P": "primary", "S": "secondary", "Either": "either", "either": "either"}


def above(path: str, name: str) -> dict[str, str]:
    """The comment above each entry of a dict literal at the top of a module."""
    text = (ROOT / path).read_text()
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            assert isinstance(node.value, ast.Dict)
            break
    else:
        raise LookupError(name)
    found = {}
    for key in node.value.keys:
        assert isinstance(key, ast.Constant)
        at, said = key.lineno - 2, []
        while lines[at].strip().startswith("#"):
            said.insert(0, lines[at].strip().lstrip("# "))
            at -= 1
        found[str(key.value)] = " ".join(said)
    return found


def control_messages() -> str:
    """Every message of the control channel."""
    said = above("colo_xdp/peer/messages.py", "MESSAGES")
    rows = []
    for kind, fields in messages.MESSAGES.items():
        m = re.match(r"(P|S|[Ee]ither)([,:]) *(.*)", said[kind], re.S)
        who = _SENDERS[m[1]] if m else "either"
        what = m[3] if m else said[kind]
        names = ", ".join(f"`{n}`: {t.__name__}" for n, t in fields.items())
        rows.append([f"`{kind}`", who, names, sentence(what)])
    return table(("message", "sender", "fields", "meaning"), rows)


LAYOUT = re.compile(r"^    (\d+) +(\d+) +(\S.*)$", re.M)


def datagram() -> str:
    """The layout of a heartbeat datagram."""
    rows = [list(m) for m in LAYOUT.findall(heartbeat_datagram.__doc__ or "")]
    at = 0
    for (begin, size, _), want in zip(rows, [*_sizes(), heartbeat_datagram.MAC], strict=True):
        assert (int(begin), int(size)) == (at, want), begin
        at += want
    assert at == heartbeat_datagram.SIZE
    parts = ([a, b, *text.partition(":")[::2]] for a, b, text in rows)
    return table(("offset", "size", "field", "content"), parts)


def _sizes() -> list[int]:
    return [
        struct.calcsize("!" + x)
        for x in re.findall(r"\d*[a-zA-Z]", heartbeat_datagram._HEAD.format)
    ]


def flags() -> str:
    """The flags of a heartbeat datagram."""
    text = inspect.getsource(heartbeat_datagram.Flag)
    rows = []
    for f in heartbeat_datagram.Flag:
        m = re.search(rf"^    {f.name} = {int(f)}(?: +# (.*))?$", text, re.M)
        assert m and f.name, f
        rows.append([f"`{f.name}`", str(int(f)), sentence(m[1] or "as in a heartbeat message")])
    return table(("flag", "value", "meaning"), rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "config.top": lambda: config(Config),
    **{f"config.{name}": (lambda cls=cls: config(cls)) for name, cls in TABLES.items()},
    "cli.commands": command_line,
    "cli.exit_codes": exit_codes,
    "metrics.all": metric_names,
    "metrics.engine": engine_events,
    "status.all": status,
    "status.history": history_columns,
    "reasons.programs": programs,
    "reasons.all": reasons,
    "reasons.causes": causes,
    "reasons.states": pair_states,
    "reasons.primary": lambda: diagram(Role.PRIMARY),
    "reasons.secondary": lambda: diagram(Role.SECONDARY),
    "messages.control": control_messages,
    "messages.datagram": datagram,
    "messages.flags": flags,
}


def render(text: str) -> str:
    """A page with its generated parts as the code has them now."""

    def part(m: re.Match[str]) -> str:
        return f"<!-- generated: {m[1]} -->\n{BLOCKS[m[1]]()}<!-- end -->\n"

    return MARK.sub(part, text)


def main() -> None:
    """Write all pages."""
    for page in sorted(PAGES.glob("*.md")):
        old = page.read_text()
        new = render(old)
        if new != old:
            page.write_text(new)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
