"""Bytes that come to a device by way of slots are the file's, whatever the size of a slot, however many threads read, and however late
a copy arrives. Here the device is a CPU's memory, and its copies are as late as they may be."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.models.test_lora import KINDS, make
from xditd.catalog.layouts.flux import pieces
from xditd.catalog.layouts.piece import Piece
from xditd.models import staging, uploading
from xditd.models.families import load
from xditd.models.filling import fill
from xditd.models.making_loras import make_lora
from xditd.models.reading import WeightFile
from xditd.models.spans import Move, Run, fills, rows_of
from xditd.models.splits import Cut
from xditd.models.uploading import Wanted, upload
from xditd.protocol.errors import Code, XditError
from xditd.protocol.orders import Merge

CPU = torch.device("cpu")


class LateSlots:
    """What is sent from a slot arrives when somebody waits for it, and no sooner: whoever fills a slot without waiting spoils it."""

    made: ClassVar[list[LateSlots]] = []

    def __init__(self, device: torch.device, count: int, nbytes: int) -> None:
        self.memory = torch.full((count * nbytes,), 0xEE, dtype=torch.uint8).split(nbytes)
        self.closed = False
        self._lock = threading.Lock()
        self._sent: list[tuple[int, Callable[[], object]]] = []
        self.made.append(self)

    def send(self, slot: int, move: Move, target: torch.Tensor) -> None:
        source = self.memory[slot][move.at : move.at + move.nbytes]
        sink = target[move.begin : move.begin + move.nbytes]
        self.ask(lambda: sink.copy_(source), slot)

    def ask(self, work: Callable[[], object], slot: int = -1) -> None:
        """The device works in order."""
        with self._lock:
            self._sent.append((slot, work))

    def sent(self, slot: int) -> None:
        pass

    def wait(self, slot: int) -> None:
        with self._lock:
            last = max((number for number, (of, _) in enumerate(self._sent) if of == slot), default=-1)
            for _, work in self._sent[: last + 1]:
                work()
            del self._sent[: last + 1]

    def close(self) -> None:
        with self._lock:
            for _, work in self._sent:
                work()
            self._sent.clear()
        self.closed = True


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the CPU be a device to which bytes are brought, slots of little, and three threads."""
    monkeypatch.setitem(uploading.STAGED, "cpu", LateSlots)
    monkeypatch.setattr(staging, "SLOT", 1000)
    monkeypatch.setattr(staging, "readers", lambda: 3)
    monkeypatch.setattr(LateSlots, "made", [])
    yield
    assert all(slots.closed for slots in LateSlots.made)


