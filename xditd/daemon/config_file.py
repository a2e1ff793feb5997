"""A TOML file and a struct that says what may be in it: units resolved, misspelt keys refused.

Knows nothing of what the keys mean. A struct's field asks for a unit through `Meta(extra={"unit": …})`:
"bytes", "seconds", "keep" (seconds, "forever" or "never"), "sleep" (seconds or "never") or "path".
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from xditd.protocol.errors import Code, XditError

_KEEP = {"forever": math.inf, "never": 0.0}


def read_toml(path: Path) -> dict[str, Any]:
    """The plain content of a file.

    Raises:
        XditError: `bad_config` where there is none, it cannot be read, or it is not TOML.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise XditError(Code.BAD_CONFIG, f"There is no configuration file {path}.") from error
    except OSError as error:
        raise XditError(
            Code.BAD_CONFIG, f"The configuration file {path} cannot be read: {error.strerror}."
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise XditError(Code.BAD_CONFIG, f"{path} is not TOML: {error}.") from error


def resolve(plain: Mapping[str, Any], struct: type[Struct], where: str, base: Path) -> dict[str, Any]:
    """The same tables with sizes, durations and paths resolved; types are left for `msgspec.convert` to check.

    Args:
        plain: what the file says.
        struct: what may be in it.
        where: the file's name, for sentences.
        base: the folder that relative paths begin at.

    Raises:
        XditError: `bad_config` for a key that is not one and for a value that is not of its unit.
    """
    return _table(plain, struct, "", _Reading(struct, where, base))


def known_keys(struct: type[Struct], prefix: str = "") -> dict[str, Any]:
    """Every key that a file may set, dotted, with its default. Keys within lists of tables are not among them."""
    keys: dict[str, Any] = {}
    for entry in msgspec.structs.fields(struct):
        dotted = prefix + entry.name
        if isinstance(entry.type, type) and issubclass(entry.type, Struct):
            keys |= known_keys(entry.type, dotted + ".")
        elif entry.default_factory is not msgspec.NODEFAULT:
            keys[dotted] = entry.default_factory()
        else:
            keys[dotted] = entry.default
    return keys


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of dotted keys: {"devices.kind": "cpu"} is {"devices": {"kind": "cpu"}}."""
    tables: dict[str, Any] = {}
    for dotted, value in flat.items():
        *path, last = dotted.split(".")
        table = tables
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    return tables


def merge(into: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Puts the second's values into the first, table by table; lists are replaced whole."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def parse_size(text: str) -> int:
    """Bytes of "1.5GiB", "256 MiB", "4096" (binary units) or "2GB" (decimal ones).

    Raises:
        ValueError: where it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError('is not a size: write bytes, "256MiB" or "4GiB"')
    number, letter, binary = match.groups()
    power = " KMGT".index(letter.upper()) if letter else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_seconds(text: str) -> float:
    """Seconds of "250ms", "90s", "5min", "2h" or "90".

    Raises:
        ValueError: where it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|h|)\s*", text)
    if not match:
        raise ValueError('is not a duration: write seconds, "90s", "5min" or "2h"')
    return float(match[1]) * {"ms": 0.001, "": 1, "s": 1, "min": 60, "h": 3600}[match[2]]


def sentence(error: str) -> str:
    """A validation error of msgspec, with the key first: "devices.cpu_ranks: expected `int` >= 1"."""
    match = re.fullmatch(r"(.*?) - at (?:the )?`(?:key in )?\$\.?(.*)`", error, re.DOTALL)
    if not match or not match[2]:
        return error.split(" - at ")[0]
    said = match[1].replace("`object`", "a table").replace("`array`", "a list")
    return f"{match[2]}: {said[0].lower()}{said[1:]}"


# ---------------------------------------------------------------------------------------------- the walk itself


class _Reading:
    """What every level of one walk needs."""

    __slots__ = ("base", "known", "where")

    def __init__(self, struct: type[Struct], where: str, base: Path) -> None:
        self.known = known_keys(struct)
        self.where = where
        self.base = base

    def convert(self, text: str, unit: str) -> Any:
        if unit == "bytes":
            return parse_size(text)
        if unit == "seconds":
            return parse_seconds(text)
        if unit == "keep":
            return _KEEP[text] if text in _KEEP else parse_seconds(text)
        if unit == "sleep":
            return math.inf if text == "never" else parse_seconds(text)
        return str(self.base / Path(text).expanduser()) if text else ""


def _table(plain: Mapping[str, Any], struct: type[Struct], prefix: str, reading: _Reading) -> dict[str, Any]:
    hints = get_type_hints(struct, include_extras=True)
    ready = {}
    for key, value in plain.items():
        if key not in hints:
            raise XditError(Code.BAD_CONFIG, _unknown(prefix, key, list(hints), reading))
        ready[key] = _value(value, hints[key], prefix + key, reading)
    return ready


def _value(value: Any, hint: Any, dotted: str, reading: _Reading) -> Any:
    if isinstance(value, dict):
        if isinstance(hint, type) and issubclass(hint, Struct):
            return _table(value, hint, dotted + ".", reading)
        inner = get_args(hint)
        return (
            {k: _value(v, inner[1], f"{dotted}.{k}", reading) for k, v in value.items()} if inner else value
        )
    if isinstance(value, list):
        inner = get_args(hint)
        return (
            [_value(v, inner[0], f"{dotted}[{i}]", reading) for i, v in enumerate(value)] if inner else value
        )
    if get_origin(hint) is Literal and value not in get_args(hint):
        choices = ", ".join(repr(choice) for choice in get_args(hint))
        raise XditError(Code.BAD_CONFIG, f"{reading.where}: {dotted} = {value!r} is none of {choices}.")
    unit = next((meta.extra["unit"] for meta in getattr(hint, "__metadata__", ()) if meta.extra), "")
    if isinstance(value, str) and unit:
        try:
            return reading.convert(value, unit)
        except ValueError as error:
            raise XditError(Code.BAD_CONFIG, f"{reading.where}: {dotted} = {value!r} {error}.") from error
    return value


def _unknown(prefix: str, key: str, siblings: list[str], reading: _Reading) -> str:
    """One sentence: the key, the file, and the key that was probably meant."""
    near = difflib.get_close_matches(key, siblings, n=1)
    meant = prefix + near[0] if near else ""
    if not meant:  # the right key in the wrong table, or the wrong key altogether
        by_name = {dotted.rpartition(".")[2]: dotted for dotted in reversed(list(reading.known))}
        near = difflib.get_close_matches(key, list(by_name), n=1)
        if near:
            meant = by_name[near[0]]
    if meant:
        return f"{reading.where}: there is no key {prefix}{key}; did you mean {meant}?"
    return f"{reading.where}: there is no key {prefix}{key}; here may stand {', '.join(siblings)}."
