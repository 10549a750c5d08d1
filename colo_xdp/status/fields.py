# SPDX-License-Identifier: GPL-2.0-or-later
"""Kinds of values in the status document: the type of each, its meaning and its check. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


class StatusError(ValueError):
    """The document is malformed; the text names the key."""


def wrong(key: str, want: str, value: Any) -> StatusError:
    """Return the error that names a key and what its value had to be."""
    shown = repr(value)
    return StatusError(f"{key}: expected {want}, got {shown[:60]}")


@dataclass(frozen=True, slots=True)
class Field:
    """A value of the document: its type, its meaning and its check.

    `keys` are the fields of an object, `items` describes the elements of a list and the values of
    a map. tests/docs/generate.py makes docs/reference/status.md of these.
    """

    type: str
    meaning: str
    check: Callable[[str, Any], None]
    keys: Mapping[str, Field] = field(default_factory=dict)
    items: Field | None = None


def text(meaning: str = "") -> Field:
    """Any string."""

    def check(key: str, v: Any) -> None:
        if not isinstance(v, str):
            raise wrong(key, "a string", v)

    return Field("string", meaning, check)


def one_of(names: Iterable[str], meaning: str) -> Field:
    """One of these strings."""
    values = tuple(names)

    def check(key: str, v: Any) -> None:
        if not isinstance(v, str) or v not in values:
            raise wrong(key, "one of " + ", ".join(values), v)

    return Field(", ".join(f'"{n}"' for n in values), meaning, check)


def count(meaning: str = "") -> Field:
    """An integer that is not negative."""

    def check(key: str, v: Any) -> None:
        if type(v) is not int or v < 0:
            raise wrong(key, "a count", v)

    return Field("count", meaning, check)


def number(meaning: str) -> Field:
    """A finite number."""

    def check(key: str, v: Any) -> None:
        if type(v) not in (int, float) or not math.isfinite(v):
            raise wrong(key, "a finite number", v)

    return Field("number", meaning, check)


def flag(meaning: str) -> Field:
    """True or false."""

    def check(key: str, v: Any) -> None:
        if not isinstance(v, bool):
            raise wrong(key, "true or false", v)

    return Field("boolean", meaning, check)


def hexadecimal(meaning: str) -> Field:
    """Bytes, as a string of hexadecimal digits."""
    string = text()

    def check(key: str, v: Any) -> None:
        string.check(key, v)
        try:
            bytes.fromhex(v)
        except ValueError:
            raise wrong(key, "bytes in hexadecimal", v) from None

    return Field("bytes in hexadecimal", meaning, check)


def or_null(inner: Field) -> Field:
    """The same, or null."""

    def check(key: str, v: Any) -> None:
        if v is not None:
            inner.check(key, v)

    return Field(f"{inner.type} or null", inner.meaning, check, inner.keys)


def object_of(meaning: str, **keys: Field) -> Field:
    """An object with at least these keys."""

    def check(key: str, v: Any) -> None:
        if not isinstance(v, dict):
            raise wrong(key, "an object", v)
        for k, inner in keys.items():
            name = f"{key}.{k}" if key else k
            if k not in v:
                raise StatusError(f"{name}: missing")
            inner.check(name, v[k])

    return Field("object", meaning, check, keys)


def map_of(meaning: str, inner: Field) -> Field:
    """An object with any keys, all values alike."""
    string = text()

    def check(key: str, v: Any) -> None:
        if not isinstance(v, dict):
            raise wrong(key, "an object", v)
        for k, item in v.items():
            string.check(f"{key} (a key)", k)
            inner.check(f"{key}.{k}", item)

    return Field("map", meaning, check, items=inner)


def list_of(meaning: str, inner: Field, length: int | None = None) -> Field:
    """A list, all elements alike."""

    def check(key: str, v: Any) -> None:
        if not isinstance(v, list):
            raise wrong(key, "a list", v)
        if length is not None and len(v) != length:
            raise StatusError(f"{key}: expected {length} entries, got {len(v)}")
        for i, item in enumerate(v):
            inner.check(f"{key}[{i}]", item)

    return Field("list" if length is None else f"list of {length}", meaning, check, items=inner)
