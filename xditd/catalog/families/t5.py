"""T5's encoder (T5-XXL and its kin), in the layout of its makers' files (encoder.block.0.layer.0.SelfAttention.q…)."""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families import inputs, text_encoder
from xditd.catalog.families.expected import check_shapes, count, shape
from xditd.catalog.families.family import Detected
from xditd.catalog.header import Header
from xditd.catalog.sentences import shape_of
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import EncodeText, ModelInfo, Plan

name = "t5"
label = "a T5 text encoder"
part = "text_encoder"
parallel = False
layers = r"encoder\.block\.\d+\."
dtypes = ("float32", "bfloat16")
"""Not float16: what passes between the blocks of a T5-XXL exceeds its range."""

BUCKETS = 32  # of relative positions; with it go distances up to 128
MAX_BLOCKS = 64  # the largest known has 24
MAX_LENGTH = 4096  # tokens; the model itself knows no limit, but its table of positions grows with the square

IGNORED = frozenset({"encoder.embed_tokens.weight"})
"""In some files: `shared.weight` once more."""


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, layers, heads, head_dim, ff, vocabulary, gated (1 for two matrices before the activation)."""
    attention = prefix + "encoder.block.0.layer.0.SelfAttention."
    feed_forward = prefix + "encoder.block.0.layer.1.DenseReluDense."
    if attention + "q.weight" not in header.tensors:
        return None
    vocabulary, width = shape(header, prefix + "shared.weight", 2)
    inner, _ = shape(header, attention + "q.weight", 2)
    buckets, heads = shape(header, attention + "relative_attention_bias.weight", 2)
    if inner % heads or buckets != BUCKETS:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {attention}relative_attention_bias.weight has shape {shape_of((buckets, heads))}; it must "
            f"have {BUCKETS} rows, and its columns must divide {inner}.",
        )
    gated = feed_forward + "wi_0.weight" in header.tensors
    facts = {
        "width": width,
        "layers": count(header, prefix + "encoder.block.", MAX_BLOCKS),
        "heads": heads,
        "head_dim": inner // heads,
        "ff": shape(header, feed_forward + ("wi_0.weight" if gated else "wi.weight"), 2)[0],
        "vocabulary": vocabulary,
        "gated": int(gated),
    }
    keys = check_shapes(header, prefix, parameters(facts), label, IGNORED)
    return Detected(variant="", facts=facts, keys=keys)


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a T5 encoder with these facts, by key: its shape."""
    width, inner, ff = facts["width"], facts["heads"] * facts["head_dim"], facts["ff"]
    table: dict[str, tuple[int, ...]] = {"shared.weight": (facts["vocabulary"], width)}
    for i in range(facts["layers"]):
        start = f"encoder.block.{i}.layer"
        for projection in "qkv":
            table[f"{start}.0.SelfAttention.{projection}.weight"] = (inner, width)
        table[f"{start}.0.SelfAttention.o.weight"] = (width, inner)
        if i == 0:  # all blocks use the first one's
            table[f"{start}.0.SelfAttention.relative_attention_bias.weight"] = (BUCKETS, facts["heads"])
        table[f"{start}.0.layer_norm.weight"] = (width,)
        for matrix in ("wi_0", "wi_1") if facts["gated"] else ("wi",):
            table[f"{start}.1.DenseReluDense.{matrix}.weight"] = (ff, width)
        table[f"{start}.1.DenseReluDense.wo.weight"] = (width, ff)
        table[f"{start}.1.layer_norm.weight"] = (width,)
    table["encoder.final_layer_norm.weight"] = (width,)
    return table


# ------------------------------------------------------------------------------------------- plan and inputs


def check_plan(info: ModelInfo, plan: Plan) -> None:
    inputs.check_one_device(label, plan)


def check_encode_text(info: ModelInfo, message: EncodeText) -> None:
    """tokens [B, n] of any n up to a limit; no pooled output."""
    text_encoder.check_tokens(info, message, longest=MAX_LENGTH, pooled=text_encoder.POOLED[:1])
