"""What diffusers saves is what the makers' file holds: the same facts, and the same weights to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.diffusers_folders import KINDS, pipeline, save
from xditd.catalog.detection import recognise
from xditd.catalog.weights import read_weights
from xditd.models.families import load

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_shards_is_the_makers_file_to_the_bit(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    makers = kind.make(tmp_path / "makers.safetensors")
    folder = save(kind, makers, tmp_path / "folder", shard="300KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1, "or nothing of shards is tried"
    theirs, ours = (recognise(read_weights(path), kind.part) for path in (makers, folder))
    assert (ours.family, ours.variant, ours.facts) == (theirs.family, theirs.variant, theirs.facts)
    assert ours.parameters == theirs.parameters
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (
            load(kind.family, path, kind.part, CPU, dtype).weights._place._file.placed
            for path in (makers, folder)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key].parameter, b[key].parameter) for key in a)


def test_a_pipelines_scheduler_says_that_a_unet_predicts_v(tmp_path: Path) -> None:
    kind = KINDS["sdxl"]
    makers = kind.make(tmp_path / "makers.safetensors")
    for number, (scheduler, variant, zsnr) in enumerate(
        (
            ({"prediction_type": "epsilon"}, "eps", 0),
            ({"prediction_type": "v_prediction"}, "v", 0),
            ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v", 1),
        )
    ):
        whole = pipeline(tmp_path / str(number), {"unet": "UNet2DConditionModel"}, scheduler)
        found = recognise(read_weights(save(kind, makers, whole / "unet")), "transformer")
        assert (found.variant, found.facts["zsnr"]) == (variant, zsnr)
        network = load("sdxl", whole / "unet", "transformer", CPU, torch.float32)
        assert (network.noise.predicts, network.noise.zero_snr) == (variant, bool(zsnr))
