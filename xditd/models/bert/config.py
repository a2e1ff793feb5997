"""BERT: what transformers' class is told, from the facts that a file's shapes give. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def config(facts: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of BertConfig.

    Args:
        facts: as `catalog.families.bert.detect` finds them.
    """
    return {
        "vocab_size": facts["vocabulary"],
        "hidden_size": facts["width"],
        "intermediate_size": facts["intermediate"],
        "num_hidden_layers": facts["layers"],
        "num_attention_heads": facts["heads"],
        "max_position_embeddings": facts["positions"],
        "type_vocab_size": facts["types"],
    }
