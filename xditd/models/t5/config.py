"""T5: what transformers' class is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xditd.catalog.families import t5


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of T5Config.

    Args:
        facts: as `catalog.families.t5.detect` finds them.
    """
    return {
        "vocab_size": facts["vocabulary"],
        "d_model": facts["width"],
        "d_kv": facts["head_dim"],
        "d_ff": facts["ff"],
        "num_layers": facts["layers"],
        "num_heads": facts["heads"],
        "relative_attention_num_buckets": t5.BUCKETS,
        "feed_forward_proj": "gated-gelu" if facts["gated"] else "relu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }
