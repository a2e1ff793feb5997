"""A prompt in the demo model's words as tokens, the very ones that ComfyUI's tokenizers give. Pure.

CLIP's and T5's tokenizers know tens of thousands of words; the demo's model, some sixty. So its tokenizer is a table,
`words.json`, taken from theirs by `tools/train_demo/words.py`: neither has a token that reaches over the end of a word.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

from xditd.protocol.errors import Code, XditError

CLIP_LENGTH = 77
CLIP_START, CLIP_END = 49406, 49407
T5_LENGTH = 256  # ComfyUI fills a text up to it for Flux, and nothing masks what it is filled with
T5_END, T5_FILL = 1, 0

EXAMPLE = "a red circle left of a blue square"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text: what each of Flux's text encoders takes."""

    clip: tuple[int, ...]  # CLIP_LENGTH
    t5: tuple[int, ...]  # T5_LENGTH, or as long as was asked


def folder() -> Path:
    """The demo's models, in folders as ComfyUI has them."""
    return Path(str(resources.files("xditd.demo"))) / "models"


def vocabulary() -> tuple[str, ...]:
    """Every word that the demo's model has learnt, in lower case."""
    return tuple(sorted({word.lower() for word in _table()} - {",", "."}))


def tokens(prompt: str, *, t5_length: int = T5_LENGTH) -> Tokens:
    """A prompt's tokens; of "" those of the empty prompt.

    Args:
        prompt: in the demo's words, parted by spaces, commas and full stops.
        t5_length: up to which T5's tokens are filled.

    Raises:
        XditError: `bad_value` for a word that it does not know, naming those like it, and for too long a prompt.
    """
    table = _table()
    clip, t5 = [CLIP_START], []
    for word in re.findall(r"[^\s,.]+|[,.]", prompt):
        known = table.get(word) or table.get(word.lower())
        if known is None:
            raise XditError(Code.BAD_VALUE, _unknown(word))
        clip += known[0]
        t5 += known[1]
    clip.append(CLIP_END)
    t5.append(T5_END)
    if len(clip) > CLIP_LENGTH or len(t5) > t5_length:
        raise XditError(
            Code.BAD_VALUE,
            f"The prompt has {len(clip)} tokens; the demo's model reads {CLIP_LENGTH}: say less.",
        )
    clip += [CLIP_END] * (CLIP_LENGTH - len(clip))
    t5 += [T5_FILL] * (t5_length - len(t5))
    return Tokens(tuple(clip), tuple(t5))


def _unknown(word: str) -> str:
    close = difflib.get_close_matches(word.lower(), vocabulary(), n=3)
    meant = f"; did you mean {' or '.join(close)}?" if close else "."
    return (
        f"The demo's model is small and does not know the word {word!r}{meant} "
        f"It draws coloured shapes, as in: {EXAMPLE}."
    )


@lru_cache(maxsize=1)
def _table() -> dict[str, tuple[list[int], list[int]]]:
    text = resources.files("xditd.demo").joinpath("words.json").read_text()
    return {word: (clip, t5) for word, (clip, t5) in json.loads(text).items()}
