"""How ranks die, fail and refuse to load: told in time, with a code, and never left half alive.

The echo rank starts in a moment, so faults of the loop are shown with it; loading is shown with a real family.
"""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.rank.ranks import Ranks, framed, running
from xditd.models.making import make_flux
from xditd.models.pinning import Pinned
from xditd.protocol import orders
from xditd.protocol.messages import DenoiseItem
from xditd.rank.failures import explain, let_go

SMALL = {"heads": 2, "head_dim": 32, "context_width": 64, "pooled_width": 32}


def turn(ranks: Ranks, number: int) -> None:
    (described,), frames = framed([torch.ones(1, 4, 2, 2)])
    item = DenoiseItem(x=described, t=(0.5,), conditioning="c")
    ranks.send(orders.TurnDenoise(order=number, run=1, items=(item,)), *frames)


def test_a_lone_rank_tells_of_an_exception_and_serves_on(tmp_path: Path) -> None:
    with running(tmp_path, family="echo", options={"fail_at_order": "2"}) as ranks:
        turn(ranks, 7)
        assert ranks.wait(orders.TurnDone)[0].order == 7
        turn(ranks, 8)
        failed, _ = ranks.wait(orders.RankFailed)
        assert (failed.order, failed.code, failed.alive) == (8, "rank_failed", True)
        assert "RuntimeError: A fault" in failed.message
        assert "at_turn" in failed.traceback
        turn(ranks, 9)
        assert ranks.wait(orders.TurnDone)[0].order == 9


def test_out_of_memory_has_its_own_code(tmp_path: Path) -> None:
    with running(tmp_path, family="echo", options={"oom_at_order": "1"}) as ranks:
        turn(ranks, 1)
        failed, _ = ranks.wait(orders.RankFailed)
        assert (failed.code, failed.alive) == ("out_of_memory", True)


def test_memory_of_the_host_that_lacks_for_weights_to_wait_in_has_it_too() -> None:
    with pytest.raises(OSError, match="memory") as caught:
        Pinned(1 << 50, torch.device("cpu"))  # more than there are addresses
    assert explain(caught.value)[0] == "out_of_memory"


def test_an_exception_in_a_world_of_two_ends_the_rank(tmp_path: Path) -> None:
    """Its peer may be inside a collective that now never ends: the daemon replaces the group."""
    with running(tmp_path, family="echo", ring=2, options={"fail_at_order": "1", "only_rank": "1"}) as ranks:
        turn(ranks, 1)
        failed, _ = ranks.wait(orders.RankFailed)
        assert (failed.rank, failed.order, failed.alive) == (1, 1, False)
        assert ranks.processes[1].wait(30) == 1


def test_a_lora_that_is_gone_ends_a_world_and_names_the_run_that_asks_for_it(tmp_path: Path) -> None:
    """Owed to the run's next turn by one rank and not by another, it would part them: so no rank owes it."""
    path = make_flux(tmp_path / "flux.safetensors", **SMALL)
    with running(tmp_path, path=path, ulysses=2) as ranks:
        gone = orders.Merge(path=str(tmp_path / "gone.safetensors"), strength=1.0)
        ranks.send(orders.SetLoras(run=5, loras=(gone,)))
        turn(ranks, 1)
        failed, _ = ranks.wait(orders.RankFailed)
        assert (failed.order, failed.run, failed.alive) == (None, 5, False)


@pytest.mark.parametrize(
    ("option", "code"), [("crash_at_order", -signal.SIGKILL), ("exit_at_order", 0)], ids=["crash", "exit"]
)
def test_a_fault_on_demand_strikes_at_its_turn(tmp_path: Path, option: str, code: int) -> None:
    with running(tmp_path, family="echo", options={option: "2"}) as ranks:
        turn(ranks, 1)
        ranks.wait(orders.TurnDone)
        turn(ranks, 2)
        assert ranks.codes() == [code]


def test_a_rank_whose_daemon_is_gone_does_not_start(tmp_path: Path) -> None:
    with running(tmp_path, family="echo", wait=False, parent=os.getppid()) as ranks:
        assert ranks.codes() == [1]


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ({"pipefusion": 2, "ring": 2}, "not_built"),
        ({"ulysses": 2, "tensor": 2, "plan": {"shard": True}}, "bad_plan"),
    ],
    ids=["pipefusion and ring", "shard and tensor"],
)
def test_a_plan_that_is_not_built_is_refused_before_anything_is_imported(
    tmp_path: Path, plan: dict[str, Any], code: str
) -> None:
    with running(tmp_path, wait=False, **plan) as ranks:
        failed, _ = ranks.wait(orders.RankFailed)
        assert (failed.order, failed.code, failed.alive) == (None, code, False)


def without(path: Path, key: str) -> None:
    weights = load_file(path)
    del weights[key]
    save_file(weights, path)


def reshaped(path: Path, key: str) -> None:
    weights = load_file(path)
    weights[key] = weights[key][1:].contiguous()
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "key"),
    [(without, "double_blocks.1.txt_mlp.2.bias"), (reshaped, "single_blocks.0.linear2.weight")],
    ids=["missing", "misshapen"],
)
def test_a_damaged_file_ends_the_rank_with_the_key_named(tmp_path: Path, damage, key: str) -> None:
    path = make_flux(tmp_path / "flux.safetensors", **SMALL)
    damage(path, key)
    with running(tmp_path, path=path, wait=False) as ranks:
        failed, _ = ranks.wait(orders.RankFailed, timeout=120)
        assert (failed.order, failed.code, failed.alive) == (None, "file_invalid", False)
        assert key in failed.message


def test_an_exception_that_is_let_go_of_holds_no_tensor_nor_do_those_that_it_came_from() -> None:
    held = []

    def compute() -> None:
        taken = torch.zeros(3)
        held.append(weakref.ref(taken))
        raise torch.OutOfMemoryError("for the next")

    def wrap() -> None:
        mine = torch.zeros(3)
        held.append(weakref.ref(mine))
        try:
            compute()
        except torch.OutOfMemoryError as error:
            raise RuntimeError("as a library puts it") from error

    with pytest.raises(RuntimeError) as caught:
        wrap()
    assert all(one() is not None for one in held)
    let_go(caught.value)
    assert [one() for one in held] == [None, None]
