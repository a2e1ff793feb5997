"""The demo's prompts: the tokens that ComfyUI's tokenizers give, from a table of some sixty words."""

from __future__ import annotations

import random

import pytest

from tools.train_demo import scenes
from xditd.demo import prompt
from xditd.protocol.errors import Code, XditError

RED_CIRCLE = ([49406, 320, 736, 7117, 49407], [3, 9, 1131, 8196, 1])
"""What FluxTokenizer of ComfyUI gives for `a red circle`; tests/comfy holds many more to it."""


def test_a_prompt_becomes_the_tokens_that_comfyui_gives():
    tokens = prompt.tokens("a red circle")
    assert (len(tokens.clip), len(tokens.t5)) == (77, 256)
    assert (list(tokens.clip[:5]), list(tokens.t5[:5])) == RED_CIRCLE
    assert set(tokens.clip[5:]) == {49407}
    assert set(tokens.t5[5:]) == {0}


def test_every_caption_can_be_read():
    chance = random.Random(0)
    for _ in range(500):
        prompt.tokens(scenes.caption(scenes.describe(chance), chance))


def test_spaces_and_case_do_not_matter():
    plain = prompt.tokens("a red circle, a blue square and a star")
    assert prompt.tokens("  a red  circle ,a BLUE square and a star ") == plain
    assert prompt.tokens("A red circle").t5 != prompt.tokens("a red circle").t5  # T5 tells them apart


def test_a_word_that_it_does_not_know_is_named_and_one_like_it_offered():
    with pytest.raises(XditError, match="'sqare'; did you mean square") as caught:
        prompt.tokens("a blue sqare")
    assert caught.value.code is Code.BAD_VALUE
    with pytest.raises(XditError, match="does not know the word 'cat'"):
        prompt.tokens("a cat")


def test_too_long_a_prompt_is_refused():
    with pytest.raises(XditError, match="say less"):
        prompt.tokens("a red circle and " * 30 + "a star")
