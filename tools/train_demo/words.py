"""Writes xditd/demo/words.json: of each word of the captions, the tokens that ComfyUI's tokenizers give it.

    COMFYUI_PATH=… python -m tools.train_demo.words

Takes the tokenizers' own data from a ComfyUI checkout and keeps nothing of it but these few numbers. Checks on thousands
of captions that the table put together word by word gives the same tokens as the tokenizers on the whole.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

from transformers import CLIPTokenizer, T5TokenizerFast

from tools.train_demo.scenes import caption, describe
from xditd.demo import prompt

CAPTIONS = 5000


def main() -> None:
    comfy = Path(os.environ["COMFYUI_PATH"]) / "comfy"
    clip = CLIPTokenizer.from_pretrained(comfy / "sd1_tokenizer")
    t5 = T5TokenizerFast.from_pretrained(comfy / "text_encoders" / "t5_tokenizer")
    chance = random.Random(0)
    captions = [caption(describe(chance), chance) for _ in range(CAPTIONS)]
    words = sorted({word for text in captions for word in re.findall(r"[^\s,.]+", text)})
    words += [word.lower() for word in words if word.lower() not in words]
    table = {word: (clip(word)["input_ids"][1:-1], t5(word)["input_ids"][:-1]) for word in words}
    for mark in ",.":  # they stand at the end of a word
        before = t5("circle")["input_ids"][:-1]
        table[mark] = (clip(mark)["input_ids"][1:-1], t5("circle" + mark)["input_ids"][len(before) : -1])
    path = Path(prompt.__file__).with_name("words.json")
    lines = [f"  {json.dumps(word)}: {json.dumps(ids)}" for word, ids in sorted(table.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    prompt._table.cache_clear()
    for text in captions:
        made = prompt.tokens(text)
        whole = clip(text)["input_ids"], t5(text)["input_ids"]
        assert list(made.clip[: len(whole[0])]) == whole[0], text
        assert list(made.t5[: len(whole[1])]) == whole[1], text
    print(f"{path}: {len(table)} words; {len(captions)} captions have the tokenizers' own tokens")


if __name__ == "__main__":
    main()
