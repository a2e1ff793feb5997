"""PixArt: how its layers are divided among ranks. A table."""

from __future__ import annotations

from xditd.models.splits import GATHERED, INPUTS, OUTPUTS, Splits

SPLITS = Splits(
    layers={
        "*.attn[12].to_[qkv]": OUTPUTS,
        "*.attn[12].to_out.0": INPUTS,
        "*.ff.net.0.proj": OUTPUTS,
        "*.ff.net.2": INPUTS,
        "adaln_single.linear": GATHERED,
        "adaln_single.emb.timestep_embedder.linear_1": OUTPUTS,
        "adaln_single.emb.timestep_embedder.linear_2": INPUTS,
        "caption_projection.linear_1": OUTPUTS,
        "caption_projection.linear_2": INPUTS,
    },
    attentions=("*.attn1", "*.attn2"),
    blocks=("transformer_blocks",),
    last=("norm_out", "proj_out"),
)
