"""What a scrape of a real daemon says, read by Prometheus' own parser, after work whose counts are known."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.live.conftest import Serve
from tests.live.service import wait_for
from xditd.protocol.messages import PlanRequest

ROOT = Path(__file__).parents[2]
X = torch.zeros(1, 16, 4, 4)  # 1024 bytes
ONE = PlanRequest(devices=("0",))


class Page:
    """One scrape."""

    def __init__(self, port: int, accept: str = "text/plain") -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=30) as answer:
            self.text = answer.read().decode()
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name and those labels."""
        (value,) = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return value


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def service(serve: Serve, port: int):
    return serve(**{"metrics.port": port, "restart.backoff": 0.1})


def test_counters_are_right_after_known_work(service, port):
    with service.client(name="a program") as client:
        with client.open_run("echo/echo", ONE) as run:
            run.put_conditioning("c", {"context": X})  # 1024 bytes in
            for _ in range(3):
                run.denoise([(X, (1.0,), "c")])  # 1024 in, 1024 out
            run.sample(X, [1.0, 0.5, 0.0], "c")  # 1024 in, 1024 out, two turns
        open_run = client.open_run("echo/echo", ONE, label="left open")
        client.cancel(open_run.id)
        with pytest.raises(Exception, match="There is no"):
            client.load("vae/nowhere.safetensors")
        page = Page(port)
        assert page.value("xditd_runs_ended_total", outcome="closed") == 1
        assert page.value("xditd_runs_ended_total", outcome="run_cancelled") == 1
        assert page.value("xditd_step_seconds_count", work="denoise") == 3
        assert page.value("xditd_step_seconds_count", work="sample") == 2
        assert page.value("xditd_step_seconds_bucket", work="denoise", le="+Inf") == 3
        assert page.value("xditd_handoff_bytes_total", direction="in", way="memory") == 5 * 1024
        assert page.value("xditd_handoff_bytes_total", direction="out", way="memory") == 4 * 1024
        assert page.value("xditd_handoff_bytes_total", direction="in", way="frames") == 0
        assert page.value("xditd_failures_total", code="model_not_visible") == 1
        assert page.value("xditd_clients") == 1
        assert page.value("xditd_groups", state="ready") == 1
        assert page.value("xditd_groups", state="starting") == 0
        assert page.value("xditd_arena_bytes") == 4 << 20
        assert page.value("xditd_queue_length") == 0
        assert page.value("xditd_state", state="serving") == 1
        assert page.value("xditd_device_memory_total_bytes", device="cpu:0") > 1 << 28
        assert page.value("xditd_loop_answer_seconds") < 5
        assert page.value("process_open_fds") > 5
    wait_for(lambda: Page(port).value("xditd_clients") == 0, "the client to be gone")


def test_tensors_in_frames_are_counted_as_such(service, port):
    with service.client(shared_memory=False) as client, client.open_run("echo/echo", ONE) as run:
        run.put_conditioning("c", {"context": X})
        run.denoise([(X, (1.0,), "c")])
        page = Page(port)
        assert page.value("xditd_handoff_bytes_total", direction="in", way="frames") == 2048
        assert page.value("xditd_handoff_bytes_total", direction="out", way="frames") == 1024


def test_a_killed_rank_is_a_failure_and_a_restart(service, port):
    with service.client() as client, client.open_run("echo/echo", ONE) as run:
        run.put_conditioning("c", {"context": X})
        run.denoise([(X, (1.0,), "c")])
        before = Page(port)
        assert before.value("xditd_group_failures_total", code="rank_lost") == 0, "there before it happens"
        os.kill(client.status().groups[0].ranks[0].pid, signal.SIGKILL)
        run.denoise([(X, (1.0,), "c")])
        after = Page(port)
        assert after.value("xditd_group_failures_total", code="rank_lost") == 1
        assert after.value("xditd_group_restarts_total") == before.value("xditd_group_restarts_total") + 1


def test_both_formats_parse_and_nothing_is_named_against_the_conventions(service, port):
    accept = "application/openmetrics-text; version=1.0.0"
    families = list(openmetrics.text_string_to_metric_families(Page(port, accept).text))
    assert {"xditd_step_seconds", "xditd_runs_ended"} <= {family.name for family in families}
    for family in families:
        assert re.fullmatch(r"(xditd|process)_[a-z0-9_]+", family.name)
        assert family.documentation, family.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        assert not re.search(r"_(ms|milliseconds|mib|percent|count)$", family.name)