class Bytes:
    """A source in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, begin: int, into: torch.Tensor) -> None:
        into.copy_(torch.frombuffer(bytearray(self.content[begin : begin + into.numel()]), dtype=torch.uint8))


RUNS = st.lists(
    st.builds(Run, st.integers(0, 1), st.integers(0, 60), st.integers(1, 40)), max_size=3
)  # of two sources of 100 bytes


@given(st.lists(RUNS, max_size=6), st.integers(1, 50), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_every_item_gets_its_bytes_whatever_the_slots_and_the_threads(
    all_runs: list[list[Run]], slot: int, count: int, threads: int
) -> None:
    sources = [Bytes(bytes(range(100))), Bytes(bytes(range(100, 200)))]
    expected = [
        b"".join(sources[run.source].content[run.begin : run.begin + run.nbytes] for run in runs)
        for runs in all_runs
    ]
    # All come into the same memory, one after another, and are taken from there as soon as they have come.
    shared = torch.empty(max(map(len, expected), default=0), dtype=torch.uint8)
    items = [staging.Item(runs, shared[: len(whole)]) for runs, whole in zip(all_runs, expected, strict=True)]
    slots = LateSlots(CPU, count, slot)
    found: dict[int, bytes] = {}

    def take(number: int) -> None:
        slots.ask(lambda: found.setdefault(number, bytes(items[number].target.tolist())))

    staging.bring(items, sources, slots, threads, take)
    slots.close()
    assert [found[number] for number in range(len(items))] == expected


@given(st.lists(RUNS, max_size=6), st.integers(1, 50))
def test_slots_are_full_and_what_follows_in_a_file_is_one_read(all_runs: list[list[Run]], slot: int) -> None:
    planned = list(fills(all_runs, slot))
    wanted = sum(run.nbytes for runs in all_runs for run in runs)
    carried = [sum(read.nbytes for read in fill.reads) for fill in planned]
    assert carried == [sum(move.nbytes for move in fill.moves) for fill in planned]
    assert carried[:-1] == [slot] * (len(planned) - 1)
    assert sum(carried) == wanted
    for one in planned:
        for before, after in zip(one.reads, one.reads[1:], strict=False):
            assert before.at + before.nbytes == after.at
            assert (before.source, before.begin + before.nbytes) != (after.source, after.begin)
    assert [move.item for fill in planned for move in fill.moves if move.last] == list(range(len(all_runs)))


def test_small_tensors_that_follow_each_other_are_one_read() -> None:
    (one,) = fills([[Run(0, 8 + 10 * i, 10)] for i in range(50)], 1 << 20)
    assert [(read.begin, read.nbytes, read.at) for read in one.reads] == [(8, 500, 0)]
    assert len(one.moves) == 50


@given(
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
    st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3)),
)
def test_rows_are_those_that_slicing_gives(
    first: int, count: int, swapped: bool, held: list[tuple[int, int]] | None
) -> None:
    value = torch.arange(first, first + count)
    if swapped:
        value = torch.cat(value.chunk(2)[::-1])
    if held is not None:
        held = [(begin, end) for begin, end in held if begin <= end]
        value = torch.cat([value[:0], *(value[begin:end] for begin, end in held)])
    rows = rows_of((first, first + count), swapped, held)
    assert [row for begin, end in rows for row in range(begin, end)] == value.tolist()


PIECES = [
    (Piece("a"), None),
    (Piece("b"), None),
    (Piece("a", rows=(2, 7)), None),
    (Piece("a", rows=(2, 7), swapped=True), None),
    (Piece("a", swapped=True), Cut(0, ((1, 3), (5, 9)))),
    (Piece("a"), Cut(0, ((4, 4),))),  # of which this rank has nothing
    (Piece("a"), Cut(1, ((1, 3), (4, 5)))),  # columns
    (Piece("c", squeezed=True), None),
    (Piece("one"), None),
    (Piece("f8"), None),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("through", [None, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("slot", [1, 7, 64, 4096])
def test_a_parameter_that_is_brought_is_the_one_that_is_mapped(
    tmp_path: Path, late: None, monkeypatch, dtype: torch.dtype, through: torch.dtype | None, slot: int
) -> None:
    """Rows, halves that change places, shares, columns, in every dtype; from a file that aligns nothing."""
    monkeypatch.setattr(staging, "SLOT", slot)
    numbers = torch.Generator().manual_seed(1)
    save_file(
        {
            "a": torch.randn(10, 6, generator=numbers).bfloat16(),
            "b": torch.randn(5, generator=numbers),
            "c": torch.randn(4, 3, 1, 1, generator=numbers).half(),
            "one": torch.tensor(3.25),
            "f8": torch.randn(3, 5, generator=numbers).to(torch.float8_e4m3fn),
        },
        tmp_path / "w.safetensors",
    )
    file = WeightFile(tmp_path / "w.safetensors")
    file.through, file.exempt = through, ("b",)
    expected = {str(i): file.value(piece, dtype, cut) for i, (piece, cut) in enumerate(PIECES)}
    wanted = {
        str(i): Wanted(piece, tuple(expected[str(i)].shape), dtype, cut)
        for i, (piece, cut) in enumerate(PIECES)
    }
    values = {name: torch.empty(one.shape, dtype=dtype) for name, one in wanted.items()}
    found: list[str] = []

    def come(name: str, stored: torch.Tensor) -> None:
        found.append(name)
        piece = wanted[name].piece
        LateSlots.made[-1].ask(lambda: values[name].copy_(file.converted(stored, piece, dtype)))

    upload(file, wanted, CPU, come, {name: value for name, value in values.items() if name != "0"})
    assert sorted(found) == sorted(wanted)
    for name, value in expected.items():
        assert (
            values[name].view(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()
        ), wanted[name]


def test_a_whole_network_is_brought_told_of_and_lies_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With slots that arrive at once: a CPU computes when it is asked, and cannot be late itself."""
    path = make("flux", tmp_path / "m.safetensors", torch.bfloat16)
    expected = load("flux", path, "transformer", CPU, torch.bfloat16).backbone.state_dict()
    at_once(monkeypatch)
    told: list[tuple[int, int]] = []
    network = load(
        "flux", path, "transformer", CPU, torch.bfloat16, progress=lambda *two: told.append(two)
    ).backbone
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    total = sum(value.nbytes for value in expected.values())
    assert told[-1] == (total, total)
    assert sorted(told) == told
    storages = {value.untyped_storage().data_ptr() for value in network.parameters()}
    assert len(storages) == 1
    assert {value.data_ptr() % 256 for value in network.parameters()} == {next(iter(storages)) % 256}


