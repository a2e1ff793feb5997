"""Log lines: readable for a person, filterable in the journal, parseable for a program, forgeable by nobody."""

from __future__ import annotations

import io
import json
import logging
import os
import re

import pytest

from xditd.daemon import log


@pytest.fixture
def logger():
    """The root logger as it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield logging.getLogger("xditd.daemon.groups")
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_for_a_person_has_time_mark_component_sentence_and_facts(logger):
    stream = io.StringIO()
    log.start_logging("info", "text", stream)
    logger.info("flux1-dev is ready on %s.", "cuda:0", extra={"done": True, "group": "g1"})
    logger.info("Rank 1 is loading.", extra={"group": "g1", "rank": 1})
    logger.warning("Fell back to one GPU.")
    logger.error("Rank 0 was killed.", extra={"code": "rank_lost"})
    logger.debug("Not shown.")
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ", line) for line in lines)
    assert [line[24:] for line in lines] == [
        "✅ groups: flux1-dev is ready on cuda:0. (group g1)",
        "   groups: Rank 1 is loading. (group g1, rank 1)",
        "⚠️  groups: Fell back to one GPU.",
        "❌ groups: Rank 0 was killed. (code rank_lost)",
    ]


def test_colours_only_on_a_terminal(logger, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    log.start_logging(stream=(terminal := Terminal()))
    logger.error("Broken.")
    log.start_logging(stream=(pipe := io.StringIO()))
    logger.error("Broken.")
    monkeypatch.setenv("NO_COLOR", "1")
    log.start_logging(stream=(plain := Terminal()))
    logger.error("Broken.")
    assert "\x1b[31m" in terminal.getvalue()
    assert "\x1b" not in pipe.getvalue() + plain.getvalue()


def test_json_is_one_object_per_line_with_the_facts(logger):
    stream = io.StringIO()
    log.start_logging("debug", "json", stream)
    logger.info("One\nrun ✅", extra={"run": 7, "group": "g1", "client": ""})
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("It failed.", extra={"code": "internal"})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "xditd.daemon.groups",
        "message": "One\nrun ✅",
        "group": "g1",
        "run": 7,
    }
    assert (second["level"], second["code"]) == ("error", "internal")
    assert "ValueError: inner" in second["traceback"]


def test_a_clients_words_forge_no_line(logger):
    stream = io.StringIO()
    log.start_logging(stream=stream)
    logger.info(
        "Run %s began.", "x\n2026-01-01 00:00:00.000 ❌ server: hacked\x1b[2J", extra={"client": "a\nb"}
    )
    (line,) = stream.getvalue().splitlines()
    assert r"x\n2026" in line
    assert r"\x1b[2J" in line
    assert line.endswith(r"(client a\nb)")


def test_a_traceback_follows_its_line(logger):
    stream = io.StringIO()
    log.start_logging(stream=stream)
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("It failed.")
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("❌ groups: It failed.")
    assert lines[-1] == "ValueError: inner"


def test_the_journal_gets_priorities_and_no_second_time(logger, monkeypatch, tmp_path):
    with open(tmp_path / "journal", "w+") as stream:
        stat = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        log.start_logging(stream=stream)
        logger.info("Up.", extra={"done": True})
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("Down.")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[0] == "<6>✅ groups: Up."
    assert lines[1] == "<3>❌ groups: Down."
    assert all(line.startswith("<3>") for line in lines[1:])
