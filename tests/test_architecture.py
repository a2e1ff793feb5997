"""ARCHITECTURE.md names every file, and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def named() -> set[str]:
    """Files that the list names, below the package whose heading they stand under."""
    files, package = set(), ""
    for line in TEXT.split("## One line for each file")[1].splitlines():
        if heading := re.match(r"\*\*(xditd/\w+|comfy_nodes)\*\*", line):
            package = heading.group(1)
        elif line.startswith("**"):
            package = ""
        if package:
            files |= {f"{package}/{name}" for name in re.findall(r"`([\w/]+\.py)`", line)}
    return files


def test_every_file_has_its_line() -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("xditd", "comfy_nodes")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named() - {"comfy_nodes/__init__.py"} == there


@pytest.mark.parametrize(
    ("title", "folder"),
    [("The life of a request", "xditd"), ("The life of a step in ComfyUI", "comfy_nodes")],
)
def test_a_life_passes_through_real_files(title: str, folder: str) -> None:
    life = TEXT.split(f"## {title}")[1].split("\n## ")[0]
    names = re.findall(r"`([\w/]+\.py)`", life)
    assert names
    assert [name for name in names if not any((ROOT / base / name).is_file() for base in (folder, "."))] == []
