"""What diffusers saves is what the makers' file holds: the same facts, and the same weights to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.diffusers_folders import KINDS, Kind, pipeline, save
from xditd.catalog.detection import recognise
from xditd.catalog.weights import read_weights
from xditd.models.families import load
from xditd.models.making_loras import make_lora
from xditd.protocol.orders import Merge
from xditd.rank.tensor import TensorParallel

CPU = torch.device("cpu")


def parameters(
    kind: Kind, path: Path, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, torch.Tensor]:
    """A network's parameters, as they were read from a file or folder."""
    network = load(kind.family, path, kind.part, CPU, dtype, **more)
    return {name: placed.parameter for name, placed in network.weights._place._file.placed.items()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
        assert equal(parameters(kind, folder, dtype), parameters(kind, makers, dtype))


@pytest.mark.parametrize("name", ["flux dev", "sd3.5 medium", "hunyuandit 1.1"])
def test_a_rank_reads_its_share_of_either_alike(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    makers = kind.make(tmp_path / "makers.safetensors")
    folder = save(kind, makers, tmp_path / "folder", shard="300KB")
    whole = sum(value.numel() for value in parameters(kind, folder).values())
    for rank in range(2):
        ours, theirs = (
            parameters(kind, path, divide=TensorParallel(2, rank, None).divide) for path in (folder, makers)
        )
        assert equal(ours, theirs)
        assert sum(value.numel() for value in ours.values()) < 0.8 * whole


def test_a_lora_is_merged_into_either_alike_and_taken_out_again(tmp_path: Path) -> None:
    kind = KINDS["flux dev"]
    makers = kind.make(tmp_path / "makers.safetensors")
    folder = save(kind, makers, tmp_path / "folder", shard="300KB")
    lora = make_lora(tmp_path / "l.safetensors", "flux", kind.facts)
    ours, theirs = (load("flux", path, "transformer", CPU, torch.float32) for path in (folder, makers))

    def held(network: Any) -> dict[str, torch.Tensor]:
        return {name: placed.parameter.data.clone() for name, placed in network.loras._file.placed.items()}

    before = held(ours)
    for network in (ours, theirs):
        network.loras.hold((Merge(path=str(lora), strength=0.8),))
    assert equal(held(ours), held(theirs))
    assert not equal(held(ours), before)
    ours.loras.hold(())
    assert equal(held(ours), before)


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
