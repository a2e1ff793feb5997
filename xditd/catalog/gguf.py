"""The header of a GGUF file, read strictly. The tensors' data is never read or mapped.

The format (github.com/ggml-org/ggml, docs/gguf.md): magic, version, numbers of tensors and of key-values; the key-values;
of each tensor name, sizes (the innermost first), type and offset; then, aligned, the data. Diffusion models keep their
makers' names for tensors in it; T5 has llama.cpp's, which are changed back here. Does not know what a model is.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from xditd.catalog.header import MAX_TENSORS, Header, TensorEntry
from xditd.catalog.sentences import shown
from xditd.protocol.errors import Code, XditError

MAGIC = b"GGUF"
MAX_TEXT = 1 << 20  # bytes; a tokenizer's words are many, and each is short
MAX_ITEMS = 1 << 20  # of an array
MAX_VALUES = 4096  # key-values

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
"""By the format's number: a type's name, how many elements a block of it has, and in how many bytes."""

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""By the format's number: a key-value's type, as struct has it. 8 is text, 9 an array."""

ORIGINAL = "comfy.gguf.orig_shape."
"""Begins the key of the shape that a tensor had, where the file's blocks do not divide its rows."""

T5 = (
    (re.compile(r"^enc\.blk\.(\d+)\.attn_([qkvo])\."), r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        re.compile(r"^enc\.blk\.(\d+)\.attn_rel_b\."),
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (re.compile(r"^enc\.blk\.(\d+)\.attn_norm\."), r"encoder.block.\1.layer.0.layer_norm."),
    (re.compile(r"^enc\.blk\.(\d+)\.ffn_gate\."), r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (re.compile(r"^enc\.blk\.(\d+)\.ffn_up\."), r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (re.compile(r"^enc\.blk\.(\d+)\.ffn_down\."), r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (re.compile(r"^enc\.blk\.(\d+)\.ffn_norm\."), r"encoder.block.\1.layer.1.layer_norm."),
    (re.compile(r"^enc\.output_norm\."), "encoder.final_layer_norm."),
    (re.compile(r"^token_embd\."), "shared."),
)
"""llama.cpp's names for T5's encoder, and those that its makers gave."""


class _Cut(Exception):
    """The file ends within its header."""


@dataclass(slots=True)
class _Reader:
    file: BinaryIO

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise _Cut
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > MAX_TEXT:
            raise ValueError(f"a text of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == 8:
            return self.text()
        if kind != 9:
            if kind not in SCALARS:
                raise ValueError(f"a value of type {kind}")
            return self.number(SCALARS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if count > MAX_ITEMS or depth > 2:
            raise ValueError(f"an array of {count}")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf(file: BinaryIO, size: int, name: str) -> Header:
    """The header of an open GGUF file, from its beginning.

    Args:
        file: at its first byte.
        size: bytes of the whole file.
        name: what sentences call it.

    Raises:
        XditError: `file_invalid`; `not_built` for another version of the format, or a type of weights that is not loaded.
    """
    reader = _Reader(file)
    try:
        return _read(reader, size, name)
    except _Cut as error:
        raise XditError(
            Code.FILE_INVALID, f"{name} is truncated: it ends within its header; fetch it again."
        ) from error
    except ValueError as error:
        raise XditError(
            Code.FILE_INVALID, f"{name} has a malformed GGUF header: {shown(str(error))}; fetch it again."
        ) from error


def _read(reader: _Reader, size: int, name: str) -> Header:
    reader.take(len(MAGIC))
    version, tensors, values = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in (2, 3):
        raise XditError(
            Code.NOT_BUILT,
            f"{name} is a GGUF file of version {version}; versions 2 and 3 are read: convert it anew.",
        )
    if tensors > MAX_TENSORS or values > MAX_VALUES:
        raise ValueError(f"{tensors} tensors and {values} values")
    metadata = {reader.text(): reader.value(reader.number("<I")) for _ in range(values)}
    entries: dict[str, TensorEntry] = {}
    for _ in range(tensors):
        key, entry = _tensor(reader, metadata, name)
        if key in entries:
            raise ValueError(f"{key} is there twice")
        entries[key] = entry
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
        raise ValueError(f"an alignment of {alignment}")
    offset = -(-reader.file.tell() // alignment) * alignment
    missing = offset + max((entry.end for entry in entries.values()), default=0) - size
    if missing > 0:
        raise XditError(
            Code.FILE_INVALID, f"{name} is truncated: {missing} bytes are missing; fetch it again."
        )
    return Header(
        tensors=_renamed(entries, metadata.get("general.architecture")),
        metadata={key: value for key, value in metadata.items() if isinstance(value, str)},
        data_offset=offset,
        bytes=size,
        name=name,
    )


def _tensor(reader: _Reader, metadata: Mapping[str, Any], name: str) -> tuple[str, TensorEntry]:
    key, dimensions = reader.text(), reader.number("<I")
    if dimensions > 8:
        raise ValueError(f"{key} has {dimensions} dimensions")
    sizes = [reader.number("<Q") for _ in range(dimensions)]
    kind, begin = reader.number("<I"), reader.number("<Q")
    if kind not in TYPES:
        raise XditError(
            Code.NOT_BUILT,
            f"{name} has {shown(key)} in GGUF's type {kind}, which this version does not load; it loads "
            f"{', '.join(label for label, _, _ in TYPES.values())}.",
        )
    label, block, nbytes = TYPES[kind]
    elements = math.prod(sizes)
    if (sizes and sizes[0] % block) or begin > 2**53 or elements > 2**53:
        raise ValueError(f"{key} of {sizes} has no whole blocks of {label}")
    shape = tuple(reversed(sizes))
    original = metadata.get(ORIGINAL + key)
    if isinstance(original, list) and all(isinstance(size, int) for size in original):
        if math.prod(original) != elements:
            raise ValueError(f"{key} had {original}, which is not {elements} elements")
        shape = tuple(original)
    return key, TensorEntry(label, shape, begin, begin + elements // block * nbytes)


def _renamed(entries: dict[str, TensorEntry], architecture: object) -> dict[str, TensorEntry]:
    if architecture not in ("t5", "t5encoder"):
        return entries
    renamed = {}
    for key, entry in entries.items():
        for pattern, replacement in T5:
            key = pattern.sub(replacement, key)
        renamed[key] = entry
    return renamed
