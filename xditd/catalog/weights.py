"""A model's weights as they lie on disk, by their headers alone: one safetensors file, one GGUF file, or a folder of shards."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from xditd.catalog import quantised
from xditd.catalog.gguf import MAGIC, read_gguf
from xditd.catalog.header import MAX_HEADER, Header, TensorEntry, opened, read_header
from xditd.catalog.pipelines import marks
from xditd.catalog.sentences import shown
from xditd.protocol.errors import Code, XditError
from xditd.protocol.folders import INDEX

MAX_SHARDS = 1000


def read_weights(path: str | os.PathLike[str], name: str = "") -> Header:
    """The header of a model's file, or of all files of a folder as if they were one.

    Weights of scaled fp8 know their scales.

    Args:
        path: of the file or the folder.
        name: what sentences call it; "" is the last part of its path.

    Raises:
        XditError: what `read_header`, `read_gguf` and `quantised.plain` raise; `file_invalid` for a folder whose index
            and shards do not agree.
    """
    name = shown(name or os.path.basename(os.fspath(path)))
    return quantised.plain(_read(path, name))


def _read(path: str | os.PathLike[str], name: str) -> Header:
    if os.path.isdir(path):
        return _read_folder(os.fspath(path), name)
    with opened(path, name) as (file, size):
        if file.read(len(MAGIC)) == MAGIC:
            file.seek(0)
            return read_gguf(file, size, name)
    return read_header(path, name)


def _read_folder(folder: str, name: str) -> Header:
    """The files of a folder, with offsets from the beginning of each."""
    where = _index(folder, name)
    files = tuple(sorted(set(where.values()))) if where else _only(folder, name)
    tensors: dict[str, TensorEntry] = {}
    total = 0
    for number, file in enumerate(files):
        if not os.path.exists(os.path.join(folder, file)):
            raise XditError(
                Code.FILE_INVALID, f"{name} lacks {shown(file)}, which its index names; fetch it again."
            )
        header = read_header(os.path.join(folder, file), f"{name}/{file}")
        total += header.bytes
        for key, entry in header.tensors.items():
            if where and where.get(key) != file:
                continue  # a shard may hold what the index has in another
            begin, end = header.data_offset + entry.begin, header.data_offset + entry.end
            tensors[key] = replace(entry, begin=begin, end=end, file=number)
    missing = [key for key in where if key not in tensors]
    if missing:
        raise XditError(
            Code.FILE_INVALID,
            f"{name} lacks {shown(missing[0])}, which its index has in {shown(where[missing[0]])}; fetch it again.",
        )
    return Header(
        tensors=tensors, metadata=marks(folder, name), data_offset=0, bytes=total, name=name, files=files
    )


def _index(folder: str, name: str) -> dict[str, str]:
    """By key: the shard that has it; {} where the folder has no index.

    Raises:
        XditError: `file_invalid` for an index that is none, or that leads out of the folder.
    """
    found = sorted(file for file in os.listdir(folder) if file.endswith(INDEX))
    if not found:
        return {}
    with opened(os.path.join(folder, found[0]), f"{name}/{found[0]}") as (file, _):
        text = file.read(MAX_HEADER)
    try:
        table: Any = json.loads(text)["weight_map"]
        where = {str(key): str(shard) for key, shard in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise XditError(
            Code.FILE_INVALID, f"{name}/{found[0]} is no index of shards; fetch it again."
        ) from error
    strange = [
        shard
        for shard in where.values()
        if os.path.basename(shard) != shard or not shard.endswith(".safetensors")
    ]
    if strange or len(set(where.values())) > MAX_SHARDS:
        raise XditError(
            Code.FILE_INVALID,
            f"{name}/{found[0]} names {shown(strange[0]) if strange else 'too many files'}, which is no shard beside it.",
        )
    return where


def _only(folder: str, name: str) -> tuple[str, ...]:
    """The one safetensors file of a folder without an index; where there are variants, the one without."""
    files = sorted(file for file in os.listdir(folder) if file.endswith(".safetensors"))
    plain = [file for file in files if file.count(".") == 1]
    chosen = plain if len(plain) == 1 else files
    if len(chosen) != 1:
        what = "no safetensors file" if not chosen else f"{len(chosen)} safetensors files and no index"
        raise XditError(
            Code.FILE_INVALID, f"{name} is a folder with {what}; choose a file, or fetch it again."
        )
    return tuple(chosen)
