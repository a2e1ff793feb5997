"""The header of a safetensors file, read strictly. The tensors' data is never read or mapped.

The format: 8 bytes with the header's length N (little-endian), N bytes of JSON that name every tensor's dtype,
shape and span, then the spans one after the other to the end of the file. Whatever is not exactly that is
refused, so that nobody who maps the file later meets bytes that are not there. Does not know what a model is.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta

from xditd.catalog.sentences import shown
from xditd.protocol.errors import Code, XditError

MAX_HEADER = 16 << 20
"""Bytes of JSON. The largest header of a known model has 1 MiB; the format itself allows 100 MB."""

MAX_TENSORS = 65536

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""The dtypes of the format, with bits per element."""

Offset = Annotated[int, Meta(ge=0, le=2**53)]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: by the format's name: "BF16", "F32", "F8_E4M3".
        shape: of a scalar: ().
        begin, end: bytes from the header's `data_offset`.
        scale: a single number that it is to be multiplied with (`catalog.quantised`); None is 1.
        file: index of its file, of a model in several.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    scale: TensorEntry | None = None
    file: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: by key, in the file's order.
        metadata: of the file's `__metadata__`.
        data_offset: bytes from the file's beginning to the tensors' data.
        bytes: of the whole file.
        name: what sentences call the file.
        files: of a model in several files, their names below its folder; () is one file.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_offset: int
    bytes: int
    name: str = "The file"
    files: tuple[str, ...] = ()


