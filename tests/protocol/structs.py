"""Hypothesis strategies for protocol structs, from their annotations: every field, within its limits."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st
from msgspec import Meta, Struct

from xditd.protocol.tensors import ITEMSIZE, Tensor

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
"""What `details` may hold."""


def instances(struct: type[Struct]) -> st.SearchStrategy[Any]:
    """Structs of a type, with fields that have defaults now left out and now given."""
    hints = get_type_hints(struct, include_extras=True)
    required, optional = {}, {}
    for field in msgspec.structs.fields(struct):
        strategy = of_type(hints[field.name])
        if struct is Tensor and field.name == "dtype":
            strategy = st.sampled_from(sorted(ITEMSIZE))
        (required if field.required else optional)[field.name] = strategy
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: struct(**fields))


def of_type(hint: Any, meta: Meta = Meta()) -> st.SearchStrategy[Any]:  # noqa: B008  (a Meta is frozen)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return of_type(arguments[0], arguments[1])
    if origin in (Union, types.UnionType):
        return st.one_of([of_type(argument) for argument in arguments])
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*[of_type(argument) for argument in arguments])
    if origin is tuple:
        least = meta.min_length or 0
        most = min(meta.max_length or 3, least + 3)
        return st.lists(of_type(arguments[0]), min_size=least, max_size=most).map(tuple)
    if origin is dict:
        return st.dictionaries(of_type(arguments[0]), of_type(arguments[1]), max_size=3)
    if isinstance(hint, type) and issubclass(hint, Struct):
        return st.deferred(lambda: instances(hint))
    return {
        type(None): st.none(),
        Any: plain,
        bool: st.booleans(),
        int: st.integers(
            meta.ge if meta.ge is not None else -(2**53), meta.le if meta.le is not None else 2**53
        ),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(min_size=meta.min_length or 0, max_size=min(meta.max_length or 12, 12)),
    }[hint]
