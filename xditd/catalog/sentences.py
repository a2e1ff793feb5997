"""How what a foreign file says of itself is put into sentences: short, printable, on one line.

Names of files and keys of tensors are written by strangers; a log line and a MessagePack string must bear them.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_SHOWN = 96


def shown(text: str) -> str:
    """The text as a sentence may hold it: escaped where it does not print, cut where it is long."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= MAX_SHOWN else plain[: MAX_SHOWN - 1] + "…"


def listed(texts: Iterable[str], most: int = 4) -> str:
    """The first few of them: "a, b, c and 12 more"."""
    names = [shown(text) for text in texts]
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def shape_of(shape: Iterable[int | str]) -> str:
    """A shape as people write it: [1, n, 4096]."""
    return f"[{', '.join(str(size) for size in shape)}]"
