"""A benchmark's daemon: where it fails, what it said is shown, though its client fails first."""

from __future__ import annotations

import psutil
import pytest

from bench.daemon import serving
from tests.live.service import wait_for
from xditd.client import Client

TALKER = "json.tool"
"""A module that ends at once and says why, when it is given a daemon's options."""


def talkers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [
        child for child in children if child.status() != psutil.STATUS_ZOMBIE and TALKER in child.cmdline()
    ]


def until_it_ended() -> None:
    wait_for(lambda: not talkers(), "it to end")


def test_a_daemon_that_ends_by_itself_is_an_error_with_its_last_words() -> None:
    with (
        pytest.raises(RuntimeError, match=r"ended with code 2 during the benchmark:\nusage: "),
        serving(TALKER),
    ):
        until_it_ended()


def test_its_last_words_are_shown_where_a_client_fails_first() -> None:
    lost = ConnectionError("the daemon is gone")

    def client() -> None:
        with serving(TALKER):
            until_it_ended()
            raise lost

    with pytest.raises(RuntimeError, match=r"during the benchmark:\nusage: ") as failure:
        client()
    assert failure.value.__cause__ is lost


def test_what_fails_beside_a_daemon_that_has_nothing_to_say_fails_as_it_is() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        serving(devices__kind="cpu", devices__cpu_ranks=1) as endpoint,
        Client(endpoint),
    ):
        raise ZeroDivisionError
