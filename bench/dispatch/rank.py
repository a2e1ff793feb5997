"""A rank whose turns take as long as the environment says for its device: XDITD_BENCH_TURNS="cpu:0=0.02,cpu:1=0.06"."""

from __future__ import annotations

import io
import os
import sys

import msgspec

from xditd.protocol.orders import RankSpec
from xditd.rank.main import main

VARIABLE = "XDITD_BENCH_TURNS"


def slowed(spec: RankSpec) -> RankSpec:
    seconds = dict(pair.split("=") for pair in os.environ.get(VARIABLE, "").split(",") if pair)
    if spec.device not in seconds:
        return spec
    return msgspec.structs.replace(spec, options={**spec.options, "turn_seconds": seconds[spec.device]})


if __name__ == "__main__":
    spec = slowed(msgspec.json.decode(sys.stdin.buffer.read(), type=RankSpec))
    sys.stdin = io.TextIOWrapper(io.BytesIO(msgspec.json.encode(spec)))
    sys.exit(main())
