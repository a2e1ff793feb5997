"""Bytes become structs or a refusal: every message goes round, and nothing hostile does anything else."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.protocol.structs import instances, plain
from xditd.protocol import codec, messages, orders
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor

UNIONS = {
    "requests": (messages.Request, messages.REQUESTS),
    "replies": (messages.Reply, messages.REPLIES),
    "orders": (orders.Order, orders.ORDERS),
    "reports": (orders.Report, orders.REPORTS),
}
MEMBERS = [(union, known, member) for union, known in UNIONS.values() for member in union.__args__]


def decode(header: bytes):
    return codec.decode(header, messages.Request, messages.REQUESTS)


def refusal(header: bytes) -> XditError:
    with pytest.raises(XditError) as caught:
        decode(header)
    caught.value.message.encode()
    return caught.value


@pytest.mark.parametrize(
    ("union", "known", "member"), MEMBERS, ids=[member.__name__ for _, _, member in MEMBERS]
)
def test_every_message_goes_round(union, known, member):
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(instances(member))
    def round_trip(message):
        assert codec.decode(codec.encode(message), union, known) == message

    round_trip()


@given(
    instances(messages.Load),
    st.dictionaries(st.text(min_size=1, max_size=9).map("x_{}".format), plain, max_size=3),
)
@settings(deadline=None)
def test_unknown_fields_are_ignored_at_every_level(message, unknown):
    fields = msgpack.unpackb(codec.encode(message))
    fields["model"] |= unknown
    assert decode(msgpack.packb(fields | unknown)) == message


def test_an_unknown_type_is_refused_and_says_which_request_it_was():
    error = refusal(msgpack.packb({"type": "levitate", "id": 7}))
    assert (error.code, error.details) == (Code.UNKNOWN_TYPE, {"id": 7})
    assert "levitate" in error.message
    for kind in (None, 3, ["hello"], b"hello", "", "Hello", "x" * 9000):
        assert refusal(msgpack.packb({"type": kind, "id": 7})).code is Code.UNKNOWN_TYPE
    assert refusal(msgpack.packb({"id": 7})).code is Code.UNKNOWN_TYPE


@pytest.mark.parametrize("number", [-1, 2**53 + 1, 2**64 - 1, True, 1.0, "1", None, [1]])
def test_an_id_that_is_none_is_refused_and_not_repeated(number):
    error = refusal(msgpack.packb({"type": "status", "id": number}))
    assert (error.code, error.details) == (Code.BAD_MESSAGE, {})


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"run": "1"}, "run"),
        ({"run": -1}, "run"),
        ({"items": []}, "items"),
        ({"items": None}, "items"),
        ({"items": [{}] * 17}, "items"),
        ({"items": [{"t": [0.5], "conditioning": "a"}]}, "x"),
        ({"items": [{"x": {"dtype": "float32", "shape": [0]}, "t": [0.5], "conditioning": "a"}]}, "shape"),
        ({"items": [{"x": {"dtype": "float32", "shape": [-1]}, "t": [0.5], "conditioning": "a"}]}, "shape"),
        ({"items": [{"x": {"dtype": "float32", "shape": [2**40]}, "t": [0.5], "conditioning": "a"}]}, "shape"),
        ({"items": [{"x": {"dtype": "float32", "shape": [1.5]}, "t": [0.5], "conditioning": "a"}]}, "shape"),
        ({"items": [{"x": {"dtype": "float32", "shape": [1], "frame": 256}, "t": [0.5], "conditioning": "a"}]}, "frame"),
        ({"items": [{"x": {"dtype": "float32", "shape": [1], "offset": -64}, "t": [0.5], "conditioning": "a"}]}, "offset"),
        ({"items": [{"x": {"dtype": "float32", "shape": [1]}, "t": 0.5, "conditioning": "a"}]}, "t"),
        ({"items": [{"x": {"dtype": "float32", "shape": [1]}, "t": [0.5], "conditioning": ""}]}, "conditioning"),
        ({"items": [{"x": {"dtype": "float32", "shape": [1]}, "t": [0.5], "conditioning": "a" * 129}]}, "conditioning"),
    ],
)  # fmt: skip
def test_a_field_of_another_type_or_out_of_its_limits_is_named(changes, where):
    error = refusal(msgpack.packb({"type": "denoise", "id": 3, "run": 1, "items": []} | changes))
    assert (error.code, error.details) == (Code.BAD_MESSAGE, {"id": 3})
    assert where in error.message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_no_number_is_nan_or_infinite(number):
    for fields in ({"cfg": number}, {"sigmas": [number, 0.0]}, {"unknown": [{"deep": [number]}]}):
        error = refusal(msgpack.packb({"type": "sample", "id": 3} | fields))
        assert (error.code, error.details) == (Code.BAD_VALUE, {"id": 3})


def test_a_key_that_comes_twice_is_refused():
    pair = msgpack.packb("id") + msgpack.packb(1)
    twice = b"\x83" + msgpack.packb("type") + msgpack.packb("status") + pair + pair
    assert "twice" in refusal(twice).message
    inner = (
        b"\x83"
        + msgpack.packb("type")
        + msgpack.packb("status")
        + pair
        + msgpack.packb("x")
        + b"\x82"
        + pair
        + pair
    )
    assert "twice" in refusal(inner).message


STATUS = (
    b"\x83"
    + msgpack.packb("type")
    + msgpack.packb("status")
    + msgpack.packb("id")
    + b"\x01"
    + msgpack.packb("x")
)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x90",
        b"\x01",
        b"\xc0",
        STATUS,
        STATUS[:-3],
        STATUS + b"\x01\x01",
        STATUS + b"\xdd\xff\xff\xff\xff",
        STATUS + b"\xdf\xff\xff\xff\xff",
        STATUS + b"\xdb\xff\xff\xff\xff",
        STATUS + b"\xc6\xff\xff\xff\xff",
        STATUS + b"\xc9\xff\xff\xff\xff\x01",
        STATUS + b"\xd6\xff\x00\x00\x00\x00",
        STATUS + b"\xa1\xff",
        STATUS + b"\x81\x01\x01",
        STATUS + b"\x81\xc0\x01",
        STATUS + b"\x81\x90\x01",
        STATUS + b"\x91" * 20 + b"\xc0",
        STATUS + b"\x91" * 1000 + b"\xc0",
        STATUS + b"\x91" * 60_000,
        STATUS + b"\x81\xa1a" * 300 + b"\xc0",
        STATUS + b"\xdc\x1f\xff" + b"\x90" * 0x1FFF + b"\x90",
        STATUS + b"\xdc\x20\x01" + b"\x90" * 0x2001,
        STATUS + b"\xde\x04\x01" + b"".join(msgpack.packb(f"{i}") + b"\x90" for i in range(0x401)),
        STATUS + b"\xde\x04\x00" + b"".join(msgpack.packb(f"{max(i, 1)}") + b"\x90" for i in range(0x400)),
        STATUS + b"\xdc\x00\x08" + 8 * (b"\xde\x03\xff" + b"".join(msgpack.packb(f"{i}") + b"\x90" for i in range(0x3FF))) + b"\xc1",
        STATUS + b"\xcb" + struct.pack(">d", float("nan")),
        b"\x82\xa4type\xa5hello\xa2id\x01",
        bytes(codec.MAX_HEADER),
        b"\xff" * codec.MAX_HEADER,
    ],
    ids=lambda header: f"{header[-24:][:8].hex()} ({len(header)})",
)  # fmt: skip
def test_hostile_bytes_are_refused_at_once_and_in_little_memory(header):
    """At once: in no more time than it takes to read as long a header that is in order."""
    tracemalloc.start()
    error = refusal(header)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code in (Code.BAD_MESSAGE, Code.BAD_VALUE, Code.UNKNOWN_TYPE)
    assert peak < 16 << 20
    honest = msgpack.packb({"type": "status", "id": 1, "x": [[0] * 7] * 8000})
    assert codec.MAX_HEADER * 0.95 < len(honest) <= codec.MAX_HEADER
    rounds = [(cost(refusal, header), cost(decode, honest)) for _ in range(5)]
    refusing, reading = (min(costs) for costs in zip(*rounds, strict=True))
    assert refusing <= reading, f"{refusing * 1e3:.2f} ms, and {reading * 1e3:.2f} ms of what is in order"


def cost(work: Callable[[bytes], object], header: bytes) -> float:
    """Seconds of the processor. Of several, the least has nothing in it of what else the process and the machine have to do."""
    begin = time.thread_time()
    work(header)
    return time.thread_time() - begin


def test_a_header_over_the_limit_is_refused_unread():
    assert refusal(bytes(codec.MAX_HEADER + 1)).code is Code.TOO_LARGE


def test_what_would_be_over_the_limit_is_not_sent():
    message = messages.OpenRun(id=1, model=messages.ModelRef(kind="vae", name="x" * codec.MAX_HEADER))
    with pytest.raises(XditError) as caught:
        codec.encode(message)
    assert caught.value.code is Code.TOO_LARGE


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(header):
    refusal(header)


@given(
    st.sampled_from(sorted(messages.REQUESTS)),
    st.dictionaries(st.text(max_size=6), plain, max_size=5),
    st.data(),
)
@settings(deadline=None)
def test_no_message_raises_anything_but_a_refusal(kind, fields, data):
    """True field names with values of any type; and then one byte of it changed."""
    member = next(s for s in messages.Request.__args__ if s.__struct_config__.tag == kind)
    names = data.draw(st.lists(st.sampled_from(member.__struct_fields__), unique=True))
    fields |= {name: data.draw(plain) for name in names}
    header = bytearray(msgpack.packb(fields | {"type": kind}))
    index = data.draw(st.integers(0, len(header) - 1))
    for spoilt in (
        bytes(header),
        bytes(header[:index]),
        bytes(header[:index] + b"\xdd" + header[index + 1 :]),
    ):
        try:
            decode(spoilt)
        except XditError as error:
            error.message.encode()


def test_a_message_says_its_type_and_leaves_out_what_is_default():
    fields = msgpack.unpackb(codec.encode(messages.Models(id=1)))
    assert fields == {"type": "models", "id": 1}
    tensor = Tensor(dtype="float32", shape=(1, 2), frame=0)
    item = messages.DenoiseItem(x=tensor, t=(0.5,), conditioning="a")
    fields = msgpack.unpackb(codec.encode(messages.Denoise(id=1, run=2, items=(item,))))
    assert fields["items"] == [
        {"x": {"dtype": "float32", "shape": [1, 2], "frame": 0}, "t": [0.5], "conditioning": "a"}
    ]
