"""ComfyUI's extra_model_paths.yaml: which folders it adds to which kinds of models.

The format, as ComfyUI's documentation and example file have it: sections with any name; in each an optional
`base_path` ("~" and $VARIABLES are expanded, and it begins at the file's own folder unless absolute), an optional
`is_default` (its folders are searched before all others), and kinds with one folder a line, below base_path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xditd.protocol.errors import Code, XditError


@dataclass(frozen=True, slots=True)
class ExtraFolder:
    """One line of the file. `kind` is as the file spells it ("unet")."""

    kind: str
    folder: Path
    first: bool  # is_default


def read_extra_paths(path: Path) -> list[ExtraFolder]:
    """The folders of a file, in its order. They need not exist.

    Raises:
        XditError: `bad_config` where the file cannot be read or is not of the format.
    """
    try:
        import yaml
    except ImportError as error:
        raise XditError(
            Code.BAD_CONFIG, f"Reading {path} needs PyYAML: pip install 'xditd[daemon]'."
        ) from error
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise XditError(Code.BAD_CONFIG, f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise XditError(Code.BAD_CONFIG, f"{path} is not YAML: {reason}.") from error
    if sections is None:
        return []
    if not isinstance(sections, dict):
        raise _malformed(path, "", "must hold sections")
    folders: list[ExtraFolder] = []
    for title, section in sections.items():
        if section is None:
            continue
        if not isinstance(section, dict):
            raise _malformed(path, title, "must hold kinds of models and their folders")
        folders += _section(path, title, section)
    return folders


def _section(path: Path, title: Any, section: Mapping[Any, Any]) -> list[ExtraFolder]:
    base = section.get("base_path")
    if base is not None and not isinstance(base, str):
        raise _malformed(path, title, "must have a path as its base_path")
    here = path.absolute().parent
    below = here / os.path.expandvars(os.path.expanduser(base)) if base else here
    first = section.get("is_default", False)
    folders = []
    for kind, lines in section.items():
        if kind in ("base_path", "is_default"):
            continue
        if not isinstance(lines, str):
            raise _malformed(path, title, f"must give {kind} as text, one folder a line")
        for line in lines.splitlines():
            if line.strip():
                folder = Path(os.path.normpath(below / line.strip()))
                folders.append(ExtraFolder(str(kind), folder, bool(first)))
    return folders


def _malformed(path: Path, title: Any, fault: str) -> XditError:
    where = f"section {title} of {path}" if title else str(path)
    return XditError(Code.BAD_CONFIG, f"The {where} {fault}; see ComfyUI's extra_model_paths.yaml.example.")
