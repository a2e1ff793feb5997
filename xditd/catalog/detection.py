"""From a header to what the file is: family, variant, dtype and facts, or a refusal that names what it is instead.

Pure: it is handed a header and opens nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from xditd.catalog.families import FAMILIES, known
from xditd.catalog.families.expected import LOADABLE
from xditd.catalog.header import Header, TensorEntry
from xditd.catalog.layouts import named
from xditd.catalog.sentences import listed
from xditd.protocol.errors import Code, XditError

PREFIXES: dict[str, tuple[str, ...]] = {
    "transformer": ("", "model.diffusion_model.", "model."),
    "vae": ("", "first_stage_model.", "vae."),
    "text_encoder": ("",),
    "clip_l": ("text_encoders.clip_l.transformer.", "conditioner.embedders.0.transformer."),
    "clip_g": ("text_encoders.clip_g.transformer.", "conditioner.embedders.1.model."),
    "t5xxl": ("text_encoders.t5xxl.transformer.",),
    "hydit_clip": ("text_encoders.hydit_clip.transformer.",),
    "mt5xl": ("text_encoders.mt5xl.transformer.",),
}
"""By part: what a file may put before the keys of that part. All-in-one checkpoints have all but the first."""

ROLES = dict.fromkeys(("clip_l", "clip_g", "t5xxl", "hydit_clip", "mt5xl"), "text_encoder")
"""What parts are that a checkpoint has several of; any other part is what its name says (`Family.part`)."""

RUNS = "this version runs Flux, SD3, PixArt and HunyuanDiT transformers, SDXL UNets, AutoencoderKL VAEs, and CLIP, T5 and BERT text encoders"

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True, slots=True)
class Recognised:
    """One part of a file. `dtype` is that of most of its parameters, by torch's name; `below` is the folder of the part,
    below that of its pipeline."""

    family: str
    variant: str
    dtype: str
    parameters: int
    prefix: str
    facts: dict[str, int] = field(default_factory=dict)
    below: str = ""


def recognise(header: Header, part: str) -> Recognised:
    """What the file holds as that part.

    Args:
        header: of the file.
        part: one of PREFIXES.

    Raises:
        XditError: `not_built` for a known kind of model that this version does not run, `unknown_family` for an
            unknown one or where the file has no such part, `file_invalid` where keys and shapes contradict.
    """
    if _SHARD.search(header.name):
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is one of several shards; name the folder that it lies in, with its index.",
        )
    lookalike = known.name_of(header, PREFIXES[part], known.LOOKALIKES)
    if lookalike:
        raise _not_built(header, lookalike)
    for name, family in FAMILIES.items():
        if family.part != role(part):
            continue
        for prefix in PREFIXES[part]:
            found = named.detect(family, header, prefix)
            if found is not None:
                entries = [header.tensors[key] for key in found.keys]
                return Recognised(
                    family=name,
                    variant=found.variant,
                    dtype=dtype_of(entries),
                    parameters=sum(entry.elements for entry in entries),
                    prefix=prefix,
                    facts=found.facts,
                )
    other = known.name_of(header, PREFIXES[part], known.OTHERS)
    if other:
        raise _not_built(header, other)
    raise _unknown(header, part)


def prefixes(header: Header, part: str) -> tuple[str, ...]:
    """What may be before the keys of a part: nothing, too, where the part has a folder of its own."""
    return ("", *PREFIXES[part]) if header.files else PREFIXES[part]


def role(part: str) -> str:
    """What a part is in the making of a picture: "transformer", "vae" or "text_encoder"."""
    return ROLES.get(part, part)


def dtype_of(entries: Iterable[TensorEntry]) -> str:
    """That of most of the elements, by torch's name."""
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry.dtype] += entry.elements
    most = counts.most_common(1)[0][0]
    return LOADABLE.get(most, most)


def _not_built(header: Header, other: str) -> XditError:
    return XditError(Code.NOT_BUILT, f"{header.name} is {other}; {RUNS}.")


def _unknown(header: Header, part: str) -> XditError:
    """Nothing of that part: perhaps another part, perhaps nothing we know."""
    for other, prefixes in PREFIXES.items():
        if other == part:
            continue
        label = known.name_of(header, prefixes) or _holds(header, other)
        if label:
            return XditError(Code.UNKNOWN_FAMILY, f"{header.name} holds {label}, and no {part}.")
    return XditError(
        Code.UNKNOWN_FAMILY,
        f"{header.name} is of no family that this version knows, by its keys "
        f"({listed(header.tensors) or 'it has none'}); {RUNS}.",
    )


def _holds(header: Header, part: str) -> str:
    for family in FAMILIES.values():
        if family.part == role(part):
            for prefix in PREFIXES[part]:
                try:
                    if named.detect(family, header, prefix) is not None:
                        return family.label
                except XditError:
                    return family.label  # a broken one is one all the same
    return ""
