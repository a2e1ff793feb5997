"""A model's parameters held against the shapes that its facts demand: all there, none odd, none unknown.

A family writes its shapes down as a table; the checks here are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.header import Header
from xditd.catalog.sentences import listed, shape_of, shown
from xditd.protocol.errors import Code, XditError

Shapes = Mapping[str, tuple[int, ...]]
"""By key, without prefix."""


def shape(header: Header, key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of one parameter, which must be there and have that many dimensions.

    Raises:
        XditError: `file_invalid`.
    """
    entry = header.tensors.get(key)
    if entry is None:
        raise XditError(Code.FILE_INVALID, f"{header.name} lacks {shown(key)}; fetch it again.")
    if len(entry.shape) != dimensions:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {shown(key)} has shape {shape_of(entry.shape)}; it must have {dimensions} dimensions.",
        )
    if 0 in entry.shape:
        raise XditError(Code.FILE_INVALID, f"{header.name}: {shown(key)} is empty; fetch it again.")
    return entry.shape


def has(header: Header, start: str) -> bool:
    """Whether there is any parameter below a key: of a module that a model may have, all of it must be there."""
    return any(key.startswith(start) for key in header.tensors)


MAX_SIDE = 4096
"""Of a square of positions; the largest known is 384."""


def side(header: Header, key: str, places: int) -> int:
    """The side of a square of so many places.

    Raises:
        XditError: `file_invalid` where they are no square.
    """
    # Counted: the root of a number from a file may be anything.
    found = next((side for side in range(1, MAX_SIDE + 1) if side * side >= places), 0)
    if found * found != places:
        raise XditError(
            Code.FILE_INVALID, f"{header.name}: {shown(key)} has {places} positions, which are no square."
        )
    return found


def count(header: Header, start: str, most: int) -> int:
    """How many numbered modules there are below a key: 0 to n - 1, at least one.

    Raises:
        XditError: `file_invalid` where one is missing, or where there are more than any such model has.
    """
    numbers = {key[len(start) :].partition(".")[0] for key in header.tensors if key.startswith(start)}
    if len(numbers) > most:
        raise XditError(
            Code.FILE_INVALID, f"{header.name} has {len(numbers)} {start}*; {most} are taken at most."
        )
    for i in range(max(1, len(numbers))):
        if str(i) not in numbers:
            raise XditError(Code.FILE_INVALID, f"{header.name} lacks {start}{i}; fetch it again.")
    return len(numbers)


def check_shapes(
    header: Header, prefix: str, shapes: Shapes, label: str, ignored: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Every parameter there, with its shape, in a dtype that loads; nothing else among the model's modules.

    Args:
        header: of the file.
        prefix: of the model's keys in it.
        shapes: every parameter of the model.
        label: what the model is, for sentences.
        ignored: keys without prefix that may be there as well and are not read.

    Returns:
        The file's keys of the model, with the prefix.

    Raises:
        XditError: `file_invalid` for a missing parameter or an odd shape, `not_built` for parameters that the
            family has not (quantised and extended models) or dtypes that the ranks do not load.
    """
    modules = {key.partition(".")[0] for key in shapes}
    unknown = [
        key
        for key in header.tensors
        if key.startswith(prefix)
        and key[len(prefix) :].partition(".")[0] in modules
        and key[len(prefix) :] not in shapes
        and key[len(prefix) :] not in ignored
    ]
    _check_dtypes(header, prefix, shapes, label)
    for key, expected in shapes.items():
        entry = header.tensors.get(prefix + key)
        if entry is None:
            raise XditError(
                Code.FILE_INVALID, f"{header.name} is {label}, but lacks {prefix + key}; fetch it again."
            )
        if entry.shape != expected:
            raise XditError(
                Code.FILE_INVALID,
                f"{header.name}: {prefix + key} has shape {shape_of(entry.shape)}, but the rest of the file asks for "
                f"{shape_of(expected)}.",
            )
    if unknown:
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is {label} with parameters that this version does not know: {listed(unknown)}.",
        )
    return frozenset(prefix + key for key in shapes)


LOADABLE = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""The dtypes of files that the ranks load, with torch's names. What nothing computes in is converted at loading."""


BLOCKS = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
"""GGUF's types that several elements share a block of: they load too."""


def _check_dtypes(header: Header, prefix: str, shapes: Shapes, label: str) -> None:
    for key in shapes:
        entry = header.tensors.get(prefix + key)
        if entry is not None and entry.dtype not in (*LOADABLE, *BLOCKS):
            raise XditError(
                Code.NOT_BUILT,
                f"{header.name} is {label} in {entry.dtype} (quantised), which this version does not load; use its bf16 "
                "or fp16 file.",
            )
