"""What a command's exit status says to a script.

| status | meaning |
|---|---|
| 0 | done |
| 1 | failed: it was tried and did not work |
| 2 | the command line is wrong |
| 3 | no daemon answers, or it went away |
| 4 | refused: the request cannot be done as it stands, and nothing was tried |
| 5 | it took too long |
| 78 | `xditd serve` alone: the configuration is wrong |
| 130 | interrupted by Ctrl-C |
"""

from __future__ import annotations

from xditd.protocol.errors import Code, XditError

DONE, FAILED, USAGE, NO_DAEMON, REFUSED, TOO_LONG, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 3, 4, 5, 78, 130

_STATUS = {
    FAILED: {
        Code.RUN_CANCELLED,
        Code.RUN_IDLE,
        Code.RUN_LOST,
        Code.LOAD_FAILED,
        Code.MODEL_FAILED,
        Code.RANK_FAILED,
        Code.RANK_LOST,
        Code.OUT_OF_MEMORY,
        Code.INTERNAL,
    },
    NO_DAEMON: {Code.DAEMON_NOT_FOUND, Code.DAEMON_LOST, Code.STOPPING},
    TOO_LONG: {Code.TIMEOUT, Code.DEADLINE_EXCEEDED},
    BAD_CONFIG: {Code.BAD_CONFIG},
}


def status_of(error: XditError) -> int:
    """The exit status for an error: what is not listed above was refused; an unknown code has failed."""
    if not isinstance(error.code, Code):
        return FAILED
    return next((status for status, codes in _STATUS.items() if error.code in codes), REFUSED)
