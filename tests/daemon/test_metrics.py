"""The metrics without a daemon: a loop that hangs, figures that are not told, what is not installed."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.cli import reports
from xditd.daemon import config, metrics
from xditd.daemon.metrics import Metrics
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels' values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(counted: Metrics) -> dict[tuple[str, ...], float]:
    return samples(generate_latest(counted.registry).decode())


@pytest.fixture
def counted():
    """Metrics that serve nobody, of a loop in a thread of its own with the report of `reports`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made = Metrics(config.Metrics())
    made.registry.register(metrics._Live(reports.report, loop))
    made.loop = loop
    yield made
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_report_becomes_gauges_and_what_is_not_told_has_no_sample(counted):
    told = scraped(counted)
    assert told["xditd_device_power_watts", "cuda:0"] == 612.4
    assert ("xditd_device_power_watts", "cuda:1") not in told
    assert told["xditd_device_utilization_ratio", "cuda:0"] == 0.97
    assert told["xditd_device_nvlinks_up", "cuda:0"] == 17
    assert told["xditd_device_throttled", "cuda:0", "power_cap"] == 1
    assert told["xditd_device_throttled", "cuda:0", "hardware_thermal"] == 0
    assert not [key for key in told if key[:2] == ("xditd_device_throttled", "cuda:1")]
    assert (told["xditd_runs", "working"], told["xditd_runs", "queued"], told["xditd_queue_length",]) == (
        1,
        1,
        1,
    )
    assert (told["xditd_groups", "ready"], told["xditd_groups", "failed"]) == (1, 1)


def test_a_loop_that_hangs_costs_the_gauges_and_the_counters_are_told(counted, monkeypatch):
    monkeypatch.setattr(metrics, "PATIENCE", 0.05)
    go_on = threading.Event()
    counted.loop.call_soon_threadsafe(go_on.wait)
    counted.run_ended("")
    told = scraped(counted)
    assert told["xditd_runs_ended_total", "closed"] == 1
    assert told["xditd_loop_answer_seconds",] >= 0.05
    assert not [key for key in told if key[0] == "xditd_groups"]
    go_on.set()


def test_a_storm_of_scrapes_asks_the_loop_a_few_times_only(counted, monkeypatch):
    asked = []
    monkeypatch.setattr(metrics, "FRESH", 1000.0)
    live = metrics._Live(lambda: asked.append(1) or reports.report(), counted.loop)
    for _ in range(50):
        list(live.collect())
    assert len(asked) == 1
    monkeypatch.setattr(metrics, "FRESH", 0.0)
    list(live.collect())
    assert len(asked) == 2


def test_a_code_that_nobody_has_listed_is_other(counted):
    for number in range(5):
        counted.answered(m.Failed(re=1, code=f"made_up_{number}", message=""))
    assert scraped(counted)["xditd_failures_total", "other"] == 5


def test_what_is_not_installed_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(XditError, match=r"pip install 'xditd\[daemon\]'") as caught:
        Metrics(config.Metrics(port=9469))
    assert caught.value.code is Code.BAD_CONFIG
