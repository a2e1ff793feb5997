"""Files and pictures that the command line reads and writes."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from xditd.client import files
from xditd.protocol.errors import Code, XditError


def test_a_latent_goes_to_comfyuis_file_and_back(tmp_path):
    latent = torch.randn(1, 16, 4, 6)
    files.write_latent(tmp_path / "x.latent", latent)
    assert set(load_file(tmp_path / "x.latent")) == {"latent_tensor", "latent_format_version_0"}
    assert torch.equal(files.read_latent(tmp_path / "x.latent"), latent)
    assert [path.name for path in tmp_path.iterdir()] == ["x.latent"], "nothing half-written is left"


def test_the_only_tensor_of_a_file_is_its_latent(tmp_path):
    save_file({"anything": torch.ones(1, 16, 2, 2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert files.read_latent(tmp_path / "x.safetensors").dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": torch.ones(1), "b": torch.ones(1)}, "has the tensors a, b"),
        ({"a": torch.ones(4, 4)}, r"\[4, 4\]"),
    ],
)
def test_what_is_no_latent_is_refused(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(XditError, match=words) as caught:
        files.read_latent(tmp_path / "x.safetensors")
    assert caught.value.code is Code.FILE_INVALID


@pytest.mark.parametrize("content", [None, b"", b"not a header at all", b"\x80\x02}q\x00."])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(XditError, match=r"x\.safetensors") as caught:
        files.read_tensors(tmp_path / "x.safetensors")
    assert caught.value.code is Code.FILE_INVALID


def test_noise_is_what_comfyui_draws_for_the_seed():
    torch.manual_seed(42)
    assert torch.equal(files.noise((1, 16, 8, 8), 42), torch.randn(1, 16, 8, 8))


def test_a_picture_holds_its_pixels_and_notes(tmp_path):
    image = torch.zeros(1, 2, 3, 3)
    image[0, 0, 0] = torch.tensor([1.0, 0.5, 2.0])
    (path,) = files.write_png(tmp_path / "x.png", image, {"seed": "7"})
    with Image.open(path) as picture:
        assert picture.size == (3, 2)
        assert picture.getpixel((0, 0)) == (255, 128, 255)
        assert picture.getpixel((2, 1)) == (0, 0, 0)
        assert picture.text["seed"] == "7"


def test_a_batch_is_several_pictures(tmp_path):
    paths = files.write_png(tmp_path / "x.png", torch.rand(3, 4, 4, 3))
    assert [path.name for path in paths] == ["x.png", "x-2.png", "x-3.png"]


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(XditError, match="cannot be written"):
        files.write_png(tmp_path / "no" / "x.png", torch.rand(1, 4, 4, 3))


def test_a_light_install_says_what_to_add(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(XditError, match="pip install 'xditd\\[daemon\\]'") as caught:
        files.noise((1,), 0)
    assert caught.value.code is Code.NOT_BUILT
