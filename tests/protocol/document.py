"""protocol.md as a test reads it: sections by their names, and the tables in them; and structs as it would spell them."""

from __future__ import annotations

import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

PATH = Path(__file__).parents[2] / "protocol.md"

Row = dict[str, str]


@dataclass(slots=True)
class Section:
    """What stands under one heading. A row is a table's line by the table's column names."""

    title: str
    text: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def read(text: str) -> dict[str, Section]:
    """Every section by its heading, without the heading's backticks. Headings are unique."""
    sections: dict[str, Section] = {}
    section = Section("")
    columns: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            title = line.lstrip("#").strip().strip("`")
            if title in sections:
                raise ValueError(f"two sections are called {title}")
            section = sections[title] = Section(title)
        section.text.append(line)
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not columns:
            columns = cells
        elif set(line) - set("|-: "):
            section.rows.append(dict(zip(columns, cells, strict=True)))
    return sections


def name_of(struct: type[Struct]) -> str:
    """The heading of a struct: its `type` on the wire, else its own name."""
    return struct.__struct_config__.tag or struct.__name__


def fields_of(struct: type[Struct]) -> list[tuple[str, str, str]]:
    """Name, type and default of every field, as the document spells them."""
    hints = get_type_hints(struct, include_extras=True)
    return [
        (entry.name, spell(hints[entry.name]), default(entry)) for entry in msgspec.structs.fields(struct)
    ]


def default(entry: Any) -> str:
    if entry.required:
        return "–"
    if entry.default_factory is not msgspec.NODEFAULT:
        return "{}"
    value = entry.default
    if value is None:
        return "nil"
    if isinstance(value, bool):
        return str(value).lower()
    if value == ():
        return "[]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def spell(hint: Any, meta: Meta | None = None) -> str:
    """A type in words: "int 0…2^53", "list of Tensor", "map of text to number"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return spell(arguments[0], arguments[1])
    if origin in (Union, types.UnionType):
        return " or ".join(spell(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_count(meta)}{spell(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(spell(argument) for argument in arguments)}]"
    if origin is dict:
        return f"map of {spell(arguments[0])} to {spell(arguments[1])}"
    if hint is int and meta is not None:
        return f"int ≥ {meta.ge}" if meta.le is None else f"int {meta.ge}…{_power(meta.le)}"
    if hint is str and meta is not None:
        return (
            f"text of {meta.min_length}–{meta.max_length}"
            if meta.min_length
            else f"text of ≤ {meta.max_length}"
        )
    plain = {type(None): "nil", Any: "any", bool: "bool", int: "int", float: "number", str: "text"}
    return plain.get(hint) or hint.__name__


def _count(meta: Meta | None) -> str:
    if meta is None:
        return ""
    return f"{meta.min_length}–{meta.max_length} " if meta.min_length else f"≤ {meta.max_length} "


def _power(number: float) -> str:
    exact = int(number)
    return f"2^{exact.bit_length() - 1}" if exact > 1024 and exact & (exact - 1) == 0 else str(exact)
