"""In which dtype a model is computed: what was asked wins, then the configuration, then the file."""

from __future__ import annotations

import pytest

from xditd.daemon.dtypes import choose
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo


def model(dtype: str, family: str = "flux") -> ModelInfo:
    return ModelInfo(
        kind="", name="m.safetensors", part="", family=family, variant="", dtype=dtype, bytes=1, parameters=1
    )


@pytest.mark.parametrize(
    ("asked", "configured", "is_cuda", "expected"),
    [
        ("", "", True, "bfloat16"),
        ("", "", False, "float32"),
        ("", "float16", True, "float16"),
        ("", "float16", False, "float16"),
        ("float32", "float16", True, "float32"),
    ],
)
def test_what_was_asked_wins_then_the_configuration_then_the_file(asked, configured, is_cuda, expected):
    assert choose(model("bfloat16"), asked=asked, configured=configured, is_cuda=is_cuda) == expected


def test_a_t5_is_never_computed_in_float16():
    t5 = model("float16", family="t5")
    assert choose(t5, asked="", configured="", is_cuda=True) == "bfloat16"
    assert choose(t5, asked="", configured="float16", is_cuda=True) == "bfloat16"
    assert choose(t5, asked="float32", configured="", is_cuda=True) == "float32"
    assert choose(t5, asked="", configured="", is_cuda=False) == "float32"
    with pytest.raises(XditError, match="float32 or bfloat16 would work"):
        choose(t5, asked="float16", configured="", is_cuda=True)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_nothing_computes_in_fp8(dtype):
    assert choose(model(dtype), asked="", configured="", is_cuda=True) == "bfloat16"
    with pytest.raises(XditError, match="float32 or float16 or bfloat16") as refused:
        choose(model(dtype), asked=dtype, configured="", is_cuda=True)
    assert refused.value.code is Code.BAD_VALUE