def test_labels_do_not_grow_with_clients_runs_and_models(service, port):
    def series() -> int:
        return len(re.findall(r"^xditd_\w+", Page(port).text, re.MULTILINE))

    with service.client() as client, client.open_run("echo/echo", ONE):
        pass
    before = series()
    for number in range(5):
        with service.client(name=f"client {number}") as client:
            with client.open_run("echo/echo", ONE, label=f"label {number}"):
                pass
            with pytest.raises(Exception, match="There is no"):
                client.load(f"vae/nowhere-{number}.safetensors")
    assert series() <= before + 1, "one more: the first failure's code"


def test_a_client_that_stops_in_the_middle_of_its_request_holds_up_nothing(service, port):
    with socket.create_connection(("127.0.0.1", port)) as dawdler:
        dawdler.sendall(b"GET /metrics HTTP/1.1\r\n")  # and no more
        with service.client() as client, client.open_run("echo/echo", ONE) as run:
            run.put_conditioning("c", {"context": X})
            run.denoise([(X, (1.0,), "c")])
        assert Page(port).value("xditd_step_seconds_count", work="denoise") == 1


def test_more_scrapes_at_a_time_than_there_are_places_are_hung_up_on(service, port):
    dawdlers = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    try:
        for dawdler in dawdlers:
            dawdler.sendall(b"GET /metrics HTTP/1.1\r\n")
        with socket.create_connection(("127.0.0.1", port)) as late:
            late.settimeout(4)
            assert late.recv(1) == b""
    finally:
        for dawdler in dawdlers:
            dawdler.close()
    wait_for(lambda: _scraped(port), "a place to be free")


def _scraped(port: int) -> bool:
    try:
        return bool(Page(port).families)
    except OSError:
        return False


def test_many_scrapes_at_once_are_all_the_truth(service, port):
    pages: list[Page] = []
    threads = [threading.Thread(target=lambda: pages.append(Page(port))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [page.value("xditd_state", state="serving") for page in pages] == [1] * 6


def test_without_a_port_nothing_listens_and_a_port_that_is_taken_is_named(serve, port):
    assert "metrics" not in _threads(serve())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(AssertionError, match=f"Metrics cannot be served on 127.0.0.1 port {port}"):
            serve(**{"metrics.port": port})


def _threads(service) -> list[str]:
    folder = Path(f"/proc/{service.process.pid}/task")
    return [(task / "comm").read_text().strip() for task in folder.iterdir()]


# --------------------------------------------------------------------------------- what is written about them


def exported(page: Page) -> set[str]:
    """Names as a query may have them."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    names = set()
    for family in page.families.values():
        names |= {family.name + end for end in endings.get(family.type, ("",))}
    return names


def documented() -> list[str]:
    """Names in the table of docs/metrics.md."""
    return re.findall(r"^\| `(xditd_\w+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)


def test_the_dashboard_asks_only_for_what_is_exported(service, port):
    board = json.loads((ROOT / "docs/grafana/xditd.json").read_text())
    assert board["uid"] == "xditd"
    assert board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    there = exported(Page(port))
    asked: set[str] = set()
    for panel in board["panels"]:
        assert {"title", "type", "gridPos"} <= panel.keys()
        for target in panel.get("targets", []):
            asked |= set(re.findall(r"\b(?:xditd|process)_\w+", target["expr"]))
    assert asked <= there, asked - there
    assert len(asked) >= 15


def test_the_dashboard_leaves_nothing_out_that_is_documented():
    """In a panel, or, as xditd_info, in what there is to choose from above them."""
    board = json.loads((ROOT / "docs/grafana/xditd.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    asked += [variable["query"] for variable in board["templating"]["list"]]
    there = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bxditd_\w+", " ".join(asked))
    }
    assert set(documented()) - there == set()


def test_the_documentation_lists_exactly_what_is_exported(service, port):
    rows = documented()
    families = Page(port).families.values()
    there = {
        f.name + ("_total" if f.type == "counter" else "") for f in families if f.name.startswith("xditd")
    }
    assert sorted(rows) == sorted(there)
