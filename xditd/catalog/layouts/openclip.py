"""OpenCLIP's layout of a CLIP text encoder, as SDXL's checkpoints have their CLIP-G: where transformers' parameters are in it.

The correspondence is diffusers' own (Apache-2.0: `convert_open_clip_checkpoint` in loaders/single_file_utils.py). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.layouts.piece import Piece

WHOLE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    # Of [inputs, outputs], where transformers has a linear layer's [outputs, inputs].
    "text_projection.weight": "text_projection",
}
"""Parameters outside the layers."""

LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of a layer (weight and bias)."""

FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Those that it holds as one, in thirds."""


def pieces(facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
    """Every parameter of the network, by transformers' name.

    Args:
        facts: as `catalog.families.clip.detect` finds them.
        prefix: of the file's keys.
    """
    width = facts["width"]
    table = {name: Piece(prefix + key) for name, key in WHOLE.items()}
    for i in range(facts["layers"]):
        ours, theirs = f"text_model.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for name, key in LAYER.items():
                table[f"{ours}.{name}.{kind}"] = Piece(f"{theirs}.{key}.{kind}")
            for third, name in enumerate(FUSED):
                rows = (third * width, (third + 1) * width)
                table[f"{ours}.{name}.{kind}"] = Piece(f"{theirs}.attn.in_proj_{kind}", rows)
    return table
