"""CLIP's text encoders, L and G, in the layouts of transformers' files (text_model.encoder.layers.0…) and of OpenCLIP's
(transformer.resblocks.0…)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from xditd.catalog.families import inputs, text_encoder
from xditd.catalog.families.expected import check_shapes, count, shape
from xditd.catalog.families.family import Detected
from xditd.catalog.header import Header
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import EncodeText, ModelInfo, Plan
from xditd.protocol.tensors import FLOATS

name = "clip"
label = "a CLIP text encoder"
part = "text_encoder"
parallel = False
layers = r"(text_model\.encoder\.layers|transformer\.resblocks)\.\d+\."
dtypes = FLOATS

END = 49407
"""The token that ends a text, in every CLIP that is known: its first place is where the pooled output is taken."""

HEAD_DIM = 64  # of every CLIP text encoder; shapes do not tell it
MAX_LAYERS = 64  # the largest known has 32
OF_H = range(23, 31)
"""Layers of a CLIP-H and its kin, as ComfyUI tells them from L (12) and G (32): SD2's, which no family here takes."""


class Names(NamedTuple):
    """Where a layout has what tells the sizes of a model."""

    layers: str
    first: str  # the matrix in the first layer that makes its intermediate features
    tokens: str
    positions: str
    projection: str


TRANSFORMERS = Names(
    layers="text_model.encoder.layers.",
    first="text_model.encoder.layers.0.mlp.fc1.weight",
    tokens="text_model.embeddings.token_embedding.weight",
    positions="text_model.embeddings.position_embedding.weight",
    projection="text_projection.weight",
)
OPENCLIP = Names(
    layers="transformer.resblocks.",
    first="transformer.resblocks.0.mlp.c_fc.weight",
    tokens="token_embedding.weight",
    positions="positional_embedding",
    projection="text_projection",
)

IGNORED = frozenset({"text_model.embeddings.position_ids"})
"""In files of older transformers: the numbers 0 to n - 1."""


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, layers, heads, vocabulary, positions, intermediate, projection (1 with a text_projection), openclip
    (1 in OpenCLIP's layout)."""
    names = next(
        (names for names in (TRANSFORMERS, OPENCLIP) if prefix + names.first in header.tensors), None
    )
    if names is None:
        return None
    vocabulary, width = shape(header, prefix + names.tokens, 2)
    facts = {
        "width": width,
        "layers": count(header, prefix + names.layers, MAX_LAYERS),
        "heads": max(1, width // HEAD_DIM),
        "vocabulary": vocabulary,
        "positions": shape(header, prefix + names.positions, 2)[0],
        "intermediate": shape(header, prefix + names.first, 2)[0],
        "projection": int(prefix + names.projection in header.tensors),
        "openclip": int(names is OPENCLIP),
    }
    if width % facts["heads"]:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name} is {label} of width {width}, which its {facts['heads']} heads do not divide.",
        )
    if facts["layers"] in OF_H:
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is {label} of {facts['layers']} layers, as CLIP-H has; this version runs CLIP-L and CLIP-G.",
        )
    keys = check_shapes(header, prefix, parameters(facts), label, IGNORED)
    return Detected(variant=variant(facts), facts=facts, keys=keys)


def variant(facts: Mapping[str, int]) -> str:
    """ "clip_l" or "clip_g", by depth: they differ in their activation, which shapes do not tell."""
    return "clip_g" if facts["layers"] >= OF_H.stop else "clip_l"


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a CLIP text encoder with these facts, by key: its shape."""
    return _openclip(facts) if facts["openclip"] else _transformers(facts)


def _openclip(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    width = facts["width"]
    table: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (facts["vocabulary"], width),
        "positional_embedding": (facts["positions"], width),
    }
    for i in range(facts["layers"]):
        start = f"transformer.resblocks.{i}"
        for kind, size in (("weight", (width,)), ("bias", ())):
            table[f"{start}.attn.in_proj_{kind}"] = (3 * width, *size)
            table[f"{start}.attn.out_proj.{kind}"] = (width, *size)
            table[f"{start}.mlp.c_fc.{kind}"] = (facts["intermediate"], *size)
            for norm in ("ln_1", "ln_2"):
                table[f"{start}.{norm}.{kind}"] = (width,)
        table[f"{start}.mlp.c_proj.weight"] = (width, facts["intermediate"])
        table[f"{start}.mlp.c_proj.bias"] = (width,)
    table["ln_final.weight"] = table["ln_final.bias"] = (width,)
    if facts["projection"]:
        table["text_projection"] = (width, width)
    return table


def _transformers(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    width = facts["width"]
    table: dict[str, tuple[int, ...]] = {}

    def layer(key: str, outputs: int, inputs: int) -> None:
        table[f"{key}.weight"] = (outputs, inputs)
        table[f"{key}.bias"] = (outputs,)

    def norm(key: str) -> None:
        table[f"{key}.weight"] = table[f"{key}.bias"] = (width,)

    table["text_model.embeddings.token_embedding.weight"] = (facts["vocabulary"], width)
    table["text_model.embeddings.position_embedding.weight"] = (facts["positions"], width)
    for i in range(facts["layers"]):
        start = f"text_model.encoder.layers.{i}"
        norm(f"{start}.layer_norm1")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{start}.self_attn.{projection}", width, width)
        norm(f"{start}.layer_norm2")
        layer(f"{start}.mlp.fc1", facts["intermediate"], width)
        layer(f"{start}.mlp.fc2", width, facts["intermediate"])
    norm("text_model.final_layer_norm")
    if facts["projection"]:
        table["text_projection.weight"] = (width, width)
    return table


# ------------------------------------------------------------------------------------------- plan and inputs


def check_plan(info: ModelInfo, plan: Plan) -> None:
    inputs.check_one_device(label, plan)


def check_encode_text(info: ModelInfo, message: EncodeText) -> None:
    """tokens [B, n], n up to `positions`; every pooled output, the projected one where the file has a projection."""
    pooled = text_encoder.POOLED if info.facts["projection"] else text_encoder.POOLED[:-1]
    text_encoder.check_tokens(info, message, longest=info.facts["positions"], pooled=pooled)
