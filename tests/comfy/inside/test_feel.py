"""What a user sees on a node while it waits, and afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from comfy_nodes import daemon, sampling, say, status
from tests.comfy.inside.conftest import load
from tests.comfy.inside.test_model import ksampler
from tests.live.service import Service
from xditd.client import Degraded
from xditd.protocol import messages as m
from xditd.protocol.errors import XditError


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for module in (daemon, sampling):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (m.Queued(re=1, run=3, position=2, phase="waiting"), "⏳ a model: 2 before it"),
        (m.Queued(re=1, run=3, position=0, phase="loading"), "⏳ a model: loading"),
        (m.Rebound(re=1, run=3, group="g2", reason="its group g1 died"), "⚠️ its group g1 died: it goes on with g2; the result is a true one"),
        (Degraded("ae.safetensors", "one device did it"), "⚠️ a model: degraded: one device did it"),
    ],
    ids=["in the queue", "while the model loads", "when ranks died", "when less did it"],
)  # fmt: skip
def test_waiting_is_told(said: list[str], event: Any, line: str) -> None:
    daemon.telling("a model")(event)
    assert said == [line]


def test_a_model_that_has_to_be_loaded_says_how_far_it_is(service: Service, said: list[str]) -> None:
    model = load(service)
    daemon.client(service.endpoint).unload(group=daemon.client(service.endpoint).status().groups[0].group)
    ksampler(model)
    assert "⏳ flux.safetensors: loading" in said


def test_the_status_node_tells_what_xditctl_tells(service: Service) -> None:
    load(service)
    text = status.describe(daemon.client(service.endpoint).status())
    assert "✅ xditd" in text
    assert "flux.safetensors on cpu:0 in float32" in text
    assert "0 runs, 0 waiting" in text


def test_nodes_of_several_threads_share_one_connection(service: Service) -> None:
    clients: list[Any] = []
    threads = [
        threading.Thread(target=lambda: clients.append(daemon.client(service.endpoint))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(client) for client in clients}) == 1


def test_a_refusal_is_on_the_node_too(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(say, "say", said.append)
    with pytest.raises(XditError), say.telling_refusals():
        raise XditError("not_built", "Not yet; choose another.")
    assert said == ["❌ Not yet; choose another."]
