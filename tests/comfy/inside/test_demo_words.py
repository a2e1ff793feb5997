"""The demo's table of words against ComfyUI's own tokenizers for Flux: the same tokens for every caption."""

from __future__ import annotations

import random

from tools.train_demo import scenes
from xditd.demo import prompt

CAPTIONS = 300


def test_every_caption_has_the_tokens_that_comfyui_gives():
    from comfy.text_encoders.flux import FluxTokenizer

    tokenizer = FluxTokenizer()
    chance = random.Random(7)
    for text in ["", *(scenes.caption(scenes.describe(chance), chance) for _ in range(CAPTIONS))]:
        theirs = tokenizer.tokenize_with_weights(text)
        ours = prompt.tokens(text)
        for name, mine in (("l", ours.clip), ("t5xxl", ours.t5)):
            (batch,) = theirs[name]
            assert [token for token, *_ in batch] == list(mine), f"{name}: {text}"
