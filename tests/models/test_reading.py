"""Weights are mapped and shared, not read and copied; what does not fit is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from xditd.catalog.families.expected import LOADABLE
from xditd.models import families
from xditd.models.filling import fill, unfilled
from xditd.models.making import flux_facts, make_checkpoint, make_flux, make_models, make_vae, vae_facts
from xditd.models.reading import Piece, WeightFile
from xditd.models.splits import Kind, Split
from xditd.protocol.errors import Code, XditError
from xditd.rank.tensor import TensorParallel

SMALL = {"heads": 2, "head_dim": 32, "context_width": 64, "pooled_width": 32}
CPU = torch.device("cpu")


def private_kib(path: Path) -> int:
    """KiB of a file's mappings that this process has copied for itself."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Anonymous:"):
            total += int(line.split()[1])
    return total


def test_parameters_are_the_files_own_pages(tmp_path: Path) -> None:
    """In the file's dtype on a CPU: but for one layer whose halves change places, nothing is copied."""
    path = make_flux(tmp_path / "flux.safetensors", **SMALL)
    network = families.load("flux", path, "transformer", CPU, torch.bfloat16)
    addresses = {value.untyped_storage().data_ptr() for value in network.backbone.parameters()}
    assert len(addresses) == 3  # the mapping, and norm_out's weight and bias
    assert private_kib(path) == 0


def test_a_file_that_aligns_nothing_is_read_all_the_same(tmp_path: Path) -> None:
    """Its header is one byte longer: the data begin at an odd byte, where torch can not view bfloat16."""
    weights = {"a": torch.randn(4, 3).bfloat16()}
    save_file(weights, tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip() + b" " * (1 - length % 2)
    header += b" " * (len(header) % 2 == 0)
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    file = WeightFile(tmp_path / "odd.safetensors")
    assert file.header.data_offset % 2 == 1
    assert torch.equal(file.tensor("a"), weights["a"])


@pytest.mark.parametrize("kind", LOADABLE)
def test_every_dtype_that_the_catalog_lets_pass_is_read_and_converted(tmp_path: Path, kind: str) -> None:
    dtype = getattr(torch, LOADABLE[kind])
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"weight": weights}, tmp_path / "w.safetensors")
    file = WeightFile(tmp_path / "w.safetensors")
    assert file.header.tensors["weight"].dtype == kind
    with torch.device("meta"):
        linear = torch.nn.Linear(3, 4, bias=False)
    fill(linear, {"weight": Piece("weight")}, file, CPU, torch.float32)
    assert torch.equal(linear.weight, weights.float())


def test_a_network_that_the_file_does_not_fill_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 3), "b": torch.zeros(5)}, tmp_path / "w.safetensors")
    file = WeightFile(tmp_path / "w.safetensors")
    with torch.device("meta"):
        linear = torch.nn.Linear(3, 4)
    for pieces, sentence in (
        ({"weight": Piece("w"), "bias": Piece("b")}, r"b of w.safetensors has shape \[5\].*bias its \[4\]"),
        ({"weight": Piece("w"), "bias": Piece("gone")}, r"lacks gone"),
        ({"weight": Piece("w")}, r"no key for bias"),
    ):
        with pytest.raises(XditError, match=sentence) as caught:
            fill(linear, pieces, file, CPU, torch.float32)
        assert caught.value.code == Code.FILE_INVALID
    fill(linear, {"weight": Piece("w"), "bias": Piece("b", rows=(1, 5))}, file, CPU, torch.float32)


