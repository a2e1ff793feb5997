"""Every error that crosses a process boundary: a code for programs, one sentence for people.

The sentence says what is wrong and what would work. Tracebacks go to the log, never into a message.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class Code(str, Enum):
    """Why something was refused or failed. protocol.md explains each; a test holds the two together."""

    # The message itself
    BAD_MESSAGE = "bad_message"
    UNKNOWN_TYPE = "unknown_type"
    UNSUPPORTED_VERSION = "unsupported_version"
    HELLO_REQUIRED = "hello_required"
    TOO_LARGE = "too_large"
    NOT_PERMITTED = "not_permitted"
    # What it asks for
    MODEL_NOT_VISIBLE = "model_not_visible"
    FILE_INVALID = "file_invalid"
    FILE_REFUSED = "file_refused"
    UNKNOWN_FAMILY = "unknown_family"
    LORA_MISMATCH = "lora_mismatch"
    BAD_PLAN = "bad_plan"
    BAD_DEVICE = "bad_device"
    NOT_BUILT = "not_built"
    BAD_TENSOR = "bad_tensor"
    BAD_SLOT = "bad_slot"
    BAD_VALUE = "bad_value"
    ARENA_EXHAUSTED = "arena_exhausted"
    QUEUE_FULL = "queue_full"
    NO_SUCH_GROUP = "no_such_group"
    NO_SUCH_RUN = "no_such_run"
    NO_SUCH_CONDITIONING = "no_such_conditioning"
    RUN_BUSY = "run_busy"
    GROUP_BUSY = "group_busy"
    # What became of it
    RUN_CANCELLED = "run_cancelled"
    RUN_IDLE = "run_idle"
    RUN_LOST = "run_lost"
    LOAD_FAILED = "load_failed"
    MODEL_FAILED = "model_failed"
    RANK_FAILED = "rank_failed"
    RANK_LOST = "rank_lost"
    OUT_OF_MEMORY = "out_of_memory"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    DRAINING = "draining"
    STOPPING = "stopping"
    INTERNAL = "internal"
    # Seen by a program before or without a daemon
    DAEMON_NOT_FOUND = "daemon_not_found"
    DAEMON_LOST = "daemon_lost"
    ALREADY_RUNNING = "already_running"
    BAD_CONFIG = "bad_config"
    TIMEOUT = "timeout"

    def __str__(self) -> str:
        return self.value


class XditError(Exception):
    """A refusal or failure with a code, a sentence to act on, and details for programs.

    Attributes:
        code: one of `Code`.
        message: one sentence for the person who can act on it.
        details: further facts, plain msgpack values only.
    """

    def __init__(self, code: Code | str, message: str, **details: Any) -> None:
        super().__init__(message)
        try:
            self.code: Code | str = Code(code)
        except ValueError:  # a newer daemon may know codes that we do not: keep its word
            self.code = str(code)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"
