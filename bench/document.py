"""The part of a document that a measurement writes; the words around it are people's."""

from __future__ import annotations

from pathlib import Path


def rewrite(document: Path, begin: str, text: str, end: str) -> None:
    """Puts a text between two marks, in place of what is there.

    Raises:
        ValueError: one of the marks is not in the document, or not once.
    """
    whole = document.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"{document} has to have the marks {begin} and {end}, each once.")
    head, tail = whole.partition(begin)[0], whole.partition(end)[2]
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
