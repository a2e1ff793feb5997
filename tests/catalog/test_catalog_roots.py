"""Model folders as ComfyUI has them: which there are, what a name means, and where a link may lead."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from xditd.catalog import roots as roots_module
from xditd.catalog.extra_paths import read_extra_paths
from xditd.catalog.roots import KINDS, Roots, model_roots
from xditd.protocol.errors import Code, XditError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def refusal(roots: Roots, kind: str, name: str) -> XditError:
    with pytest.raises(XditError) as caught:
        roots.resolve(kind, name)
    return caught.value


def names(roots: Roots, kind: str) -> list[str]:
    return [file.name for file in roots.files(kind)]


# ------------------------------------------------------------------------------------------------- which folders


def test_a_comfyui_folder_has_a_folder_for_each_kind(tmp_path):
    roots = model_roots(comfyui=tmp_path)
    models = tmp_path / "models"
    assert roots.folders("diffusion_models") == (models / "unet", models / "diffusion_models")
    assert roots.folders("unet") == roots.folders("diffusion_models")
    assert (
        roots.folders("clip") == roots.folders("text_encoders") == (models / "text_encoders", models / "clip")
    )
    assert roots.folders("vae") == (models / "vae",)
    assert len(roots.folders()) == 7
    assert roots.folders("nonsense") == ()


def test_folders_of_the_configuration_are_searched_first(tmp_path):
    roots = model_roots(
        comfyui=tmp_path,
        folders={"unet": [tmp_path / "a", tmp_path / "b"], "vae": [tmp_path / "models" / "vae"]},
    )
    models = tmp_path / "models"
    assert roots.folders("unet") == (
        tmp_path / "a",
        tmp_path / "b",
        models / "unet",
        models / "diffusion_models",
    )
    assert roots.folders("vae") == (models / "vae",)


def test_a_kind_that_comfyui_has_not_is_a_fault_of_the_configuration(tmp_path):
    with pytest.raises(XditError) as caught:
        model_roots(folders={"unets": [tmp_path]})
    assert caught.value.code is Code.BAD_CONFIG
    assert "diffusion_models" in caught.value.message


def test_comfyuis_extra_model_paths_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELS", "/data/models")
    (tmp_path / "extra_model_paths.yaml").write_text(
        """
# a comment
comfyui:
    base_path: ~/ComfyUI/
    checkpoints: models/checkpoints/
    diffusion_models: |
                 models/diffusion_models
                 models/unet
    clip_vision: models/clip_vision/
a111:
    base_path: $MODELS
    is_default: true
    checkpoints: Stable-diffusion
    vae: VAE
relative:
    base_path: ../shared
    vae: vae
bare:
    vae: |
        /mnt/vae
        beside
