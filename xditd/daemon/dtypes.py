"""In which dtype a model is computed: as it was asked, else as it is configured, else as its file is. Pure."""

from __future__ import annotations

from xditd.catalog.families import family
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo

INSTEAD = "bfloat16"
"""Where the file's own dtype is one that its family does not compute in (fp8; fp16 where that overflows): it has the
range of float32 in half the bytes."""


def choose(info: ModelInfo, *, asked: str, configured: str, is_cuda: bool) -> str:
    """The dtype of a model's arithmetic.

    Args:
        info: the model.
        asked: by the request; "" leaves it to the daemon.
        configured: by `compute.dtype`; where the family does not compute in it, as if it were "".
        is_cuda: whether its device is a GPU.

    Raises:
        XditError: `bad_value` where the request asks for one that the family does not compute in.
    """
    able = family(info.family).dtypes
    if asked and asked not in able:
        raise XditError(
            Code.BAD_VALUE,
            f"{info.name} cannot be computed in {asked!r}; {' or '.join(able)} would work.",
        )
    # Most CPUs compute 16-bit floats many times slower than 32-bit ones.
    own = info.dtype if is_cuda else "float32"
    return next((dtype for dtype in (asked, configured, own) if dtype in able), INSTEAD)