def test_a_buffer_stays_one_and_a_layer_under_two_names_is_one(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, 3), "mean": torch.arange(3.0)}, tmp_path / "w.safetensors")
    with unfilled():
        linear = torch.nn.Linear(3, 3, bias=False)
        network = torch.nn.Sequential(linear, torch.nn.BatchNorm1d(3, affine=False), linear)
        del network[1].num_batches_tracked
        del network[1].running_var
    pieces = {"0.weight": Piece("w"), "2.weight": Piece("w"), "1.running_mean": Piece("mean")}
    fill(network, pieces, WeightFile(tmp_path / "w.safetensors"), CPU, torch.float32)
    assert dict(network.named_buffers()).keys() == {"1.running_mean"}
    assert torch.equal(network[1].running_mean, torch.arange(3.0))
    assert [(name, one.requires_grad) for name, one in network.named_parameters()] == [("0.weight", False)]
    assert torch.equal(network[2].weight, torch.ones(3, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Linear(3, 4),
        lambda: torch.nn.Conv2d(3, 4, 3),
        lambda: torch.nn.Embedding(3, 4),
    ],
    ids=["linear", "convolution", "embedding"],
)
def test_layers_that_are_read_afterwards_draw_no_first_numbers(make: Callable[[], torch.nn.Module]) -> None:
    with Drawn() as plain:
        torch.nn.Linear(3, 4)
    assert plain.count == 2, "a weight and a bias"
    with Drawn() as drawn, unfilled():
        layer = make()
    assert layer.weight.is_meta
    assert drawn.count == 0


@pytest.mark.parametrize("kind", ["inputs", "outputs", "gathered"])
def test_nor_do_shares_of_layers(kind: Kind) -> None:
    whole = torch.nn.Linear(4, 4, device="meta")
    with Drawn() as drawn:
        share = TensorParallel(2, 0, None)._share(whole, Split(kind))
    assert share.weight.is_meta
    assert drawn.count == 0


class Drawn(TorchDispatchMode):
    """Counts how often random numbers are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["flux", "autoencoder_kl"])
def test_a_checkpoint_gives_its_parts(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(
        tmp_path / "all.safetensors",
        transformer=flux_facts(**SMALL),
        vae=vae_facts(),
        dtype=torch.float32,
        seed=5,
    )
    part = families.FAMILIES[family].part
    network = families.load(family, path, part, CPU, torch.float32)
    if family == "flux":
        alone = make_flux(tmp_path / "alone.safetensors", **SMALL, dtype=torch.float32, seed=5)
    else:
        alone = make_vae(tmp_path / "alone.safetensors", seed=6)
    expected = families.load(family, alone, part, CPU, torch.float32)
    for name, value in expected.backbone.state_dict().items():
        assert torch.equal(value, network.backbone.state_dict()[name]), name


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    vae = make_vae(tmp_path / "vae.safetensors")
    with pytest.raises(XditError, match="holds no flux"):
        families.load("flux", vae, "transformer", CPU, torch.float32)
    with pytest.raises(XditError, match="cannot be loaded as a vae"):
        families.load("flux", vae, "vae", CPU, torch.float32)
    with pytest.raises(XditError, match="No family 'sd9'"):
        families.load("sd9", vae, "transformer", CPU, torch.float32)


def test_making_is_seeded_and_writes_a_models_folder(tmp_path: Path) -> None:
    first, second, other = (
        make_flux(tmp_path / name, **SMALL, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    made = {str(path.relative_to(tmp_path / "models")) for path in make_models(tmp_path / "models")}
    assert made == {
        "diffusion_models/flux-dev-small.safetensors",
        "diffusion_models/flux-schnell-small.safetensors",
        "vae/ae-small.safetensors",
        "checkpoints/flux-dev-small-all-in-one.safetensors",
    }
    keys = load_file(tmp_path / "models" / "checkpoints" / "flux-dev-small-all-in-one.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"model", "vae", "text_encoders"}


def test_a_small_model_is_made_by_its_facts_or_by_a_shape_and_never_by_a_part_of_what_was_said(
    tmp_path: Path,
) -> None:
    with pytest.raises(TypeError, match="heads beside facts"):
        make_flux(tmp_path / "flux.safetensors", flux_facts(), heads=2)
    assert not list(tmp_path.iterdir())
