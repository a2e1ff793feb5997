"""HunyuanDiT transformers, up to 1.1 and from 1.2 on, in the layout of their makers' files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xditd.catalog.families import inputs, transformer
from xditd.catalog.families.expected import check_shapes, count, has, shape
from xditd.catalog.families.family import Detected, Kinds
from xditd.catalog.header import Header
from xditd.catalog.sentences import shape_of
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan, Sample
from xditd.protocol.noise import Noise
from xditd.protocol.tensors import FLOATS, Tensor

name = "hunyuandit"
label = "a HunyuanDiT transformer"
part = "transformer"
parallel = True
layers = r"blocks\.\d+\."
dtypes = FLOATS
TENSORS = ("context", "context_t5", "mask", "mask_t5")
VALUES = ("height", "width", "target_height", "target_width", "crop_top", "crop_left")
"""Of a conditioning."""

PATCH = 2  # latent pixels of one token, each way
TIME_WIDTH = 256  # sinusoidal features of a timestep or a size, before their embedding
POOL_HEADS = 8  # of the attention that pools the T5 text; shapes do not tell it
SIZES = len(VALUES)
MAX_BLOCKS = 256  # every known HunyuanDiT has 40
SCALE = 8  # image pixels of one latent pixel, each way
HIGHEST = 999.0

MASKS = (*FLOATS, "int32", "int64", "uint8")


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, heads, head_dim, blocks, ff, context_width, t5_width, pooled_width, text_tokens and t5_tokens (those
    that a mask can replace), sizes (0 or 1: conditioned on sizes and a style, as those up to 1.1 are), latent_channels,
    predicted_channels, scale."""
    if prefix + "mlp_t5.0.weight" not in header.tensors:
        return None
    width, channels, *_ = shape(header, prefix + "x_embedder.proj.weight", 4)
    (head_dim,) = shape(header, prefix + "blocks.0.attn1.q_norm.weight", 1)
    ff, _ = shape(header, prefix + "blocks.0.mlp.fc1.weight", 2)
    context_width, _ = shape(header, prefix + "mlp_t5.2.weight", 2)
    pooled_width, t5_width = shape(header, prefix + "pooler.c_proj.weight", 2)
    places, _ = shape(header, prefix + "pooler.positional_embedding", 2)
    padding, _ = shape(header, prefix + "text_embedding_padding", 2)
    outputs, _ = shape(header, prefix + "final_layer.linear.weight", 2)
    if head_dim % 4 or width % head_dim:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {prefix}blocks.0.attn1.q_norm.weight has {head_dim} entries; that must be a multiple of 4 "
            f"and divide the width of {width}.",
        )
    if t5_width % POOL_HEADS or places < 2 or padding <= places - 1:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: its pooler has {places} places of width {t5_width}, which {POOL_HEADS} heads and a padding "
            f"of {padding} tokens do not fit.",
        )
    blocks = count(header, prefix + "blocks.", MAX_BLOCKS)
    if blocks % 2:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name} has {blocks} blocks; a HunyuanDiT has as many in its second half as in its first.",
        )
    facts = {
        "width": width,
        "heads": width // head_dim,
        "head_dim": head_dim,
        "blocks": blocks,
        "ff": ff,
        "context_width": context_width,
        "t5_width": t5_width,
        "pooled_width": pooled_width,
        "text_tokens": padding - (places - 1),
        "t5_tokens": places - 1,
        "sizes": int(has(header, prefix + "style_embedder.")),
        "latent_channels": channels,
        "predicted_channels": outputs // PATCH**2,
        "scale": SCALE,
    }
    if facts["predicted_channels"] not in (channels, 2 * channels):
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {prefix}final_layer.linear.weight has {outputs} rows, which {channels} channels do not give.",
        )
    keys = check_shapes(header, prefix, parameters(facts), label)
    return Detected(variant="1.1" if facts["sizes"] else "1.2", facts=facts, keys=keys)


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a HunyuanDiT with these facts, by key: its shape."""
    width, t5, context = facts["width"], facts["t5_width"], facts["context_width"]
    channels = facts["latent_channels"]
    table: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, channels, PATCH, PATCH),
        "x_embedder.proj.bias": (width,),
        "text_embedding_padding": (facts["text_tokens"] + facts["t5_tokens"], context),
        "pooler.positional_embedding": (facts["t5_tokens"] + 1, t5),
    }

    def linear(key: str, outputs: int, inputs: int) -> None:
        table[f"{key}.weight"] = (outputs, inputs)
        table[f"{key}.bias"] = (outputs,)

    def norm(key: str, size: int) -> None:
        table[f"{key}.weight"] = table[f"{key}.bias"] = (size,)

    def two(key: str, first: int, hidden: int, last: int, inputs: int) -> None:
        """Two layers around an activation, which has the number between theirs."""
        linear(f"{key}.{first}", hidden, inputs)
        linear(f"{key}.{first + 2}", last, hidden)

    two("mlp_t5", 0, 4 * t5, context, t5)
    for projection in "kqv":
        linear(f"pooler.{projection}_proj", t5, t5)
    linear("pooler.c_proj", facts["pooled_width"], t5)
    two("t_embedder.mlp", 0, width, width, TIME_WIDTH)
    extra = facts["pooled_width"]
    if facts["sizes"]:
        table["style_embedder.weight"] = (1, width)
        extra += SIZES * TIME_WIDTH + width
    two("extra_embedder", 0, 4 * width, width, extra)
    for i in range(facts["blocks"]):
        block = f"blocks.{i}"
        for number in (1, 2, 3):
            norm(f"{block}.norm{number}", width)
        linear(f"{block}.default_modulation.1", width, width)
        linear(f"{block}.attn1.Wqkv", 3 * width, width)
        linear(f"{block}.attn2.q_proj", width, width)
        linear(f"{block}.attn2.kv_proj", 2 * width, context)
        for attention in ("attn1", "attn2"):
            norm(f"{block}.{attention}.q_norm", facts["head_dim"])
            norm(f"{block}.{attention}.k_norm", facts["head_dim"])
            linear(f"{block}.{attention}.out_proj", width, width)
        linear(f"{block}.mlp.fc1", facts["ff"], width)
        linear(f"{block}.mlp.fc2", width, facts["ff"])
        if i > facts["blocks"] // 2:  # what the first half gave comes in again
            norm(f"{block}.skip_norm", 2 * width)
            linear(f"{block}.skip_linear", width, 2 * width)
    linear("final_layer.linear", facts["predicted_channels"] * PATCH**2, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return table


def noise(facts: Mapping[str, int]) -> Noise:
    """What kind of noise it takes out of a latent."""
    return Noise(predicts="v", start=0.00085, end=0.03 if facts["sizes"] else 0.018)


# ------------------------------------------------------------------------------------------- plan and inputs


def attention(facts: Mapping[str, int]) -> tuple[Kinds, ...]:
    """Each kind of attention among tokens that ranks deal out: of the image alone; each attends to the whole text."""
    return (("image",),)


def check_plan(info: ModelInfo, plan: Plan) -> None:
    transformer.check_plan(info, plan, label, info.facts["blocks"])


def check_conditioning(info: ModelInfo, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
    """Tensors context [1 or B, n, context_width] of BERT and context_t5 [1 or B, m, t5_width] of mT5, with n and m at least
    text_tokens and t5_tokens; mask [1 or B, n] and mask_t5 [1 or B, m], of which 0 is no text: all is, where they are
    absent. Values: the picture's size, that of the picture it is cut from, and where, which 1.1 alone heeds."""
    inputs.check_names("tensor", tensors, TENSORS, TENSORS[:2])
    inputs.check_names("value", values, VALUES, ())
    for key, width, least in (
        ("context", "context_width", "text_tokens"),
        ("context_t5", "t5_width", "t5_tokens"),
    ):
        text, mask = tensors[key], tensors.get(key.replace("context", "mask"))
        inputs.check_dtype(key, text)
        inputs.check_shape(key, text, ("B", "n", info.facts[width]))
        if text.shape[1] < info.facts[least]:
            raise XditError(
                Code.BAD_TENSOR,
                f"{key} has shape {shape_of(text.shape)}; {info.name} takes {info.facts[least]} tokens at least: pad the "
                "text, and say in its mask what is padding.",
            )
        if mask is not None:
            inputs.check_dtype(key.replace("context", "mask"), mask, MASKS)
            inputs.check_shape(key.replace("context", "mask"), mask, ("B", text.shape[1]))
    transformer.check_batches(tensors)
    for key, value in values.items():
        least_value = 0.0 if key.startswith("crop") else 1.0
        if not (math.isfinite(value) and value >= least_value):
            raise XditError(
                Code.BAD_VALUE, f"{key} is {value}; it must be finite and {least_value:g} at least."
            )


def check_denoise(
    info: ModelInfo,
    x: Tensor,
    t: tuple[float, ...],
    conditioning: Mapping[str, Tensor],
    out: Tensor | None = None,
) -> None:
    """x [B, latent_channels, H, W] of any height and width; t is an index, 0 to 999, one or one per latent."""
    transformer.check_latent("x", info, x, conditioning)
    inputs.check_times(t, x.shape[0], 0.0, HIGHEST)
    inputs.check_same_shape("out", out, x, "x")


def check_sample(
    info: ModelInfo,
    message: Sample,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None = None,
) -> None:
    transformer.check_sample(info, message, conditioning, negative, noise(info.facts))
