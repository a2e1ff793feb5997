"""The codec's short way, for headers that are byte for byte our own: it accepts nothing that the whole way refuses."""

from __future__ import annotations

import struct

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.structs import instances
from xditd.protocol import codec
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import XditError
from xditd.protocol.tensors import Tensor

UNIONS = {"request": m.Request, "reply": m.Reply, "order": o.Order, "report": o.Report}


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(list(UNIONS)))
def test_both_ways_read_and_write_the_same(data, which):
    """Any other MessagePack library's bytes of a message are our own bytes, so that they go the short way too."""
    union = UNIONS[which]
    message = data.draw(instances(data.draw(st.sampled_from(union.__args__))))
    header = codec.encode(message)
    assert header == msgpack.packb(msgspec.to_builtins(message), use_bin_type=True)
    short = codec._ours(header, union)
    assert short is None or short == message


def test_a_step_goes_the_short_way():
    header = codec.encode(
        m.Denoise(id=1, run=2, items=(m.DenoiseItem(x=_tensor(), t=(0.5,), conditioning="k"),))
    )
    assert codec._ours(header, m.Request) is not None
    assert codec._ours(memoryview(header), m.Request) is not None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_in_our_own_bytes_too(number):
    header = codec.encode(
        m.Denoise(id=1, run=2, items=(m.DenoiseItem(x=_tensor(), t=(number,), conditioning="k"),))
    )
    with pytest.raises(XditError, match="NaN or infinite"):
        codec.decode(header, m.Request, m.REQUESTS)


def test_a_nan_with_any_payload_is_seen():
    """A NaN has 2^53 spellings; the one that msgspec writes is not the only one that it keeps."""
    message = m.Denoise(id=1, run=2, items=(m.DenoiseItem(x=_tensor(), t=(0.5,), conditioning="k"),))
    for bits in (0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0xFFF8000000000000, 0xFFF0000000000001):
        header = codec.encode(message).replace(struct.pack(">d", 0.5), bits.to_bytes(8, "big"))
        with pytest.raises(XditError, match="NaN or infinite"):
            codec.decode(header, m.Request, m.REQUESTS)


def _tensor():
    return Tensor(dtype="float32", shape=(1, 16, 8, 8), segment=1)
