"""A description of a tensor is true, or refused before anybody reads or maps its bytes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import ALIGNMENT, ITEMSIZE, Tensor, check, check_apart

SEGMENTS = {3: 4096, 4: 64}
FRAMES = [32, 0, 4096]


def tensor(**changes) -> Tensor:
    return Tensor(**({"dtype": "float32", "shape": (2, 4), "segment": 3, "offset": 128} | changes))


def refused(code: Code, word: str, **changes) -> None:
    with pytest.raises(XditError) as caught:
        check(tensor(**changes), "x", segments=SEGMENTS, frames=FRAMES)
    assert caught.value.code is code
    assert caught.value.message.startswith("x ")
    assert word in caught.value.message


def test_what_is_true_passes():
    check(tensor(), "x", segments=SEGMENTS, frames=[])
    check(tensor(offset=4096 - 64, shape=(16,)), "x", segments=SEGMENTS, frames=[])
    check(tensor(segment=4, offset=0, shape=(64,), dtype="uint8"), "x", segments=SEGMENTS, frames=[])
    check(tensor(segment=None, offset=0, frame=0), "x", segments={}, frames=FRAMES)
    check(tensor(shape=()), "x", segments=SEGMENTS, frames=[])


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"dtype": "float8_e4m3fn"}, Code.BAD_TENSOR, "dtypes that travel"),
        ({"dtype": ""}, Code.BAD_TENSOR, "dtype"),
        ({"shape": (1,) * 9}, Code.BAD_TENSOR, "9 dimensions"),
        ({"shape": (1025,)}, Code.BAD_SLOT, "beyond the end"),
        ({"offset": 4096}, Code.BAD_SLOT, "beyond the end"),
        ({"offset": 2**53 // 64 * 64}, Code.BAD_SLOT, "beyond the end"),
        ({"shape": (2**31,) * 8}, Code.BAD_SLOT, "beyond the end"),
        ({"offset": 4}, Code.BAD_SLOT, "multiple of 64"),
        ({"segment": 5}, Code.BAD_SLOT, "does not hold"),
        ({"segment": None, "frame": 3}, Code.BAD_SLOT, "the message has 3"),
        ({"segment": None, "frame": 1}, Code.BAD_TENSOR, "its frame has 0"),
        ({"segment": None, "frame": 2}, Code.BAD_TENSOR, "its frame has 4096"),
        ({"segment": None}, Code.BAD_SLOT, "either a segment or a frame"),
        ({"frame": 0}, Code.BAD_SLOT, "either a segment or a frame"),
    ],
)
def test_what_cannot_be_true_is_refused(changes, code, word):
    refused(code, word, **changes)


def test_a_refusal_tells_nothing_of_other_clients_segments():
    """Triton's CVE-2025-23320: the error named an internal segment. Ours names no segment at all."""
    with pytest.raises(XditError) as caught:
        check(tensor(segment=77), "x", segments=SEGMENTS, frames=[])
    assert not any(character.isdigit() for character in caught.value.message)


anywhere = st.builds(
    Tensor,
    dtype=st.sampled_from([*ITEMSIZE, "complex64"]),
    shape=st.lists(st.integers(1, 64) | st.integers(1, 2**31), max_size=9).map(tuple),
    segment=st.none() | st.integers(0, 9),
    offset=st.integers(0, 80).map(lambda n: n * ALIGNMENT) | st.integers(0, 2**53),
    frame=st.none() | st.integers(0, 5),
)
sizes = st.dictionaries(st.integers(0, 9), st.integers(1, 2**20), max_size=6)


@given(anywhere, sizes, st.lists(st.integers(0, 2**20), max_size=5))
def test_what_passes_lies_wholly_where_it_says(description, segments, frames):
    try:
        check(description, "x", segments=segments, frames=frames)
    except XditError:
        return
    nbytes = math.prod(description.shape) * ITEMSIZE[description.dtype]
    if description.frame is not None:
        assert frames[description.frame] == nbytes
    else:
        assert description.offset % ALIGNMENT == 0
        assert description.offset + nbytes <= segments[description.segment]


spans = st.builds(
    Tensor,
    dtype=st.just("uint8"),
    shape=st.integers(1, 300).map(lambda n: (n,)),
    segment=st.sampled_from([None, 1, 2]),
    offset=st.integers(0, 12).map(lambda n: n * ALIGNMENT),
    frame=st.none(),
)


@given(st.lists(spans, max_size=4), st.lists(spans, max_size=4))
def test_outputs_are_apart_if_and_only_if_they_share_no_byte(outputs, inputs):
    def bytes_of(t: Tensor) -> set[tuple[int, int]]:
        return set() if t.segment is None else {(t.segment, t.offset + i) for i in range(t.nbytes)}

    others: set[tuple[int, int]] = set().union(*(bytes_of(t) for t in inputs))
    apart = True
    for t in outputs:
        apart = apart and not bytes_of(t) & others
        others |= bytes_of(t)
    named = [(f"out {i}", t) for i, t in enumerate(outputs)], [(f"x {i}", t) for i, t in enumerate(inputs)]
    if apart:
        check_apart(*named)
    else:
        with pytest.raises(XditError) as caught:
            check_apart(*named)
        assert caught.value.code is Code.BAD_SLOT


def test_inputs_may_share_bytes_and_outputs_may_not():
    x = tensor()
    check_apart([], [("x of item 0", x), ("x of item 1", x)])
    with pytest.raises(XditError, match=r"out of item 1 overlaps out of item 0"):
        check_apart([("out of item 0", x), ("out of item 1", tensor(offset=64, shape=(32,)))], [])
    check_apart([("a", x), ("b", tensor(segment=4))], [("x", tensor(offset=192))])
