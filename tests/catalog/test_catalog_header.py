"""A header is taken as it must be or refused with a sentence; no file, however hostile, does anything else."""

from __future__ import annotations

import json
import os
import pickle
import time
import tracemalloc
import zipfile
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog.sparse_files import FLUX_DEV, entries, write, write_flux, write_text
from xditd.catalog.header import MAX_HEADER, parse_header, read_header
from xditd.protocol.errors import Code, XditError


def refusal(path) -> XditError:
    with pytest.raises(XditError) as caught:
        read_header(path)
    assert path.name in caught.value.message
    return caught.value


def test_a_header_says_what_lies_where(tmp_path):
    table = {"__metadata__": {"format": "pt"}} | entries({"a": (2, 3), "b": (), "empty": (0, 4)}, "F32")
    path = write(tmp_path / "m.safetensors", table)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a", "b", "empty"]
    assert header.tensors["a"].dtype == "F32"
    assert header.tensors["a"].shape == (2, 3)
    assert (header.tensors["b"].begin, header.tensors["b"].end) == (24, 28)
    assert header.tensors["empty"].elements == 0
    assert header.data_offset + 28 == header.bytes == path.stat().st_size


def test_it_reads_what_the_safetensors_library_writes(tmp_path):
    numpy = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    path = tmp_path / "m.safetensors"
    save_file(
        {"w": numpy.ones((3, 5), numpy.float16), "b": numpy.zeros(7, numpy.int8)},
        path,
        metadata={"by": "hand"},
    )
    header = read_header(path)
    assert header.metadata == {"by": "hand"}
    assert (header.tensors["w"].dtype, header.tensors["w"].shape) == ("F16", (3, 5))
    w = header.tensors["w"]
    bits = path.read_bytes()[header.data_offset + w.begin : header.data_offset + w.end]
    assert bits == numpy.ones((3, 5), numpy.float16).tobytes()


def test_the_data_is_never_read(tmp_path):
    """A file of FLUX.1-dev's size, 24 GB: its header costs milliseconds and a little memory."""
    path = write_flux(tmp_path / "dev.safetensors", FLUX_DEV)
    assert path.stat().st_size > 23e9
    tracemalloc.start()
    begin = time.perf_counter()
    header = read_header(path)
    took = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(header.tensors) == 780
    assert took < 1
    assert peak < 8 << 20


def test_a_truncated_file_says_how_much_is_missing(tmp_path):
    error = refusal(write(tmp_path / "m.safetensors", entries({"a": (100,)}, "F32"), missing=123))
    assert error.code is Code.FILE_INVALID
    assert "123 bytes are missing" in error.message
    text = json.dumps(entries({"a": (100,)})).encode()
    error = refusal(write_text(tmp_path / "h.safetensors", text, length=len(text) + 50))
    assert "50 bytes of its header are missing" in error.message


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "needs 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "needs 4"),
        ({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, "unknown"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "a leaves a gap"),
        (entries({"a": (1,)}, "F32") | entries({"b": (1,)}, "F32"), "b overlaps"),
        (entries({"a": (2,)}, "F32") | entries({"b": (1,)}, "F32", begin=4), "b overlaps"),
        (entries({"a": (1,)}, "F32") | entries({"b": (1,)}, "F32", begin=8), "b leaves a gap"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "file": "/etc/passwd"}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "malformed"),
        ({"a": []}, "malformed"),
        ({"__metadata__": {"n": 1}}, "malformed"),
    ],
)
def test_entries_that_contradict_themselves_or_each_other_are_refused(tmp_path, table, fault):
    path = write_text(tmp_path / "m.safetensors", json.dumps(table).encode(), data=8)
    error = refusal(path)
    assert error.code is Code.FILE_INVALID
    assert fault in error.message


def test_bytes_that_no_tensor_names_are_refused(tmp_path):
    text = json.dumps(entries({"a": (1,)}, "F32")).encode()
    assert "10 bytes after its last" in refusal(write_text(tmp_path / "m.safetensors", text, data=14)).message


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        b'{"__metadata__":{"a":"1","a":"2"},"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
    ],
)
def test_a_key_that_comes_twice_is_refused(tmp_path, text):
    assert "twice" in refusal(write_text(tmp_path / "m.safetensors", text, data=1)).message


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"{}x",
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b'{"a":' * 100_000,
        b'{"a":[' + b"[]," * (5 << 20),
        b'{"a":{"dtype":"U8","shape":[' + b"1," * (5 << 20),
        b'{"a":{"dtype":"U8","shape":[' + b"9" * (10 << 20) + b'],"data_offsets":[0,1]}}',
        b'{"\xff":1}',
        b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        b'{"a":NaN}',
        b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,1]}}',
        b"{"
        + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(70_000))
        + b"}",
    ],
    ids=lambda text: text[:24].decode("latin-1") + f"… ({len(text)})",
)
def test_hostile_json_is_refused_quickly_and_in_little_memory(tmp_path, text):
    path = write_text(tmp_path / "m.safetensors", text, data=1)
    begin = time.perf_counter()
    assert refusal(path).code is Code.FILE_INVALID
    assert time.perf_counter() - begin < 2


