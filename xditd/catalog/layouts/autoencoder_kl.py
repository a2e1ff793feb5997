"""AutoencoderKL: which parameter of diffusers' class comes from which tensor of its makers' files.

The correspondence is diffusers' own (Apache-2.0: `convert_ldm_vae_checkpoint` in diffusers/loaders/
single_file_utils.py). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families.autoencoder_kl import MAX_BLOCKS, MAX_LEVELS
from xditd.catalog.families.expected import count, has, shape
from xditd.catalog.header import Header
from xditd.catalog.layouts.piece import Piece

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
"""Of the attention in the middle; all but the norm are 1×1 convolutions in the files and linear layers here."""


RENAMED = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
"""What older files in diffusers' layout call the layers of the attention in the middle."""


def sketch(header: Header) -> dict[str, int] | None:
    """What `pieces` must know of a file in diffusers' layout; None where it is no AutoencoderKL."""
    entry = header.tensors.get("decoder.conv_in.weight")
    if (
        entry is None
        or len(entry.shape) != 4
        or "decoder.up_blocks.0.resnets.0.norm1.weight" not in header.tensors
    ):
        return None
    levels = count(header, "encoder.down_blocks.", MAX_LEVELS)
    widths = {
        f"channels_{i}": shape(header, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0]
        for i in range(levels)
    }
    return {
        "levels": levels,
        "blocks": count(header, "encoder.down_blocks.0.resnets.", MAX_BLOCKS),
        "channels": shape(header, "encoder.conv_in.weight", 4)[0],
        "quant": int(has(header, "quant_conv.") or has(header, "post_quant_conv.")),
        **widths,
    }


def pieces(facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
    """Every parameter of the network, by diffusers' name.

    Args:
        facts: as `catalog.families.autoencoder_kl.detect` finds them.
        prefix: of the file's keys.
    """
    levels, blocks = facts["levels"], facts["blocks"]
    widths = [facts[f"channels_{i}"] for i in range(levels)]
    table: dict[str, Piece] = {}

    def layer(name: str, key: str, squeezed: bool = False) -> None:
        for kind in ("weight", "bias"):
            table[f"{name}.{kind}"] = Piece(f"{prefix}{key}.{kind}", squeezed=squeezed and kind == "weight")

    def block(name: str, key: str, inputs: int, outputs: int) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            layer(f"{name}.{part}", f"{key}.{part}")
        if inputs != outputs:
            layer(f"{name}.conv_shortcut", f"{key}.nin_shortcut")

    def half(side: str) -> None:
        """What encoder and decoder have in common."""
        layer(f"{side}.conv_in", f"{side}.conv_in")
        for i in range(2):
            block(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}", 0, 0)
        for name, key in ATTENTION.items():
            layer(f"{side}.mid_block.attentions.0.{name}", f"{side}.mid.attn_1.{key}", squeezed=key != "norm")
        layer(f"{side}.conv_norm_out", f"{side}.norm_out")
        layer(f"{side}.conv_out", f"{side}.conv_out")

    half("encoder")
    half("decoder")
    width = facts["channels"]
    for i, wide in enumerate(widths):
        for j in range(blocks):
            block(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", width, wide)
            width = wide
        if i < levels - 1:
            layer(f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv")
    # The files number the decoder's levels as the encoder's, from fine to coarse; diffusers from its beginning.
    for i, wide in reversed(list(enumerate(widths))):
        ours = levels - 1 - i
        for j in range(blocks + 1):
            block(f"decoder.up_blocks.{ours}.resnets.{j}", f"decoder.up.{i}.block.{j}", width, wide)
            width = wide
        if i > 0:
            layer(f"decoder.up_blocks.{ours}.upsamplers.0.conv", f"decoder.up.{i}.upsample.conv")
    if facts["quant"]:
        layer("quant_conv", "quant_conv")
        layer("post_quant_conv", "post_quant_conv")
    return table
