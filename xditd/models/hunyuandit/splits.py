"""HunyuanDiT: how its layers are divided among ranks. A table."""

from __future__ import annotations

from xditd.models.splits import GATHERED, INPUTS, OUTPUTS, Splits

SPLITS = Splits(
    layers={
        "*.attn[12].to_[qkv]": OUTPUTS,
        "*.attn[12].to_out.0": INPUTS,
        "*.ff.net.0.proj": OUTPUTS,
        "*.ff.net.2": INPUTS,
        "*.norm1.linear": GATHERED,
        "*.skip_linear": GATHERED,
        "norm_out.linear": GATHERED,
        "text_embedder.linear_1": OUTPUTS,
        "text_embedder.linear_2": INPUTS,
        "time_extra_emb.*_embedder.linear_1": OUTPUTS,
        "time_extra_emb.*_embedder.linear_2": INPUTS,
    },
    attentions=("*.attn1", "*.attn2"),
    blocks=("blocks",),
    last=("norm_out", "proj_out"),
)
