"""Folders that are one model, among those of a program that lists files alone, as ComfyUI does. Asks no daemon.

ComfyUI makes a node's list of choices whenever its page is loaded, with a daemon or without: so folders are looked for on
this side too, by the rule that the daemon has (`protocol.folders`). stdlib.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath

from xditd.protocol import folders


def offered(kind: str, roots: Sequence[str], files: Iterable[str]) -> list[str]:
    """The folders that the daemon lists as one model, sorted; those inside of a pipeline count as the pipeline's.

    Args:
        kind: as ComfyUI calls it: "vae".
        roots: ComfyUI's folders of the kind, in the order of search.
        files: that ComfyUI lists for the kind, relative to a root. A model's folder has weights somewhere below it: only
            folders above these are looked into.
    """
    above = {parent for name in files if name.endswith(".safetensors") for parent in _above(name)}
    return sorted(name for name in above if any(_is_listed(kind, root, name) for root in roots))


def find(kind: str, roots: Sequence[str], name: str) -> str | None:
    """The path of a folder that is one model, in the first root that has it; None where there is none."""
    paths = (os.path.join(root, name) for root in roots)
    return next((path for path in paths if folders.is_model(_names(path), kind)), None)


def size(kind: str, path: str) -> int:
    """What the daemon takes for the size of a model's folder, in bytes."""
    return folders.size(folders.stats(path, kind))


def _is_listed(kind: str, root: str, name: str) -> bool:
    """Whether a folder is a model, and in no pipeline."""
    pipelines = (folders.is_pipeline(_names(os.path.join(root, parent)), kind) for parent in _above(name))
    return folders.is_model(_names(os.path.join(root, name)), kind) and not any(pipelines)


def _above(name: str) -> Iterator[str]:
    """The folders that a name lies in, without its root."""
    return (os.fspath(parent) for parent in PurePath(name).parents if parent.name)


def _names(path: str) -> list[str]:
    """What is in a folder; nothing where it is gone, is a file, or is not ours to look into."""
    try:
        return os.listdir(path)
    except OSError:
        return []
