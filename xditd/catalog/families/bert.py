"""BERT as HunyuanDiT has it for its texts, in the layout of transformers' files (bert.encoder.layer.0…)."""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families import inputs, text_encoder
from xditd.catalog.families.expected import check_shapes, count, shape
from xditd.catalog.families.family import Detected
from xditd.catalog.header import Header
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import EncodeText, ModelInfo, Plan
from xditd.protocol.tensors import FLOATS

name = "bert"
label = "a BERT text encoder"
part = "text_encoder"
parallel = False
layers = r"bert\.encoder\.layer\.\d+\."
dtypes = FLOATS

HEAD_DIM = 64  # of every BERT; shapes do not tell it
MAX_LAYERS = 64  # the largest known has 24

IGNORED = frozenset({"bert.embeddings.position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias"})
"""In some files: the numbers 0 to n - 1, and what classifies whole texts."""


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, layers, heads, vocabulary, positions, types (of tokens), intermediate."""
    first = prefix + "bert.encoder.layer.0."
    if first + "attention.self.query.weight" not in header.tensors:
        return None
    vocabulary, width = shape(header, prefix + "bert.embeddings.word_embeddings.weight", 2)
    facts = {
        "width": width,
        "layers": count(header, prefix + "bert.encoder.layer.", MAX_LAYERS),
        "heads": max(1, width // HEAD_DIM),
        "vocabulary": vocabulary,
        "positions": shape(header, prefix + "bert.embeddings.position_embeddings.weight", 2)[0],
        "types": shape(header, prefix + "bert.embeddings.token_type_embeddings.weight", 2)[0],
        "intermediate": shape(header, first + "intermediate.dense.weight", 2)[0],
    }
    if width % facts["heads"]:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name} is {label} of width {width}, which its {facts['heads']} heads do not divide.",
        )
    keys = check_shapes(header, prefix, parameters(facts), label, IGNORED)
    return Detected(variant="", facts=facts, keys=keys)


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a BERT with these facts, by key: its shape."""
    width, intermediate = facts["width"], facts["intermediate"]
    table: dict[str, tuple[int, ...]] = {}

    def layer(key: str, outputs: int, inputs: int) -> None:
        table[f"{key}.weight"] = (outputs, inputs)
        table[f"{key}.bias"] = (outputs,)

    def norm(key: str) -> None:
        table[f"{key}.weight"] = table[f"{key}.bias"] = (width,)

    for key, rows in (("word", "vocabulary"), ("position", "positions"), ("token_type", "types")):
        table[f"bert.embeddings.{key}_embeddings.weight"] = (facts[rows], width)
    norm("bert.embeddings.LayerNorm")
    for i in range(facts["layers"]):
        start = f"bert.encoder.layer.{i}"
        for projection in ("query", "key", "value"):
            layer(f"{start}.attention.self.{projection}", width, width)
        layer(f"{start}.attention.output.dense", width, width)
        norm(f"{start}.attention.output.LayerNorm")
        layer(f"{start}.intermediate.dense", intermediate, width)
        layer(f"{start}.output.dense", width, intermediate)
        norm(f"{start}.output.LayerNorm")
    return table


# ------------------------------------------------------------------------------------------- plan and inputs


def check_plan(info: ModelInfo, plan: Plan) -> None:
    inputs.check_one_device(label, plan)


def check_encode_text(info: ModelInfo, message: EncodeText) -> None:
    """tokens [B, n], n up to `positions`; no pooled output."""
    text_encoder.check_tokens(info, message, longest=info.facts["positions"], pooled=text_encoder.POOLED[:1])
