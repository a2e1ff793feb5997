"""Files in diffusers' layout, whose keys are the network's own names: detected by what the makers' file would say.

The header is translated to the makers' keys, of shapes alone, and the family's own `detect` finds its facts there: so
there is one place that knows what a family is, and what of it is refused. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from xditd.catalog.families.expected import check_shapes
from xditd.catalog.families.family import Detected, Family
from xditd.catalog.header import Header, TensorEntry
from xditd.catalog.layouts import LAYOUTS, Layout
from xditd.catalog.layouts.piece import Piece
from xditd.catalog.sentences import listed, shown
from xditd.protocol.errors import Code, XditError

IGNORED = frozenset({"pos_embed.pos_embed"})
"""Positions that older PixArt files carry, which follow from the latent's size."""

MARKS = ("v_pred", "ztsnr")
"""Keys without a value that the makers' files say with what diffusers writes into a scheduler's configuration
(`catalog.pipelines`), and a header's metadata here."""


def detect(family: Family, header: Header, prefix: str) -> Detected | None:
    """What a file holds under a prefix in either layout, or None where it is not of the family.

    Raises:
        XditError: what the family's own `detect` raises, of diffusers' names as well.
    """
    found = family.detect(header, prefix)
    layout = LAYOUTS.get(family.name)
    if found is not None or layout is None or prefix:
        return found
    sketch = layout.sketch(header)
    if sketch is None:
        return None
    pieces = layout.pieces(sketch, "")
    names = {name: _key(name, header, layout) for name in pieces}
    missing = [key for key in names.values() if key not in header.tensors]
    if missing:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name} is {family.label} in diffusers' layout, but lacks {listed(missing)}; fetch it again.",
        )
    found = family.detect(_translated(header, names, pieces), "")
    if found is None:
        return None
    shapes = layout.parameters(found.facts)
    expected = {
        names[name]: piece.shape(shapes[piece.key]) for name, piece in layout.pieces(found.facts, "").items()
    }
    keys = check_shapes(header, "", expected, f"{family.label} in diffusers' layout", IGNORED)
    return replace(found, keys=keys, names=names)


def _key(name: str, header: Header, layout: Layout) -> str:
    """The file's key for a parameter of the network."""
    if name in header.tensors:
        return name
    for ours, theirs in layout.renamed.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


def _translated(header: Header, names: Mapping[str, str], pieces: Mapping[str, Piece]) -> Header:
    """The header that a file of the makers' would have. What it holds as one is as long as the parts together."""
    tensors = {key: TensorEntry("F32", (0,), 0, 0) for key in MARKS if key in header.metadata}
    for name, piece in pieces.items():
        entry = header.tensors[names[name]]
        if not entry.shape:
            raise XditError(
                Code.FILE_INVALID, f"{header.name}: {shown(names[name])} is a single number; fetch it again."
            )
        before = tensors.get(piece.key)
        first = entry.shape[0] + (before.shape[0] if before is not None else 0)
        rest = entry.shape[1:] + ((1, 1) if piece.squeezed else ())
        tensors[piece.key] = TensorEntry(entry.dtype, (first, *rest), 0, 0)
    return replace(header, tensors=tensors, name=f"{header.name} (in its makers' names)")
