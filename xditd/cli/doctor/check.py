"""What one check found."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from xditd.cli import words


class Check(Struct, frozen=True, kw_only=True):
    """One component: ok, worse than it could be, or not working."""

    component: str
    state: Literal["ok", "warning", "failed"]
    found: str  # what is there
    cure: str = ""  # what to do about it; "" where there is nothing to cure

    @property
    def mark(self) -> str:
        return {"ok": words.OK, "warning": words.WARNING, "failed": words.FAILED}[self.state]


def ok(component: str, found: str) -> Check:
    return Check(component=component, state="ok", found=found)


def warning(component: str, found: str, cure: str) -> Check:
    return Check(component=component, state="warning", found=found, cure=cure)


def failed(component: str, found: str, cure: str) -> Check:
    return Check(component=component, state="failed", found=found, cure=cure)


def version(text: str) -> tuple[int, ...]:
    """Numbers of a version, to compare: (2, 13, 0) of "2.13.0+cpu"."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
