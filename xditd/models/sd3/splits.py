"""SD3: how its layers are divided among ranks. A table."""

from __future__ import annotations

from xditd.models.splits import GATHERED, INPUTS, OUTPUTS, Splits

SPLITS = Splits(
    layers={
        "*.attn*.to_[qkv]": OUTPUTS,
        "*.attn.add_[qkv]_proj": OUTPUTS,
        "*.attn*.to_out.0": INPUTS,
        "*.attn.to_add_out": INPUTS,
        "*.ff*.net.0.proj": OUTPUTS,
        "*.ff*.net.2": INPUTS,
        "*.norm1*.linear": GATHERED,
        "norm_out.linear": GATHERED,
        "context_embedder": GATHERED,
        "time_text_embed.*_embedder.linear_1": OUTPUTS,
        "time_text_embed.*_embedder.linear_2": INPUTS,
    },
    attentions=("*.attn", "*.attn2"),
    blocks=("transformer_blocks",),
    first=("context_embedder",),
    last=("norm_out", "proj_out"),
)