@contextmanager
def opened(path: str | os.PathLike[str], name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A model's file for reading, and its bytes.

    Args:
        name: what sentences call it.

    Raises:
        XditError: `model_not_visible` where it cannot be opened, `file_refused` for what is no regular file,
            `file_invalid` where it cannot be read.
    """
    try:
        # O_NONBLOCK: a FIFO in a model folder must not hold the daemon.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise XditError(
            Code.MODEL_NOT_VISIBLE,
            f"{name} cannot be opened: {error.strerror}; let the daemon's user read it.",
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise XditError(Code.FILE_REFUSED, f"{name} is not a regular file.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    except OSError as error:
        raise XditError(Code.FILE_INVALID, f"{name} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def read_header(path: str | os.PathLike[str], name: str = "") -> Header:
    """The header of a safetensors file.

    Args:
        path: of the file.
        name: what sentences call it; "" is the last part of its path.

    Raises:
        XditError: as `opened` does; `file_refused` for a pickle, `not_built` for GGUF, `file_invalid` for all else that is
            not a whole safetensors file.
    """
    name = shown(name or os.path.basename(os.fspath(path)))
    with opened(path, name) as (file, size):
        start = file.read(64)
        _refuse_foreign(name, start)
        length = _length(name, start, size)
        file.seek(8)
        text = file.read(length)
    if len(text) != length:
        raise XditError(Code.FILE_INVALID, f"{name} was cut short while it was read; try again.")
    return parse_header(name, text, size)


def parse_header(name: str, text: bytes, size: int) -> Header:
    """The header from its JSON.

    Args:
        name: of the file, for sentences.
        text: the JSON.
        size: bytes of the whole file.

    Raises:
        XditError: `file_invalid`.
    """
    tensors, metadata = _entries(name, text)
    data_offset = 8 + len(text)
    _check_spans(name, tensors, size - data_offset)
    return Header(tensors=tensors, metadata=metadata, data_offset=data_offset, bytes=size, name=name)


# ------------------------------------------------------------------------------------------- before the header


def _refuse_foreign(name: str, start: bytes) -> None:
    """Names what a file is instead: people do meet these under a .safetensors name."""
    pickled = start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if pickled and start[8:9] == b"{":
        return  # a header of 640, 896, 1152 or 1408 bytes begins as a pickle does
    if pickled or start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise XditError(
            Code.FILE_REFUSED,
            f"{name} is a pickle (.ckpt, .pt, .bin), which can run code when it is loaded; "
            "convert it to safetensors and load that.",
        )
    if start.startswith(b"GGUF"):
        raise XditError(
            Code.NOT_BUILT,
            f"{name} is a GGUF file; here a safetensors file is needed.",
        )
    if start.startswith(b"version https://git-lfs"):
        raise XditError(
            Code.FILE_INVALID,
            f"{name} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`.",
        )
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or start.lstrip()[:5].lower() == b"<html":
        raise XditError(
            Code.FILE_INVALID, f"{name} is a web page, not a model; its download failed: fetch it again."
        )


def _length(name: str, start: bytes, size: int) -> int:
    if size < 8:
        raise XditError(
            Code.FILE_INVALID, f"{name} has {size} bytes, which is no safetensors file; fetch it again."
        )
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise XditError(
            Code.FILE_INVALID,
            f"{name} is not a safetensors file, or its header of {length} bytes is over the limit of {MAX_HEADER}.",
        )
    if length < 2 or start[8:9] not in (b"{", b""):
        raise XditError(Code.FILE_INVALID, f"{name} is not a safetensors file: it has no JSON header.")
    if 8 + length > size:
        raise XditError(
            Code.FILE_INVALID,
            f"{name} is truncated: {8 + length - size} bytes of its header are missing; fetch it again.",
        )
    return length


# --------------------------------------------------------------------------------------------------- the header


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[Offset, ...], Meta(max_length=8)]
    data_offsets: tuple[Offset, Offset]


_raw_map = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry = msgspec.json.Decoder(_Entry)
_metadata = msgspec.json.Decoder(dict[str, str])


def _entries(name: str, text: bytes) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    key = ""
    try:
        raw = _raw_map.decode(text)
        if len(raw) > MAX_TENSORS:
            raise XditError(
                Code.FILE_INVALID, f"{name} names {len(raw)} tensors; at most {MAX_TENSORS} are taken."
            )
        metadata: dict[str, str] = {}
        tensors: dict[str, TensorEntry] = {}
        for key, value in raw.items():
            if key == "__metadata__":
                metadata = _metadata.decode(value)
            else:
                entry = _entry.decode(value)
                tensors[key] = TensorEntry(entry.dtype, entry.shape, *entry.data_offsets)
        # What is typed by now is small and flat, so the slower parser may look for keys that came twice.
        key = ""
        json.loads(text, object_pairs_hook=_unique)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        where = f" at {shown(key)}" if key else ""
        raise XditError(
            Code.FILE_INVALID, f"{name} has a malformed safetensors header{where}: {shown(str(error))}."
        ) from error
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"{shown(key)} is there twice")
        seen.add(key)


def _check_spans(name: str, tensors: Mapping[str, TensorEntry], available: int) -> None:
    """Every tensor as long as its shape says, each beginning where another ends, from the first byte to the last."""
    for key, entry in tensors.items():
        bits = BITS.get(entry.dtype)
        if bits is None:
            raise XditError(
                Code.FILE_INVALID, f"{name} has {shown(key)} of dtype {shown(entry.dtype)}, which is unknown."
            )
        if bits * entry.elements != 8 * (entry.end - entry.begin):
            raise XditError(
                Code.FILE_INVALID,
                f"{name} gives {shown(key)} {entry.end - entry.begin} bytes, but {entry.dtype} "
                f"{list(entry.shape)} needs {-(-bits * entry.elements // 8)}.",
            )
    expected = 0
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != expected:
            fault = "overlaps the tensor before it" if entry.begin < expected else "leaves a gap before it"
            raise XditError(Code.FILE_INVALID, f"{name} is malformed: {shown(key)} {fault}.")
        expected = entry.end
    if expected > available:
        raise XditError(
            Code.FILE_INVALID,
            f"{name} is truncated: {expected - available} bytes are missing; fetch it again.",
        )
    if expected < available:
        raise XditError(
            Code.FILE_INVALID,
            f"{name} has {available - expected} bytes after its last tensor; fetch it again.",
        )
