"""What leaves a rank one stage of a pipeline: its blocks, and of the rest what it needs. As `models.splits.Divide` says."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from xditd.catalog.families.layers import dealt_out
from xditd.models.splits import Cut, Splits
from xditd.protocol.errors import Code, XditError


class Stage:
    """One of a pipeline's stages.

    Args:
        number, of: which, and of how many.
    """

    def __init__(self, number: int, of: int) -> None:
        self._number = number
        self._of = of

    def divide(self, network: nn.Module, splits: Splits) -> Mapping[str, Cut]:
        """Takes the other stages' blocks out. What remains keeps its name, and is whole."""
        lists = [network.get_submodule(name) for name in splits.blocks]
        total = sum(len(list(blocks.children())) for blocks in lists)
        if total < self._of:
            raise XditError(Code.BAD_PLAN, f"{total} blocks are too few for {self._of} stages.")
        held = dealt_out(total, self._of)[self._number]
        index = 0
        for blocks in lists:
            for name, _ in list(blocks.named_children()):
                if index not in held:
                    blocks.set_submodule(name, nn.Identity())
                index += 1
        others = (splits.first if self._number > 0 else ()) + (
            splits.last if self._number < self._of - 1 else ()
        )
        for name in others:
            network.set_submodule(name, nn.Identity())
        return {}
