"""ARCHITECTURE.md names every file, and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def named() -> set[str]:
    """Files that the list names, below the package whose heading they stand under."""
    files, package = set(), ""
    for line in TEXT.split("## One line for each file")[1].splitlines():
        if heading := re.match(r"\*\*(xditd/\w+)\*\*", line):
            package = heading.group(1)
        elif line.startswith("**Elsewhere"):
            break
        files |= {f"{package}/{name}" for name in re.findall(r"`([\w/]+\.py)`", line)}
    return files


def test_every_file_has_its_line() -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "xditd").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named() == there


def test_the_life_of_a_request_passes_through_real_files() -> None:
    life = TEXT.split("## The life of a request")[1].split("## Who may import")[0]
    missing = [
        name for name in re.findall(r"`(\w+/[\w/]+\.py)`", life) if not (ROOT / "xditd" / name).is_file()
    ]
    assert missing == []
