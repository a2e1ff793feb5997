"""Arenas for the stories in this folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handoff.host import Host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    gc.collect()
    with Host(tmp_path / "a.sock") as host:
        yield host