empty:
"""
    )
    roots = model_roots(comfyui=tmp_path)
    home, models = tmp_path / "home" / "ComfyUI" / "models", tmp_path / "models"
    assert roots.folders("checkpoints") == (
        Path("/data/models/Stable-diffusion"),
        models / "checkpoints",
        home / "checkpoints",
    )
    assert roots.folders("diffusion_models")[2:] == (home / "diffusion_models", home / "unet")
    assert roots.folders("vae") == (
        Path("/data/models/VAE"),
        models / "vae",
        tmp_path.parent / "shared" / "vae",
        Path("/mnt/vae"),
        tmp_path / "beside",
    )
    assert set(roots.by_kind) == set(KINDS)


def test_a_default_that_is_there_already_moves_to_the_front(tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text(f"mine:\n  is_default: true\n  diffusion_models: {tmp_path}/models/diffusion_models\n")
    roots = model_roots(comfyui=tmp_path, extra_model_paths=[extra])
    assert [folder.name for folder in roots.folders("unet")] == ["diffusion_models", "unet"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- a\n- b\n", "sections"),
        ("comfyui: models\n", "section comfyui"),
        ("comfyui:\n  base_path: 7\n", "base_path"),
        ("comfyui:\n  vae: [a, b]\n", "one folder a line"),
        ("comfyui: {vae: x", "not YAML"),
        ("a: !!python/object/apply:os.system [id]\n", "not YAML"),
        ("\xff\xfe", "YAML"),
    ],
)
def test_a_file_of_another_format_is_a_fault_of_the_configuration(tmp_path, text, word):
    path = tmp_path / "extra.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(XditError) as caught:
        read_extra_paths(path)
    assert caught.value.code is Code.BAD_CONFIG
    assert word in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_is_not_there_is_a_fault_and_an_empty_one_is_none(tmp_path):
    with pytest.raises(XditError) as caught:
        read_extra_paths(tmp_path / "absent.yaml")
    assert caught.value.code is Code.BAD_CONFIG
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_extra_paths(tmp_path / "empty.yaml") == []


# ---------------------------------------------------------------------------------------------- what a name means


def test_a_name_is_relative_to_the_first_folder_that_has_it(tmp_path):
    touch(tmp_path / "models" / "unet" / "flux" / "dev.safetensors")
    second = touch(tmp_path / "models" / "diffusion_models" / "flux" / "schnell.safetensors")
    touch(tmp_path / "models" / "diffusion_models" / "flux" / "dev.safetensors")
    roots = model_roots(comfyui=tmp_path)
    assert roots.resolve("unet", "flux/dev.safetensors").endswith("unet/flux/dev.safetensors")
    assert roots.resolve("diffusion_models", "flux/schnell.safetensors") == str(second)
    assert len(roots.candidates("unet", "flux/dev.safetensors")) == 2


def test_files_are_listed_recursively_once_and_sorted(tmp_path):
    folder = tmp_path / "models"
    for name in ("unet/b.safetensors", "unet/a/z.sft", "unet/a/deep/er/q.GGUF", "unet/.git/x.safetensors",
                 "unet/readme.md", "unet/old.ckpt", "diffusion_models/b.safetensors", "diffusion_models/0.safetensors"):  # fmt: skip
        touch(folder / name)
    listed = names(model_roots(comfyui=tmp_path), "unet")
    assert listed == ["a/deep/er/q.GGUF", "a/z.sft", "b.safetensors", "old.ckpt", "0.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "a/../../secret.safetensors", "/etc/passwd", "a//b.safetensors", "./a.safetensors", "",
     ".", "..", "a/", "a\0b", "\ud800.safetensors", "//host/share"],
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    touch(tmp_path / "models" / "secret.safetensors")
    (tmp_path / "models" / "vae" / "a").mkdir(parents=True)
    error = refusal(model_roots(comfyui=tmp_path), "vae", name)
    assert error.code is Code.BAD_VALUE
    error.message.encode()


def test_a_file_that_is_not_there_names_the_folders_and_the_user(tmp_path):
    error = refusal(model_roots(comfyui=tmp_path, user="xditd"), "vae", "ae.safetensors")
    assert error.code is Code.MODEL_NOT_VISIBLE
    assert str(tmp_path / "models" / "vae") in error.message
    assert "user xditd" in error.message
    assert error.details == {"roots": [str(tmp_path / "models" / "vae")], "user": "xditd"}
    assert "none is configured" in refusal(Roots(user="xditd"), "vae", "ae.safetensors").message


def test_a_kind_that_is_none_is_refused(tmp_path):
    error = refusal(model_roots(comfyui=tmp_path), "models", "a.safetensors")
    assert error.code is Code.BAD_VALUE
    assert "diffusion_models" in error.message


def test_a_folder_without_weights_is_no_model(tmp_path):
    touch(tmp_path / "models" / "vae" / "flux" / "config.json")
    error = refusal(model_roots(comfyui=tmp_path), "vae", "flux")
    assert error.code is Code.FILE_INVALID
    assert "needs a model_index.json" in error.message


def test_what_is_out_of_reach_says_whose_reach(tmp_path, monkeypatch):
    """A file system that lets nobody look, since root, who may run this test, may look anywhere."""
    roots = model_roots(comfyui=tmp_path, user="xditd")

    def stat(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(roots_module.os, "stat", stat)
    error = refusal(roots, "vae", "private/ae.safetensors")
    assert error.code is Code.MODEL_NOT_VISIBLE
    assert "user xditd" in error.message
    assert "Permission denied" in error.message
    (listed,) = roots.files("vae")
    assert (listed.name, listed.problem.code) == (".", Code.MODEL_NOT_VISIBLE)
    assert str(tmp_path / "models" / "vae") in listed.problem.message
    with pytest.raises(XditError) as caught:
        model_roots(comfyui=tmp_path, user="xditd")
    assert caught.value.code is Code.BAD_CONFIG
    assert "user xditd cannot look into" in caught.value.message


# ----------------------------------------------------------------------------------------------------- links


@pytest.fixture
def linked(tmp_path):
    """A ComfyUI whose vae folder has links: to a file and a folder elsewhere, and to a file of another kind."""
    touch(tmp_path / "elsewhere" / "ae.safetensors")
    touch(tmp_path / "elsewhere" / "many" / "one.safetensors")
    inside = touch(tmp_path / "comfyui" / "models" / "checkpoints" / "all.safetensors")
    vae = tmp_path / "comfyui" / "models" / "vae"
    vae.mkdir()
    (vae / "ae.safetensors").symlink_to(tmp_path / "elsewhere" / "ae.safetensors")
    (vae / "many").symlink_to(tmp_path / "elsewhere" / "many")
    (vae / "all.safetensors").symlink_to(inside)
    (vae / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_a_link_out_of_the_folders_is_refused_with_the_cure(linked):
    roots = model_roots(comfyui=linked / "comfyui")
    for name in ("ae.safetensors", "many/one.safetensors"):
        error = refusal(roots, "vae", name)
        assert error.code is Code.FILE_REFUSED
        assert "follow_symlinks" in error.message
        assert "elsewhere" not in error.message, "a stranger learns nothing of where links lead"


def test_a_link_to_another_model_folder_is_followed(linked):
    roots = model_roots(comfyui=linked / "comfyui")
    assert roots.resolve("vae", "all.safetensors").endswith("models/checkpoints/all.safetensors")
    wider = model_roots(comfyui=linked / "comfyui", folders={"loras": [linked / "elsewhere"]})
    assert wider.resolve("vae", "many/one.safetensors") == str(
        linked / "elsewhere" / "many" / "one.safetensors"
    )


def test_links_are_followed_where_the_configuration_says_so(linked):
    roots = model_roots(comfyui=linked / "comfyui", follow_symlinks=True)
    assert roots.resolve("vae", "ae.safetensors") == str(linked / "elsewhere" / "ae.safetensors")
    assert names(roots, "vae") == ["ae.safetensors", "all.safetensors", "many/one.safetensors"]


def test_links_that_may_not_be_followed_are_listed_without_a_path(linked):
    files = {file.name: file for file in model_roots(comfyui=linked / "comfyui").files("vae")}
    for name in ("ae.safetensors", "many"):
        assert files[name].path == ""
        assert files[name].problem.code is Code.FILE_REFUSED
    assert files["all.safetensors"].problem is None
    assert "gone.safetensors" not in files


def test_a_broken_link_is_a_file_that_is_not_there(linked):
    roots = model_roots(comfyui=linked / "comfyui", follow_symlinks=True)
    assert refusal(roots, "vae", "gone.safetensors").code is Code.MODEL_NOT_VISIBLE


def test_a_folder_that_is_itself_a_link_is_a_folder(tmp_path):
    file = touch(tmp_path / "big disk" / "vae" / "ae.safetensors")
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "models").symlink_to(tmp_path / "big disk")
    roots = model_roots(comfyui=tmp_path / "comfyui")
    assert roots.resolve("vae", "ae.safetensors") == str(file)
    assert names(roots, "vae") == ["ae.safetensors"]


def test_links_in_a_circle_are_walked_once(tmp_path):
    vae = tmp_path / "models" / "vae"
    touch(vae / "a" / "x.safetensors")
    touch(vae / "b" / "y.safetensors")
    for here in (vae / "a", vae / "b"):
        for name, target in (("to a", vae / "a"), ("to b", vae / "b"), ("up", vae)):
            (here / name).symlink_to(target)
    assert names(model_roots(comfyui=tmp_path), "vae") == ["a/x.safetensors", "b/y.safetensors"]
