"""Numbers and plans as people read them, exit statuses as scripts do."""

from __future__ import annotations

import pytest

from xditd.cli import exits, words
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef, Plan


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (41 << 30, "41.0 GiB"),
        (140 << 30, "140 GiB"),
        (None, "–"),
    ],
)
def test_sizes(nbytes, text):
    assert words.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.416, "0.42 s"),
        (8.31, "8.3 s"),
        (60, "1 min"),
        (134, "2 min 14 s"),
        (11103, "3 h 5 min"),
        (190000, "2 d 4 h"),
        (None, "–"),
    ],
)
def test_durations(seconds, text):
    assert words.duration(seconds) == text


def test_shares_name_a_unit_once():
    assert words.share(41 << 30, 140 << 30) == "41.0 of 140 GiB"
    assert words.share(128 << 20, 16 << 30) == "128 MiB of 16.0 GiB"
    assert words.share(None, 1) == ""


def test_counts_and_lists():
    assert (words.count(11_901_408_320), words.count(83_819_683), words.count(12)) == (
        "11.9 B",
        "83.8 M",
        "12",
    )
    assert (words.plural(0, "run"), words.plural(1, "run"), words.plural(2, "run")) == (
        "no runs",
        "1 run",
        "2 runs",
    )
    assert [words.joined(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_a_plan_is_its_degrees():
    assert words.degrees(Plan(devices=("0", "1", "2", "3"), ulysses=2, ring=2)) == "ulysses 2 × ring 2"
    assert words.degrees(Plan(devices=("0",))) == "1 device"


def test_a_part_is_named_where_it_matters():
    assert words.model(ModelRef(kind="vae", name="ae.safetensors", part="vae")) == "vae/ae.safetensors"
    assert words.model(ModelRef(kind="checkpoints", name="x.sft", part="vae")) == "checkpoints/x.sft (vae)"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.DAEMON_NOT_FOUND, 3),
        (Code.DAEMON_LOST, 3),
        (Code.BAD_PLAN, 4),
        (Code.MODEL_NOT_VISIBLE, 4),
        (Code.QUEUE_FULL, 4),
        (Code.RANK_LOST, 1),
        (Code.OUT_OF_MEMORY, 1),
        (Code.TIMEOUT, 5),
        (Code.BAD_CONFIG, 78),
        ("a_code_of_tomorrow", 1),
    ],
)
def test_each_kind_of_error_has_its_exit_status(code, status):
    assert exits.status_of(XditError(code, "x")) == status


def test_no_code_has_two_statuses():
    listed = [code for codes in exits._STATUS.values() for code in codes]
    assert len(listed) == len(set(listed))
