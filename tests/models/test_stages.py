"""Transformers in stages: all stages together are the network, and what is remembered stands for what is not computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank.families import CASES, normal
from tests.rank.reference import error
from xditd.catalog.families.layers import dealt_out
from xditd.models.families import in_stages, load
from xditd.models.making import make_flux
from xditd.models.stages import Span, Stream
from xditd.rank.stage import Stage

CPU = torch.device("cpu")
FLUX = {"heads": 4, "head_dim": 32, "context_width": 256, "pooled_width": 64, "double_blocks": 2}
NAMES = ("flux", "sd3", "sd3.5_medium", "pixart_sigma", "pixart_alpha", "hunyuandit_1.2", "hunyuandit_1.1")
TOLERANCE = 1e-5


def model(name: str, folder: Path) -> tuple[str, Path, dict[str, torch.Tensor], tuple[int, ...], float]:
    """Family, file, a conditioning of a batch of 2, the shape of a latent and a time."""
    path = folder / "model.safetensors"
    if name == "flux":
        given = {"context": normal(2, 15, 256), "pooled": normal(2, 64, seed=1)}
        return "flux", make_flux(path, **FLUX, dtype=torch.float32), given, (2, 16, 15, 22), 0.7
    case = CASES[name]
    shape = (2, case.channels, *case.sizes[-1])
    return case.family, case.make(path), case.conditioning(15, batch=2), shape, case.t


@pytest.mark.parametrize(
    ("name", "count"),
    [(name, 2) for name in NAMES]
    + [("flux", 3), ("sd3.5_medium", 4), ("hunyuandit_1.2", 3), ("hunyuandit_1.2", 10)],
)
@torch.no_grad()
def test_stages_together_are_the_network_as_a_whole_and_patch_by_patch(
    name: str, count: int, tmp_path: Path
) -> None:
    """The patches come right after the whole at the same x and t: so what is remembered of the rest is what it would be."""
    family, path, given, shape, time = model(name, tmp_path)
    whole = load(family, path, "transformer", CPU, torch.float32)
    x, t = normal(*shape, seed=2), torch.tensor([time, time / 2])
    expected = whole.predict(x, t, whole.condition(given, {}))
    parts = []
    for stage in range(count):
        network = load(family, path, "transformer", CPU, torch.float32, Stage(stage, count).divide)
        parts.append((network, in_stages(family, network)))
    kept: list[dict[Any, torch.Tensor]] = [{} for _ in parts]
    called = [part.give(shape, t, network.condition(given, {})) for network, part in parts]
    tokens = parts[0][1].pack(x)
    total = tokens.shape[1]

    def through(span: Span) -> torch.Tensor:
        stream = parts[0][1].enter(tokens[:, span.begin : span.end], called[0], span)
        for i, (network, part) in enumerate(parts):
            part.recall.set(kept[i], span, total)
            sent = stream.tokens.clone()
            text = part.text(network.condition(given, {}))
            assert sent.shape[1] == text + (1 + part.skips) * (span.end - span.begin)
            stream = part.through(Stream(text, sent), called[i], span)
        return parts[-1][1].leave(stream, called[-1])

    height, width = shape[2:]
    unpack = parts[0][1].unpack
    assert error(unpack(through(Span(0, total)), height, width), expected) < TOLERANCE
    third = total // 3
    spans = [Span(0, third), Span(third, total - 7), Span(total - 7, total)]
    patches = torch.cat([through(span) for span in spans], 1)
    assert error(unpack(patches, height, width), expected) < TOLERANCE
    # What is remembered counts: where it is of another image, a patch comes out otherwise.
    for remembered in kept:
        for value in remembered.values():
            value.mul_(1.5)
    assert error(unpack(torch.cat([through(span) for span in spans], 1), height, width), expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_holds_its_blocks_alone(name: str, tmp_path: Path) -> None:
    family, path, *_ = model(name, tmp_path)

    def names(divided: Any) -> set[str]:
        return set(load(family, path, "transformer", CPU, torch.float32, divided).backbone.state_dict())

    whole, stages = names(None), [names(Stage(stage, 2).divide) for stage in range(2)]
    both = stages[0] & stages[1]
    assert stages[0] | stages[1] == whole
    assert not any("blocks." in key for key in both), "no block is on two stages"
    assert not any(key.startswith(("proj_out", "norm_out")) for key in stages[0])


def test_blocks_are_dealt_out_evenly_and_in_their_order() -> None:
    assert [list(part) for part in dealt_out(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [len(part) for part in dealt_out(57, 4)] == [15, 14, 14, 14]
