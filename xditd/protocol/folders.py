"""Folders that are one model, as diffusers saves them: which they are, what is read of them, and how large they count.

A folder with `config.json` and weights beside it is a model, a folder with `model_index.json` a pipeline, whose models are in
folders of its own. Client and daemon must agree on this; what the weights are is the daemon's to tell. stdlib.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator

INDEX = ".safetensors.index.json"
"""Ends the name of the file that says which shard has which tensor."""

CONFIG = "config.json"
PIPELINE = "model_index.json"

KINDS = ("diffusion_models", "checkpoints", "vae")
"""Kinds that a pipeline may lie under; elsewhere its folders count for themselves."""


def is_pipeline(names: Collection[str], kind: str) -> bool:
    """Whether a folder with these names in it is a pipeline."""
    return PIPELINE in names and kind in KINDS


def is_model(names: Collection[str], kind: str) -> bool:
    """Whether a folder with these names in it is one model, or one pipeline of models."""
    if is_pipeline(names, kind):
        return True
    if CONFIG not in names or kind == "loras":
        return False
    files = [name for name in names if name.endswith(".safetensors")]
    plain = [
        name for name in files if name.count(".") == 1
    ]  # the others are variants: "model.fp16.safetensors"
    return any(name.endswith(INDEX) for name in names) or 1 in (len(files), len(plain))


def contents(folder: str, kind: str) -> Iterator[str]:
    """The path of everything that a model's folder is read from; of a pipeline, of what is in its folders as well."""
    with os.scandir(folder) as entries:
        found = list(entries)
    pipeline = is_pipeline([entry.name for entry in found], kind)
    for entry in found:
        yield entry.path
        if pipeline and entry.is_dir():
            with os.scandir(entry.path) as inner:
                yield from [below.path for below in inner]


def stats(folder: str, kind: str) -> list[tuple[str, os.stat_result]]:
    """All that a model's folder is read from, by path.

    Raises:
        OSError: for a folder that cannot be read, or a link in it that leads nowhere.
    """
    return sorted((inside, os.stat(inside)) for inside in contents(folder, kind))


def size(found: Iterable[tuple[str, os.stat_result]]) -> int:
    """What a folder counts as `ModelRef.size`: the bytes of its safetensors files, by its `stats`."""
    return sum(each.st_size for inside, each in found if inside.endswith(".safetensors"))
