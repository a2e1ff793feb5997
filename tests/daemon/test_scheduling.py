"""The choice among replicas, played on loads that are made up, with a clock that is only counted."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import pytest

from xditd.daemon.scheduling import POLICIES, Candidate, Rota, learn


def some(*names: str, **equal) -> list[Candidate]:
    return [Candidate(name, **equal) for name in names]


def test_round_robin_goes_round_and_over_those_that_are_not_there():
    rota = Rota()
    picks = [rota.choose("round_robin", some("a", "b", "c")).name for _ in range(4)]
    assert picks == ["a", "b", "c", "a"]
    assert rota.choose("round_robin", some("a", "c")).name == "c"
    assert rota.choose("round_robin", some("b")).name == "b"  # there is no choice, and no turn is used up
    assert rota.choose("round_robin", some("a", "b", "c")).name == "a"


def test_least_loaded_takes_what_has_least_before_it():
    there = [Candidate("a", ahead=2.0), Candidate("b", ahead=1.0), Candidate("c", ahead=1.0)]
    assert Rota().choose("least_loaded", there).name == "b"


def test_weighted_round_robin_is_smooth():
    rota = Rota()
    there = [Candidate("a", weight=5), Candidate("b", weight=1), Candidate("c", weight=1)]
    assert "".join(rota.choose("weighted_round_robin", there).name for _ in range(7)) == "aabacaa"


def test_without_weights_the_measured_speed_is_the_weight():
    rota = Rota()
    there = [Candidate("slow", seconds=3.0), Candidate("fast", seconds=1.0)]
    picks = Counter(rota.choose("weighted_round_robin", there).name for _ in range(40))
    assert picks == {"slow": 10, "fast": 30}


def test_adaptive_weighs_what_is_before_against_how_fast_it_goes():
    slow, fast = Candidate("slow", seconds=3.0), Candidate("fast", seconds=1.0, ahead=1.0)
    assert Rota().choose("adaptive", [slow, fast]).name == "fast"
    busy = Candidate("fast", seconds=1.0, ahead=3.0)
    assert Rota().choose("adaptive", [slow, busy]).name == "slow"


def test_adaptive_prefers_what_is_warm_and_tries_what_is_new():
    warm, cold = Candidate("warm", seconds=1.0), Candidate("cold", warm=False)
    assert Rota().choose("adaptive", [cold, warm]).name == "warm"
    busy = Candidate("warm", seconds=1.0, ahead=2.0)
    assert Rota().choose("adaptive", [cold, busy]).name == "cold"


def test_a_large_piece_of_work_waits_for_the_fast_one():
    slow, fast = Candidate("slow", seconds=3.0), Candidate("fast", seconds=1.0, ahead=3.0)
    assert Rota().choose("adaptive", [slow, fast], effort=1.0).name == "slow"
    assert Rota().choose("adaptive", [slow, fast], effort=4.0).name == "fast"


def test_learned_seconds_follow_a_group_that_slows_down():
    known = None
    for seconds in [1.0] * 5 + [3.0] * 20:
        known = learn(known, seconds)
    assert 2.9 < known <= 3.0


# ------------------------------------------------------------------------------------------- simulations


@dataclass
class Server:
    """A replica that does its runs one after the other."""

    name: str
    seconds: float
    free_at: float = 0.0
    queue: int = 0
    learned: float | None = None


def makespan(policy: str, servers: list[Server], runs: int, every: float = 0.0) -> float:
    """When the last of the runs is done; one arrives `every` so many seconds."""
    rota, done = Rota(), []
    for number in range(runs):
        now = number * every
        while done and done[0][0] <= now:
            _, index = heapq.heappop(done)
            one = servers[index]
            one.queue -= 1
            one.learned = learn(one.learned, one.seconds)
        there = [
            Candidate(s.name, ahead=s.queue, seconds=s.learned, warm=s.learned is not None) for s in servers
        ]
        name = rota.choose(policy, there).name
        (chosen,) = (s for s in servers if s.name == name)
        chosen.free_at = max(chosen.free_at, now) + chosen.seconds
        chosen.queue += 1
        heapq.heappush(done, (chosen.free_at, servers.index(chosen)))
    return max(s.free_at for s in servers)


def uneven() -> list[Server]:
    return [Server("a", 1.0), Server("b", 1.0), Server("c", 1.0), Server("d", 3.0)]


@pytest.mark.parametrize("policy", ["adaptive", "weighted_round_robin"])
def test_one_replica_three_times_slower_costs_round_robin_half_as_much_again(policy):
    """At a rate that the four can just keep up with: they learn as they go, from nothing."""
    slow = makespan("round_robin", uneven(), 400, every=0.31)
    quick = makespan(policy, uneven(), 400, every=0.31)
    print(f"round_robin {slow:.0f} s, {policy} {quick:.0f} s: {slow / quick:.2f} ×")
    assert slow / quick >= 1.5


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_replicas_are_filled_evenly(policy):
    servers = [Server(name, 1.0) for name in "abcd"]
    assert makespan(policy, servers, 400, every=0.25) <= 102
    assert max(s.free_at for s in servers) - min(s.free_at for s in servers) <= 3


def test_deciding_among_sixteen_is_quick():
    """Counted, not timed: no candidate is looked at more than a few times."""
    looked = Counter()

    class Watched(Candidate):
        def __getattribute__(self, name):
            looked[name] += 1
            return super().__getattribute__(name)

    there = [Watched(str(i), seconds=1.0) for i in range(16)]
    for policy in POLICIES:
        Rota().choose(policy, there)
    assert sum(looked.values()) < 16 * 20
