"""CLIP: what transformers' class is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xditd.catalog.families import clip

ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of CLIPTextConfig.

    Args:
        facts: as `catalog.families.clip.detect` finds them.
    """
    return {
        "vocab_size": facts["vocabulary"],
        "hidden_size": facts["width"],
        "intermediate_size": facts["intermediate"],
        "projection_dim": facts["width"],
        "num_hidden_layers": facts["layers"],
        "num_attention_heads": facts["heads"],
        "max_position_embeddings": facts["positions"],
        "hidden_act": ACTIVATIONS[clip.variant(facts)],
        "eos_token_id": clip.END,
    }
