"""CLIP's text encoders, L and G, in the layout of transformers' files (text_model.encoder.layers.0…)."""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families import text_encoder
from xditd.catalog.families.expected import check_shapes, count, shape
from xditd.catalog.families.family import Detected
from xditd.catalog.header import Header
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import EncodeText, ModelInfo
from xditd.protocol.tensors import FLOATS

name = "clip"
label = "a CLIP text encoder"
part = text_encoder.part
parallel = text_encoder.parallel
dtypes = FLOATS

END = 49407
"""The token that ends a text, in every CLIP that is known: its first place is where the pooled output is taken."""

HEAD_DIM = 64  # of every CLIP text encoder; shapes do not tell it
MAX_LAYERS = 64  # the largest known has 32
OF_H = range(23, 31)
"""Layers of a CLIP-H and its kin, as ComfyUI tells them from L (12) and G (32): SD2's, which no family here takes."""

IGNORED = frozenset({"text_model.embeddings.position_ids"})
"""In files of older transformers: the numbers 0 to n - 1."""


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, layers, heads, vocabulary, positions, intermediate, projection (1 with a text_projection)."""
    first = prefix + "text_model.encoder.layers.0."
    if first + "mlp.fc1.weight" not in header.tensors:
        return None
    vocabulary, width = shape(header, prefix + "text_model.embeddings.token_embedding.weight", 2)
    facts = {
        "width": width,
        "layers": count(header, prefix + "text_model.encoder.layers.", MAX_LAYERS),
        "heads": max(1, width // HEAD_DIM),
        "vocabulary": vocabulary,
        "positions": shape(header, prefix + "text_model.embeddings.position_embedding.weight", 2)[0],
        "intermediate": shape(header, first + "mlp.fc1.weight", 2)[0],
        "projection": int(prefix + "text_projection.weight" in header.tensors),
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

check_plan = text_encoder.check_plan
check_conditioning = text_encoder.check_conditioning
check_denoise = text_encoder.check_denoise
check_sample = text_encoder.check_sample
check_decode = text_encoder.check_decode
check_encode = text_encoder.check_encode


def check_encode_text(info: ModelInfo, message: EncodeText) -> None:
    """tokens [B, n], n up to `positions`; every pooled output, the projected one where the file has a projection."""
    pooled = text_encoder.POOLED if info.facts["projection"] else text_encoder.POOLED[:-1]
    text_encoder.check_tokens(info, message, longest=info.facts["positions"], pooled=pooled)
