"""Scenes and their captions as tensors, made by many processes from one seed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools.train_demo import render
from tools.train_demo.scenes import Description, caption, described, settle
from xditd.demo import prompt

CHUNK = 500  # scenes of one task: the same whatever the number of processes
T5_LONGEST = 32  # tokens of a caption, its end among them
CLIP_LONGEST = 32  # what follows the end changes nothing before it


@dataclass(frozen=True, slots=True)
class Captioned:
    """Scenes with captions.

    Attributes:
        numbers: [N, …], as `render.render` takes them.
        clip, t5: tokens [N, CLIP_LONGEST], [N, T5_LONGEST], int32.
    """

    numbers: torch.Tensor
    clip: torch.Tensor
    t5: torch.Tensor


def make(count: int, seed: int) -> Captioned:
    """`count` scenes that are not held out, with captions."""
    chunks = range(-(-count // CHUNK))
    with ProcessPoolExecutor(os.cpu_count(), get_context("forkserver")) as pool:
        made = list(pool.map(_chunk, chunks, repeat(seed)))
    numbers, clip, t5 = (torch.cat(parts)[:count] for parts in zip(*made, strict=True))
    return Captioned(numbers, clip, t5)


def write(captioned: Captioned, path: Path) -> None:
    save_file({"numbers": captioned.numbers, "clip": captioned.clip, "t5": captioned.t5}, path)


def read(path: Path) -> Captioned:
    """What `write` wrote."""
    return Captioned(**load_file(path))


def exam(count: int, seed: int = 0) -> list[Description]:
    """Descriptions that training never saw."""
    chance = random.Random(f"exam {seed}")
    return [described(chance, held=True) for _ in range(count)]


def tokens(texts: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's and T5's tokens of texts, [N, CLIP_LONGEST] and [N, T5_LONGEST]."""
    read = [prompt.tokens(text, t5_length=T5_LONGEST) for text in texts]
    return (
        torch.tensor([one.clip[:CLIP_LONGEST] for one in read], dtype=torch.int32),
        torch.tensor([one.t5 for one in read], dtype=torch.int32),
    )


def _chunk(index: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    chance = random.Random(f"{seed} {index}")
    scenes = [settle(described(chance, held=False), chance) for _ in range(CHUNK)]
    return render.numbers(scenes), *tokens(caption(scene.description, chance) for scene in scenes)
