"""The demo's model draws what it is told, through the daemon and two ranks; and the judge sees where a strategy is wrong."""

from __future__ import annotations

import pytest

from tests.quality.exam import examined, sit
from tools.train_demo import dataset
from xditd.protocol.plans import PlanRequest

EXAM = dataset.exam(200)
SOME = 20
ENOUGH = 0.9


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with examined(tmp_path_factory.mktemp("s")) as client:
        yield client


def test_two_ranks_draw_what_captions_say_that_training_never_saw(client, capsys):
    score = sit(client, EXAM[:SOME], PlanRequest(ulysses=2))
    with capsys.disabled():
        print(f"\n  the judge, of {SOME} held-out captions under ulysses 2: {score}")
    assert score.fit >= ENOUGH * SOME, score.faults


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nine_in_ten_of_two_hundred_captions_are_drawn_right(client, capsys):
    score = sit(client, EXAM, PlanRequest(ulysses=2))
    with capsys.disabled():
        print(f"\n  the judge, of {len(EXAM)} held-out captions under ulysses 2: {score}")
    assert score.fit >= ENOUGH * len(EXAM), score.faults


def test_a_rank_that_predicts_zeros_is_seen(tmp_path, capsys):
    wrong = {"debug.rank_options": {"zero_output": "1", "only_rank": "1"}}
    with examined(tmp_path, **wrong) as client:
        score = sit(client, EXAM[:4], PlanRequest(ulysses=2))
    with capsys.disabled():
        print(f"\n  with zeros from one of two ranks: {score}")
    assert score.fit == 0
