"""Flux: how its layers are divided among ranks. A table."""

from __future__ import annotations

from xditd.models.splits import GATHERED, INPUTS, OUTPUTS, Split, Splits

SPLITS = Splits(
    layers={
        "*.attn.to_[qkv]": OUTPUTS,
        "*.attn.add_[qkv]_proj": OUTPUTS,
        "*.attn.to_out.0": INPUTS,
        "*.attn.to_add_out": INPUTS,
        "*.ff.net.0.proj": OUTPUTS,
        "*.ff_context.net.0.proj": OUTPUTS,
        "*.ff.net.2": INPUTS,
        "*.ff_context.net.2": INPUTS,
        # A single block's last layer takes what attention and feed-forward made, side by side.
        "single_transformer_blocks.*.proj_mlp": OUTPUTS,
        "single_transformer_blocks.*.proj_out": Split("inputs", (1, 4)),
        # Modulations: a quarter of all parameters, and vectors to gather.
        "*.norm1.linear": GATHERED,
        "*.norm1_context.linear": GATHERED,
        "single_transformer_blocks.*.norm.linear": GATHERED,
        "norm_out.linear": GATHERED,
        "context_embedder": GATHERED,
        "time_text_embed.*_embedder.linear_1": OUTPUTS,
        "time_text_embed.*_embedder.linear_2": INPUTS,
    },
    attentions=("*.attn",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    first=("x_embedder", "context_embedder"),
    last=("norm_out", "proj_out"),
)
