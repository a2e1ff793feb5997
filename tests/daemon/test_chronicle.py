"""What happened, and who is told: nothing twice, nothing lost that is kept, and nothing that grows with a slow reader."""

from __future__ import annotations

from xditd.daemon.chronicle import KEPT, Chronicle
from xditd.protocol import messages as m


class Readers:
    """Clients, by what they were sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, m.Happened | m.Watched]] = []
        self.chronicle = Chronicle(
            lambda peer, reply: self.sent.append((peer, reply)), lambda: 1_700_000_000.0
        )

    def numbers(self, peer: bytes = b"a") -> list[int]:
        return [reply.number for to, reply in self.sent if to == peer and isinstance(reply, m.Happened)]

    def answers(self, peer: bytes = b"a") -> list[m.Watched]:
        return [reply for to, reply in self.sent if to == peer and isinstance(reply, m.Watched)]

    def tell(self, times: int = 1) -> None:
        for _ in range(times):
            self.chronicle.tell("run_opened", run=7)


def test_a_watch_hears_what_comes_and_is_answered_when_it_has_heard_enough():
    readers = Readers()
    readers.tell(3)
    readers.chronicle.watch(b"a", m.Watch(id=5, count=2))
    assert readers.sent == []
    readers.tell(3)
    assert readers.numbers() == [4, 5]
    assert readers.answers() == [m.Watched(re=5, last=5)]
    first = readers.sent[0][1]
    assert (first.re, first.event, first.run, first.time) == (5, "run_opened", 7, 1_700_000_000.0)


def test_who_asks_on_misses_nothing():
    readers = Readers()
    readers.chronicle.watch(b"a", m.Watch(id=1, count=2))
    readers.tell(5)
    readers.chronicle.watch(b"a", m.Watch(id=2, after=readers.answers()[-1].last, count=2))
    readers.chronicle.watch(b"a", m.Watch(id=3, after=readers.answers()[-1].last, count=2))
    readers.tell(1)
    assert readers.numbers() == [1, 2, 3, 4, 5, 6]


def test_zero_is_all_that_is_kept_and_so_is_a_number_of_another_life():
    for after in (0, 10**9):
        readers = Readers()
        readers.tell(3)
        readers.chronicle.watch(b"a", m.Watch(id=1, after=after))
        assert readers.numbers() == [1, 2, 3]


def test_a_slow_reader_costs_a_bounded_number_of_messages_and_sees_what_it_missed_by_the_numbers():
    readers = Readers()
    readers.chronicle.watch(b"a", m.Watch(id=1, count=4))
    readers.tell(10 * KEPT)
    assert len(readers.sent) == 5
    assert len(readers.chronicle._kept) == KEPT
    readers.chronicle.watch(b"a", m.Watch(id=2, after=4, count=1))
    assert readers.numbers()[-1] == 9 * KEPT + 1


def test_another_watch_of_the_same_client_ends_the_one_before():
    readers = Readers()
    readers.chronicle.watch(b"a", m.Watch(id=1))
    readers.chronicle.watch(b"a", m.Watch(id=2))
    readers.tell()
    assert readers.answers() == [m.Watched(re=1, last=0)]
    assert [reply.re for _, reply in readers.sent] == [1, 2]


def test_a_client_that_is_gone_is_told_nothing_and_a_daemon_that_stops_answers_the_rest():
    readers = Readers()
    readers.chronicle.watch(b"a", m.Watch(id=1))
    readers.chronicle.watch(b"b", m.Watch(id=1))
    readers.chronicle.forget(b"a")
    readers.tell()
    readers.chronicle.close()
    assert readers.numbers(b"a") == []
    assert readers.answers(b"a") == []
    assert readers.numbers(b"b") == [1]
    assert readers.answers(b"b") == [m.Watched(re=1, last=1)]
