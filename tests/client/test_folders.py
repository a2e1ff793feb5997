"""Folders that ComfyUI's loaders offer, held to what the daemon lists."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.catalog.sparse_files import SMALL_FLUX, entries, write
from tests.catalog.test_folders import SMALL_VAE, named, saved
from tests.catalog.test_text_encoders import TINY_CLIP
from xditd.catalog.catalog import Catalog
from xditd.catalog.families import clip
from xditd.catalog.roots import model_roots
from xditd.client import folders

KINDS = ("diffusion_models", "checkpoints", "vae", "text_encoders")


def pipeline(folder: Path) -> Path:
    saved(folder / "transformer", named("flux", SMALL_FLUX), shards=3)
    saved(folder / "vae", named("autoencoder_kl", SMALL_VAE))
    saved(folder / "text_encoder", clip.parameters(TINY_CLIP), stem="model")
    table = {
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(tmp_path: Path, kind: str) -> Path:
    """A pipeline, models in shards and alone, below each other and behind a link, and folders that are none."""
    root = tmp_path / "models" / kind
    pipeline(root / "flux" / "whole")
    saved(root / "alone", named("autoencoder_kl", SMALL_VAE))
    saved(root / "alone" / "below", named("flux", SMALL_FLUX), shards=2)
    several = saved(root / "several", named("autoencoder_kl", SMALL_VAE))
    write(several / "other.safetensors", entries(named("autoencoder_kl", SMALL_VAE)))
    write(root / "loose" / "ae.safetensors", entries(named("autoencoder_kl", SMALL_VAE)))
    (root / "empty").mkdir()
    (root / "linked").symlink_to(root / "alone" / "below")
    return root


def files(root: Path) -> list[str]:
    """As ComfyUI lists them: whatever is below a folder, links followed."""
    walked = os.walk(root, followlinks=True)
    return [os.path.relpath(os.path.join(at, name), root) for at, _, names in walked for name in names]


def catalog(tmp_path: Path) -> Catalog:
    return Catalog(model_roots(comfyui=tmp_path, user="xditd"))


def test_what_is_offered_is_what_the_daemon_lists(tmp_path: Path, kind: str, root: Path) -> None:
    """A linked folder counts once for the daemon, and twice for ComfyUI, as a linked file does."""
    found, skipped = catalog(tmp_path).list(kind)
    listed = {each.name for each in (*found, *skipped) if (root / each.name).is_dir()}
    assert listed
    offered = folders.offered(kind, [str(root)], files(root))
    assert offered == sorted({*listed, "linked"})
    assert ("flux/whole" in offered) == (kind != "text_encoders")
    assert ("flux/whole/text_encoder" in offered) == (kind == "text_encoders")


def test_a_folder_counts_as_many_bytes_as_for_the_daemon(tmp_path: Path, kind: str, root: Path) -> None:
    sizes = {model.name: model.bytes for model in catalog(tmp_path).list(kind)[0]}
    for name in folders.offered(kind, [str(root)], files(root)):
        path = folders.find(kind, [str(root)], name)
        assert path == str(root / name)
        assert name == "linked" or name not in sizes or folders.size(kind, path) == sizes[name]
    assert any((root / name).is_dir() for name in sizes)


def test_the_first_root_that_has_a_model_of_the_name_counts(tmp_path: Path, kind: str, root: Path) -> None:
    (tmp_path / "first" / "alone").mkdir(parents=True)
    roots = [str(tmp_path / "first"), str(tmp_path / "nowhere"), str(root)]
    assert "alone" in folders.offered(kind, roots, files(root))
    assert folders.find(kind, roots, "alone") == str(root / "alone")
    assert folders.find(kind, roots, "several") is None
    assert folders.find(kind, roots, "loose/ae.safetensors") is None
