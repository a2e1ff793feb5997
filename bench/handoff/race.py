"""The peers in turns: A B C … A B C …, so that whatever else the machine does meets them all alike.

A turn is a few untimed calls and a timed one, whose answer is compared whole. Who follows whom changes from round
to round. Knows nothing of any peer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch

from bench.handoff.echo import Echo, same
from bench.handoff.payloads import PAUSE, Payload, refill, renew
from bench.handoff.peers import Peer

Times = dict[str, dict[str, list[float]]]
"""Seconds by payload and peer, one for each round: the same index is the same round."""


class WrongAnswer(Exception):
    """A peer answered something else than it should have."""


def race(
    peers: Sequence[Peer],
    payloads: Sequence[Payload],
    rounds: int,
    seed: int,
    settle: Callable[[], None] = lambda: None,
    on_turn: Callable[[], None] = lambda: None,
) -> Times:
    """Runs the rounds.

    Args:
        peers: started ones.
        rounds: of payload S; the others take their share of it, at least 3.
        settle: called before every turn.
        on_turn: called after every turn.

    Raises:
        WrongAnswer: an answer was not that of the inputs of the same call.
    """
    generator, order, echo = torch.Generator().manual_seed(seed), random.Random(seed), Echo()
    inputs = {payload.name: payload.inputs_in_memory() for payload in payloads}
    times: Times = {payload.name: {} for payload in payloads}
    for number in range(rounds):
        for payload in payloads:
            if number >= rounds_of(payload, rounds):
                continue
            taking = [peer for peer in peers if payload.travels in peer.payloads]
            for peer in order.sample(taking, len(taking)):
                settle()
                seconds = _turn(peer, payload, inputs[payload.name], generator, echo)
                times[payload.name].setdefault(peer.name, []).append(seconds)
                on_turn()
    return times


def rounds_of(payload: Payload, rounds: int) -> int:
    return min(rounds, max(3, round(rounds * payload.share)))


def _turn(
    peer: Peer, payload: Payload, inputs: dict[str, torch.Tensor], generator: torch.Generator, echo: Echo
) -> float:
    refill(inputs, generator)
    if payload.again:
        peer.prepare("M")
        peer.once("M", inputs)
    for _ in range(payload.warm_ups):
        renew(payload, inputs, generator)
        peer.prepare(payload.travels)
        peer.once(payload.travels, inputs)
    renew(payload, inputs, generator)
    peer.prepare(payload.travels)
    if payload.paced:
        time.sleep(PAUSE)
    begin = time.perf_counter()
    answer = peer.once(payload.travels, inputs)
    seconds = time.perf_counter() - begin
    if not same(answer, echo(inputs)):
        raise WrongAnswer(f"{peer.name} answered payload {payload.name} with other contents than were due.")
    return seconds