def test_a_lora_is_merged_into_what_was_brought_where_it_lies_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("flux", tmp_path / "m.safetensors", torch.bfloat16)
    lora = str(make_lora(tmp_path / "l.safetensors", "flux", KINDS["flux"].facts))
    mapped = load("flux", path, "transformer", CPU, torch.bfloat16)
    at_once(monkeypatch)
    brought = load("flux", path, "transformer", CPU, torch.bfloat16)
    before = {name: value.clone() for name, value in brought.backbone.state_dict().items()}
    addresses = [value.data_ptr() for value in brought.backbone.parameters()]
    brought.loras.hold((Merge(path=lora, strength=0.8),))
    monkeypatch.undo()
    mapped.loras.hold((Merge(path=lora, strength=0.8),))
    merged = mapped.backbone.state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in brought.backbone.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in merged.items())
    at_once(monkeypatch)
    brought.loras.hold(())
    assert all(torch.equal(value, before[name]) for name, value in brought.backbone.state_dict().items())
    assert [value.data_ptr() for value in brought.backbone.parameters()] == addresses


class SlotsAtOnce(LateSlots):
    def ask(self, work: Callable[[], object], slot: int = -1) -> None:
        work()


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uploading.STAGED, "cpu", SlotsAtOnce)
    monkeypatch.setattr(staging, "SLOT", 10_000)


def test_a_file_that_is_cut_short_while_it_is_read_is_named_and_nothing_is_left_under_way(
    tmp_path: Path, late: None
) -> None:
    """Its header was whole when it was opened. A mapping would have killed the process."""
    weights = {"weight": torch.randn(100, 30), "bias": torch.randn(100)}
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    file = WeightFile(path)
    os.truncate(path, file.header.bytes - 5000)
    with torch.device("meta"):
        linear = torch.nn.Linear(30, 100)
    table = {"weight": Piece("weight"), "bias": Piece("bias")}
    with pytest.raises(
        XditError, match=r"w\.safetensors was cut short while it was read: .* fetch it again"
    ) as caught:
        fill(linear, table, file, CPU, torch.float32)
    assert caught.value.code == Code.FILE_INVALID
    assert LateSlots.made[0].closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("xditd-read")]


def test_what_has_to_be_made_is_made_once_and_forgotten() -> None:
    asked: list[int] = []

    def make_it() -> Any:
        asked.append(1)
        return torch.arange(100, dtype=torch.int16)

    source = staging.MadeSource(make_it, 200, threading.Lock())
    slots = LateSlots(CPU, 3, 7)
    target = torch.empty(200, dtype=torch.uint8)
    staging.bring([staging.Item([Run(0, 0, 200)], target)], [source], slots, 3, lambda number: None)
    slots.close()
    assert target.view(torch.int16).tolist() == list(range(100))
    assert asked == [1]
    assert source._bytes is None


def test_flux_is_read_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    """Queries, keys and values are parts of one tensor of the file, and are read as one span with what lies beside them."""
    path = make("flux", tmp_path / "m.safetensors", torch.bfloat16)
    file = WeightFile(path)
    table = pieces(KINDS["flux"].facts, "")
    placed = sorted(table.values(), key=lambda piece: uploading._place(file, piece))
    (one,) = fills([file.runs(piece) or () for piece in placed], file.header.bytes)
    # But for the layer whose two halves change places.
    assert len(one.reads) <= 7
    assert sum(read.nbytes for read in one.reads) == file.header.bytes - file.header.data_offset
