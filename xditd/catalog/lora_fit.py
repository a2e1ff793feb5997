"""Which weights of a model a LoRA's file changes: its names for modules, of whichever trainer, found in both layouts. Pure.

A module is called by its makers' name or by diffusers', with dots or with underscores in their place, behind one of a
few prefixes. So all names are brought to one form, and looked up in one table of both layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from xditd.catalog import lora_file
from xditd.catalog.detection import Recognised, dtype_of
from xditd.catalog.header import Header
from xditd.catalog.layouts import LAYOUTS
from xditd.catalog.sentences import listed, shape_of, shown
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import ITEMSIZE

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "unet.",
    "model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
"""What trainers put before a module's name, one or several after the other."""

ALIASES = {
    "add_embedding_linear_1": "class_embedding_linear_1",
    "add_embedding_linear_2": "class_embedding_linear_2",
}
"""Names that diffusers' pipelines have for modules that its networks call otherwise here (SDXL's vector)."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter that a module's weight is, or that has some of its rows.

    Attributes:
        parameter: by the network's name for it.
        rows: of the module's weight, from and up to; None is all.
        swapped: the halves of those change places.
    """

    parameter: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What one pair does to one parameter."""

    pair: lora_file.Pair
    target: Target


@dataclass(frozen=True, slots=True)
class Fit:
    """What a LoRA's file does to a model.

    Attributes:
        changes: every one, in the file's order.
        matched: pairs that change the model.
        pairs: in the file, without those of text encoders.
        text: pairs of text encoders.
        bytes: of the matrices of pairs that change the model.
        adding: bytes that are taken while one of them is added to a weight in 8 bits (`models.storage`): of the largest, the
            weight and the product in float32.
        unmatched: some names of modules that the model has not, or keys that are no part of a pair.
    """

    changes: tuple[Change, ...]
    matched: int
    pairs: int
    text: int
    bytes: int
    adding: int
    unmatched: tuple[str, ...] = ()


def fit(header: Header, family: str, facts: Mapping[str, int], model: str) -> Fit:
    """How a LoRA's file fits a model.

    Args:
        header: of the LoRA's file.
        family, facts: what the model was found to be.
        model: its name, for sentences.

    Raises:
        XditError: what `lora_file.pairs` raises; `not_built` for a family whose weights are not changed;
            `lora_mismatch` where no pair is for such a model, or a pair is for a larger or smaller one.
    """
    if family not in LAYOUTS:
        raise XditError(Code.NOT_BUILT, f"{model} is a {family}, which takes no LoRA in this version.")
    made_for = family_of(header)
    if made_for not in ("", family):  # some names may be both models' all the same
        raise XditError(
            Code.LORA_MISMATCH,
            f"{header.name} is a LoRA for {made_for}, by its names for modules, and {model} is a {family}; choose one for "
            "this kind of model.",
        )
    table = modules(family, facts)
    changes: list[Change] = []
    strange: list[str] = []
    found = lora_file.pairs(header)
    ours = [pair for pair in found if not pair.of_text]
    for pair in ours:
        shape, targets = table.get(plain(pair.module), ((), ()))
        if not targets:
            strange.append(pair.module)
        elif pair.shape[0] != shape[0] or math.prod(pair.shape) != math.prod(shape):
            raise XditError(
                Code.LORA_MISMATCH,
                f"{header.name} is a LoRA for another size of model: its {shown(pair.module)} is {shape_of(pair.shape)}, "
                f"that of {model} {shape_of(shape)}.",
            )
        changes += [Change(pair, target) for target in targets]
    if not changes:
        why = (
            f"none of its {len(ours)} names is one of {model}'s ({listed(strange)})"
            if ours
            else "it changes text encoders alone"
        )
        raise XditError(
            Code.LORA_MISMATCH,
            f"{header.name} is no LoRA for {model}, a {family}: {why}; choose one that was made for this kind of model.",
        )
    strange += lora_file.others(header, found)
    used = list(dict.fromkeys(change.pair for change in changes))
    matrices = [header.tensors[key] for pair in used for key in (pair.up, pair.down)]
    return Fit(
        changes=tuple(changes),
        matched=len({change.pair.module for change in changes}),
        pairs=len(ours),
        text=len(found) - len(ours),
        bytes=sum(entry.end - entry.begin for entry in matrices),
        adding=2 * ITEMSIZE["float32"] * max(math.prod(pair.shape) for pair in used),
        unmatched=tuple(strange[:4]),
    )


def modules(family: str, facts: Mapping[str, int]) -> dict[str, tuple[Shape, tuple[Target, ...]]]:
    """By plain name, in both layouts: the shape of a module's weight, and the parameters that it is."""
    layout = LAYOUTS[family]
    shapes = layout.parameters(facts)
    theirs: dict[str, list[Target]] = {}
    table: dict[str, tuple[Shape, tuple[Target, ...]]] = {}
    for name, piece in layout.pieces(facts, "").items():
        if not name.endswith(".weight") or len(shapes[piece.key]) < 2:
            continue
        table[plain(name.removesuffix(".weight"))] = piece.shape(shapes[piece.key]), (Target(name),)
        theirs.setdefault(piece.key, []).append(Target(name, piece.rows, piece.swapped))
    for key, targets in theirs.items():
        table[plain(key.removesuffix(".weight"))] = shapes[key], tuple(targets)
    return table


def plain(module: str) -> str:
    """A module's name without prefixes, with underscores for dots."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if module.startswith(prefix) and len(module) > len(prefix):
                module, stripped = module[len(prefix) :], True
    # diffusers' processors of old had matrices of their own beside the layers that they are for.
    name = module.replace(".processor.", ".").replace(".", "_")
    if name.endswith("_to_out"):
        name += "_0"
    return ALIASES.get(name, name)


def recognise(header: Header) -> Recognised:
    """What a list of LoRAs says of a file: as its variant, the family that it is for, "" where its names do not tell.

    Raises:
        XditError: what `lora_file.pairs` raises.
    """
    found = lora_file.pairs(header)
    entries = [header.tensors[key] for pair in found for key in (pair.up, pair.down)]
    return Recognised(
        family="lora",
        variant=family_of(header),
        dtype=dtype_of(entries),
        parameters=sum(entry.elements for entry in entries),
        prefix="",
        facts={"modules": len(found), "rank": max(pair.rank for pair in found)},
    )


def family_of(header: Header) -> str:
    """The family that a LoRA is for, by its names for modules; "" where they do not tell.

    Raises:
        XditError: what `lora_file.pairs` raises.
    """
    widths = {plain(pair.module): pair.shape[1] for pair in lora_file.pairs(header) if not pair.of_text}

    def any_has(*parts: str) -> bool:
        return any(part in f"_{name}" for name in widths for part in parts)

    if any_has("_double_blocks_", "_single_blocks_", "_single_transformer_blocks_"):
        return "flux"
    if any_has("_joint_blocks_", "_add_q_proj"):
        return "sd3"
    if any_has("_input_blocks_", "_output_blocks_", "_down_blocks_", "_up_blocks_"):
        context = next((width for name, width in widths.items() if name.endswith("attn2_to_k")), 0)
        return {768: "sd1", 1024: "sd2"}.get(context, "sdxl")
    if any_has("_0_cross_attn_", "_0_attn_qkv", "_transformer_blocks_0_attn1_"):
        return "pixart"
    if any_has("_blocks_0_attn1_", "_blocks_0_attn2_"):
        return "hunyuandit"
    return ""
