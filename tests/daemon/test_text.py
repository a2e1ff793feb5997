"""A request to encode text: which of its tensors are written to, what becomes of it, and what answers it."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from xditd.daemon import work
from xditd.daemon.runs import Asked
from xditd.daemon.session import Session, places
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.codec import decode, encode
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor


def slot(offset: int, *shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(dtype=dtype, shape=shape, segment=1, offset=offset)


ASKED = m.EncodeText(
    id=9,
    run=4,
    tokens=slot(0, 1, 4, dtype="int32"),
    vectors=slot(64, 2, 8),
    mask=slot(128, 1, 4, dtype="uint8"),
    layer=-2,
    final_norm=False,
    pooled="plain",
    out=slot(192, 1, 4, 8),
    pooled_out=slot(320, 1, 8),
)
PLAIN = m.EncodeText(id=9, run=4, tokens=slot(0, 1, 4, dtype="int32"))


@pytest.mark.parametrize("message", [ASKED, PLAIN])
def test_it_travels_as_it_is(message):
    assert decode(encode(message), m.Request, m.REQUESTS) == message


def test_its_outputs_are_written_to_and_nothing_else():
    assert [(what, written) for what, _, written in places(ASKED)] == [
        ("tokens", False),
        ("vectors", False),
        ("mask", False),
        ("out", True),
        ("pooled_out", True),
    ]
    assert [what for what, _, _ in places(PLAIN)] == ["tokens"]


@pytest.mark.parametrize("field", ["tokens", "vectors", "mask", "pooled_out"])
def test_an_output_shares_no_byte_with_another_slot(field):
    arena = SimpleNamespace(segments={1: 4096})
    session = Session(peer=b"p", name="n", pid=1, arena=arena, last_id=0, heard=0.0)
    session.check(ASKED, [])
    other = msgspec.structs.replace(getattr(ASKED, field), offset=192)
    with pytest.raises(XditError) as refused:
        session.check(msgspec.structs.replace(ASKED, **{field: other}), [])
    assert refused.value.code is Code.BAD_SLOT


def test_it_is_one_turn_with_all_that_was_asked():
    turn = work.turn(3, 4, Asked(ASKED))
    assert isinstance(turn, o.TurnEncodeText)
    assert (turn.order, turn.run) == (3, 4)
    for field in ("tokens", "vectors", "mask", "layer", "final_norm", "pooled", "out", "pooled_out"):
        assert getattr(turn, field) == getattr(ASKED, field)
    assert Asked(ASKED).turns == 1


def test_the_answer_has_what_the_rank_put_out():
    hidden, pooled = (Tensor(dtype="float32", shape=(1, n), frame=i) for i, n in enumerate((4, 8)))
    frames = [b"hidden", b"pooled"]
    done = o.TurnDone(order=3, outputs=(hidden, pooled), seconds=0.5)
    answer, sent = work.answer(Asked(ASKED, seconds=0.5), done, frames)
    assert answer == m.TextEncoded(re=9, hidden=hidden, pooled=pooled, seconds=0.5)
    assert sent == frames
    done = o.TurnDone(order=3, outputs=(hidden,), seconds=0.5)
    answer, _ = work.answer(Asked(PLAIN), done, frames[:1])
    assert answer.pooled is None
