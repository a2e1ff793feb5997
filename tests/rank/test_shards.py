"""Tokens are dealt out so that each is held once, shares are equal, and attention finds every token and no pad."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xditd.catalog.families import TRANSFORMERS, transformer
from xditd.models.families import FAMILIES
from xditd.models.making import flux_facts
from xditd.models.making_transformers import hunyuandit_facts, pixart_facts, sd3_facts, sdxl_facts
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Plan
from xditd.protocol.tensors import Tensor
from xditd.rank.shards import Layout, Shares

degrees = st.integers(1, 6)
PAD = None


@given(total=st.integers(1, 400), degree=st.integers(1, 16))
def test_every_token_is_held_by_one_rank_in_order(total: int, degree: int) -> None:
    shares = Shares.of(total, degree)
    held = [token for rank in range(degree) for token in range(*shares.span(rank))]
    assert held == list(range(total))
    assert max(shares.counts) - min(shares.counts) <= 1
    assert shares.padded == (total % degree != 0)


def shares_with_pads(kind: str, shares: Shares, rank: int) -> list[tuple[str, int] | None]:
    begin, end = shares.span(rank)
    return [(kind, i) for i in range(begin, end)] + [PAD] * (shares.size - (end - begin))


@given(text=st.integers(1, 90), image=st.integers(36, 200), ulysses=degrees, ring=degrees)
def test_attention_sees_each_token_once_and_no_pad(text: int, image: int, ulysses: int, ring: int) -> None:
    """The blocks are built here as the ranks build them: text and image of each rank, rank after rank."""
    layout = Layout.of(text, image, ulysses, ring)
    seen = []
    for block in range(ring):
        held = []
        for rank in range(block * ulysses, (block + 1) * ulysses):
            held += shares_with_pads("text", layout.text, rank)
            held += shares_with_pads("image", layout.image, rank)
        positions = layout.valid(block)
        seen += held if positions is None else [held[i] for i in positions]
    assert PAD not in seen
    assert sorted(seen) == [("image", i) for i in range(image)] + [("text", i) for i in range(text)]


@given(image=st.integers(1, 200), degree=st.integers(1, 16))
def test_the_output_is_put_together_in_order(image: int, degree: int) -> None:
    shares = Shares.of(image, degree)
    gathered = [token for rank in range(degree) for token in shares_with_pads("image", shares, rank)]
    kept = shares.kept()
    whole = gathered if kept is None else [gathered[i] for i in kept]
    assert whole == [("image", i) for i in range(image)]


def test_an_even_deal_picks_nothing_out() -> None:
    """The usual sizes cost nothing: no index, no copy of K and V."""
    layout = Layout.of(512, 4096, 2, 4)
    assert [layout.valid(block) for block in range(4)] == [None] * 4
    assert layout.image.kept() is None


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("flux", flux_facts()),
        ("sd3", sd3_facts()),
        ("sd3", sd3_facts(qk_norm=True, dual_blocks=2)),
        ("pixart", pixart_facts()),
        ("hunyuandit", hunyuandit_facts()),
        ("sdxl", sdxl_facts()),
    ],
)
def test_the_daemon_refuses_what_ranks_would_have_to(name: str, facts: dict[str, int]) -> None:
    """Every small picture and text under every small grid of ranks, for each kind of attention of a family."""
    kind = FAMILIES[name].kind
    with torch.device("meta"):
        attention = kind(kind.empty(facts), facts, torch.device("meta"), torch.float32).tokens.attention
    rules = TRANSFORMERS[name].attention(facts)
    assert {frozenset(kinds) for kinds in rules} == {frozenset(kinds) for kinds in attention}
    refused = 0
    for text, image, ulysses, ring in product(range(1, 6), range(1, 8), range(1, 4), range(1, 6)):
        plan = Plan(devices=("d",) * (ulysses * ring), ulysses=ulysses, ring=ring)
        x = Tensor(dtype="float32", shape=(1, 16, 2 * image - 1, 2), frame=0)
        given = {"context": Tensor(dtype="float32", shape=(1, text, 8), frame=0)}
        ours, theirs = (
            _refuses(transformer.check_tokens, "x", plan, rules, x, given),
            _refuses(Layout.of, text, image, ulysses, ring, attention),
        )
        assert ours == theirs, (text, image, ulysses, ring)
        refused += ours
    assert (refused > 0) == bool(rules)


def _refuses(check: Callable[..., object], *arguments: object) -> bool:
    try:
        check(*arguments)
    except XditError as error:
        return error.code == Code.BAD_TENSOR
    return False


def test_a_ring_rank_without_a_token_is_refused() -> None:
    with pytest.raises(XditError, match="too few for a ring of 4"):
        Layout.of(1, 2, 1, 4)
