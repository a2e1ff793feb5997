"""What an exception in a rank is told as: a code and one sentence. Knows torch only if somebody imported it."""

from __future__ import annotations

import errno
import sys
import traceback

from xditd.protocol.errors import Code, XditError

REFUSALS = frozenset(
    {
        Code.BAD_TENSOR,
        Code.BAD_VALUE,
        Code.NOT_BUILT,
        Code.NO_SUCH_CONDITIONING,
        Code.NO_SUCH_RUN,
    }
)
"""Codes of errors that follow from the order alone: every rank of a world raises them, at the same point between
two collectives. So nobody is left waiting, and the world can go on."""


def is_refusal(error: BaseException) -> bool:
    return isinstance(error, XditError) and error.code in REFUSALS


def explain(error: BaseException) -> tuple[str, str]:
    """The code and the sentence of an exception."""
    if isinstance(error, XditError):
        return str(error.code.value if isinstance(error.code, Code) else error.code), error.message
    cause = _not_compiled(error)
    if out_of_memory(cause or error):
        return (
            Code.OUT_OF_MEMORY.value,
            f"The device ran out of memory: {_first_line(cause or error)} A smaller image, batch or more devices would fit.",
        )
    if cause is not None:
        return (
            Code.RANK_FAILED.value,
            f"The model's layers could not be compiled: {type(cause).__name__}: {_first_line(cause)} "
            "Set compute.compile = false, or install what is missing (a C++ compiler, a triton that fits this torch).",
        )
    return Code.RANK_FAILED.value, f"The rank failed: {type(error).__name__}: {_first_line(error)}"


def _not_compiled(error: BaseException) -> BaseException | None:
    """Why torch.compile gave up, if that is what happened."""
    dynamo = sys.modules.get("torch._dynamo.exc")
    if dynamo is None:
        return None
    if not isinstance(error, (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit)):
        return None
    cause: BaseException = getattr(error, "inner_exception", error)
    return cause


def out_of_memory(error: BaseException) -> bool:
    """Whether a device lacked memory, or the host."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):  # of `mmap`
        return error.errno == errno.ENOMEM
    # The CPU's allocator has no class of its own.
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def let_go(error: BaseException) -> None:
    """Empties the frames of an exception, and of those that it came from: they hold tensors, perhaps all that memory lacked."""
    known: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and id(one) not in known:
            known.add(id(one))
            traceback.clear_frames(one.__traceback__)
            chain += (one.__cause__, one.__context__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0][:300] if lines else "no message"
    return line if line.endswith((".", "!")) else line + "."
