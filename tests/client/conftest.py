"""A daemon that answers by script, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.client.fake_daemon import FakeDaemon
from xditd.client import Client


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(str(tmp_path / "d")) as daemon:
        yield daemon


@pytest.fixture(params=["lane", "shared memory", "frames"])
def client(daemon: FakeDaemon, request: pytest.FixtureRequest) -> Iterator[Client]:
    """By every way that tensors and steps may take."""
    daemon.lanes = request.param == "lane"
    with Client(daemon.endpoint, shared_memory=request.param != "frames") as client:
        yield client


@pytest.fixture
def sharing(daemon: FakeDaemon) -> Iterator[Client]:
    """A client with shared memory."""
    with Client(daemon.endpoint) as client:
        yield client