def test_a_header_over_the_limit_is_not_even_read(tmp_path):
    path = write_text(tmp_path / "m.safetensors", b"{", data=4 << 30, length=MAX_HEADER + 1)
    assert "limit" in refusal(path).message
    assert "limit" in refusal(write_text(tmp_path / "n.safetensors", b"{", length=2**64 - 1)).message


@pytest.mark.parametrize(
    "content", [b"", b"1234567", bytes(100), b"\x02" + bytes(7) + b"[]", b"\x01" + bytes(7) + b"{"]
)
def test_what_has_no_header_is_refused(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert refusal(path).code is Code.FILE_INVALID


def test_a_pickle_is_refused_by_its_content_whatever_it_is_called(tmp_path):
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"m{protocol}.safetensors"
        path.write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
        error = refusal(path)
        assert error.code is Code.FILE_REFUSED
        assert "convert it to safetensors" in error.message
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert refusal(tmp_path / "m.ckpt").code is Code.FILE_REFUSED


def test_a_header_whose_length_looks_like_a_pickle_is_taken(tmp_path):
    """Its first bytes are 80 02: a length of 640."""
    text = json.dumps(entries({"a": (1,)}, "F32")).encode().ljust(0x280)
    path = write_text(tmp_path / "m.safetensors", text, data=4)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_header(path).tensors) == ["a"]


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), Code.NOT_BUILT, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", Code.FILE_INVALID, "git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", Code.FILE_INVALID, "web page"),
        (b"\n<html lang=en>" + bytes(64), Code.FILE_INVALID, "web page"),
    ],
)
def test_what_people_have_under_a_model_files_name_is_named(tmp_path, content, code, word):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    error = refusal(path)
    assert error.code is code
    assert word in error.message


def test_what_is_no_file_is_refused_and_does_not_hold_the_daemon(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    assert refusal(tmp_path / "m.safetensors").code is Code.FILE_REFUSED
    assert refusal(tmp_path).code is Code.FILE_REFUSED
    assert refusal(tmp_path / "absent.safetensors").code is Code.MODEL_NOT_VISIBLE


@given(st.binary(max_size=400), st.integers(0, 2**20))
def test_no_bytes_do_anything_but_parse_or_be_refused(text, size):
    with pytest.raises(XditError) as caught:
        parse_header("m", b"{" + text, size)
    caught.value.message.encode()


keys = st.text(max_size=8)
numbers = st.integers(-2, 2**64)
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "nope"]),
        "shape": st.lists(numbers | st.integers(0, 4), max_size=4),
        "data_offsets": st.lists(numbers | st.integers(0, 16), min_size=2, max_size=2),
    }
)


@settings(max_examples=60)
@given(st.dictionaries(keys, entry, max_size=4), st.integers(0, 64))
def test_whatever_is_taken_lies_within_the_file_and_apart(table, data):
    text = json.dumps(table).encode()
    size = 8 + len(text) + data
    try:
        header = parse_header("m", text, size)
    except XditError as error:
        error.message.encode()
        return
    spans = sorted((e.begin, e.end) for e in header.tensors.values())
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert sum(end - begin for begin, end in spans) == size - header.data_offset


@given(
    st.lists(
        st.tuples(st.sampled_from(["U8", "F16", "F32", "I64"]), st.lists(st.integers(0, 5), max_size=4)),
        max_size=8,
    )
)
def test_every_true_header_is_taken(tensors):
    table, begin = {}, 0
    for i, (dtype, shape) in enumerate(tensors):
        table |= entries({f"t{i}": tuple(shape)}, dtype, begin)
        begin = table[f"t{i}"]["data_offsets"][1]
    text = json.dumps(table).encode()
    header = parse_header("m", text, 8 + len(text) + begin)
    assert [list(entry.shape) for entry in header.tensors.values()] == [shape for _, shape in tensors]
