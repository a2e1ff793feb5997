"""protocol.md and the structs say the same: nothing is missing in either, and no number differs."""

from __future__ import annotations

import msgpack
import msgspec
import pytest

from tests.protocol.document import PATH, fields_of, name_of, read
from xditd.catalog.families import FAMILIES
from xditd.daemon import states
from xditd.daemon.clients import CAPABILITIES
from xditd.handoff import records
from xditd.protocol import codec, explaining, figures, messages, noise, plans, tensors
from xditd.protocol.errors import Code
from xditd.protocol.samplers import SAMPLERS

TEXT = PATH.read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())
SECTIONS = read(TEXT)

RECORDS = (records.Leased, records.Segment, records.Grow, records.Refused)
BARE = (records.OpenLane, records.LaneOpened)
"""Records without fields."""
TAGGED = (*messages.Request.__args__, *messages.Reply.__args__, *RECORDS)
STRUCTURES = tuple(
    thing
    for module in (messages, explaining, figures, plans, noise, tensors)
    for thing in vars(module).values()
    if isinstance(thing, type) and issubclass(thing, msgspec.Struct) and not thing.__struct_config__.tag
    and thing is not msgspec.Struct and thing.__module__ == module.__name__
)  # fmt: skip
STRUCTS = {name_of(struct): struct for struct in (*TAGGED, *STRUCTURES)}

TABLES = {
    title: section for title, section in SECTIONS.items() if section.rows and "default" in section.rows[0]
}
"""Sections with a table of fields."""


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_is_there_with_its_type_and_default(name):
    written = [(row["field"].strip("`"), row["type"], row["default"]) for row in TABLES[name].rows]
    assert written == fields_of(STRUCTS[name])


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_has_a_meaning(name):
    assert all(row["meaning"] for row in TABLES[name].rows)


@pytest.mark.parametrize("record", BARE)
def test_a_record_without_fields_has_a_section_too(record):
    assert "No fields." in " ".join(SECTIONS[name_of(record)].text)
    assert not fields_of(record)


def test_the_document_has_no_table_that_the_code_has_not():
    assert set(TABLES) == set(STRUCTS)


def test_every_request_names_its_answer_and_every_answer_is_named():
    named = set()
    for kind in messages.REQUESTS:
        text = " ".join(SECTIONS[kind].text)
        answers = {answer for answer in messages.REPLIES - messages.EVENTS if f"Answer: `{answer}`" in text}
        assert len(answers) == 1, f"{kind} names {answers}"
        named |= answers
    assert named == messages.REPLIES - messages.EVENTS - {"failed"}


def test_every_event_is_called_one():
    called = {title for title, section in SECTIONS.items() if any("*Event*" in line for line in section.text)}
    assert called == messages.EVENTS


def test_every_code_is_there_with_what_to_do():
    rows = SECTIONS["11. Error codes"].rows
    assert [row["code"].strip("`") for row in rows] == [code.value for code in Code]
    for row in rows:
        assert row["meaning"]
        assert row["again"] in ("yes", "no")
        assert row["what to do"]


def test_the_limits_are_those_of_the_codec():
    written = {row["limit"]: int(row["value"]) for row in SECTIONS["1. Transport"].rows if "limit" in row}
    assert written == {
        "bytes of a header": codec.MAX_HEADER,
        "frames after a header": codec.MAX_FRAMES,
        "bytes of a frame": codec.MAX_FRAME,
        "depth of nested arrays and maps": codec.MAX_DEPTH,
        "bytes of a text": codec._LIMITS["max_str_len"],
        "entries of an array": codec._LIMITS["max_array_len"],
        "entries of a map": codec._LIMITS["max_map_len"],
    }
    assert f"at most {records.MAX_RECORD} bytes" in FLAT
    assert f"multiple of {tensors.ALIGNMENT} bytes" in FLAT


def test_versions_dtypes_samplers_capabilities_and_states_are_those_of_the_code():
    assert TEXT.startswith(f"# The xditd protocol, version {messages.VERSION}\n")
    assert SECTIONS["13. History"].rows[-1]["version"] == str(messages.VERSION)
    assert f"this exchange: {records.VERSION} " in FLAT
    spelled = [f"`{name}`" for name in tensors.ITEMSIZE]
    assert f"The dtypes that travel: {', '.join(spelled)}." in FLAT
    assert f"of these names: {', '.join(f'`{name}`' for name in SAMPLERS)}." in FLAT
    assert f"Capabilities of this version: {', '.join(f'`{name}`' for name in CAPABILITIES)}." in FLAT
    life = " ".join(SECTIONS["10. The life of a run"].text)
    for table in (states.RUN, states.GROUP, states.DAEMON):
        for state in {state for state, _ in table} | set(table.values()):
            assert f"**{state}**" in life or f"*{state}*" in life, state


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_takes(name):
    assert name in SECTIONS


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.part == "transformer"])
def test_the_conditioning_of_a_family_is_what_the_catalog_takes(name):
    named = [row["name"] for row in SECTIONS[name].rows if row["request"] == "`put_conditioning`"]
    family = FAMILIES[name]
    tensors, values = (
        [f"{kind} `{key}`" for key in keys]
        for kind, keys in (("tensor", family.TENSORS), ("value", family.VALUES))
    )
    assert named == [*tensors, *values]


def test_the_example_is_a_true_conversation():
    """Every line of it is a message of the protocol; what it leaves out is marked with an ellipsis."""
    lines = "\n".join(SECTIONS["12. An example"].text).split("```")[1].replace("\n     ", " ").splitlines()
    lines = [line for line in lines if line]
    assert len(lines) == 11
    for line in lines:
        text = line[2:].partition("  +")[0].strip()
        union, known = (
            (messages.Request, messages.REQUESTS) if line[0] == "→" else (messages.Reply, messages.REPLIES)
        )
        if "…" in text:
            kind = text.split('"')[3]
            assert kind in known
            continue
        codec.decode(msgpack.packb(msgspec.json.decode(text)), union, known)
