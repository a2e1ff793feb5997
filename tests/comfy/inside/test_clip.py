"""The CLIP: stock text nodes over the daemon's encoders give ComfyUI's own conditionings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sdxl_clip
import comfy.text_encoders.flux
import comfy.text_encoders.hydit
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.sd3_clip
import folder_paths
import nodes
import pytest
import torch
from comfy_extras import nodes_clip_sdxl, nodes_flux, nodes_hunyuan, nodes_pixart
from safetensors.torch import load_file, save_file

from comfy_nodes import clip as pack
from comfy_nodes import daemon
from comfy_nodes.dispatcher import Dispatcher
from tests.comfy.inside.conftest import BERT, CLIP_G, CLIP_L, MT5, T5
from tests.comfy.inside.test_model import call
from tests.live.service import Service
from xditd.protocol.errors import XditError
from xditd.protocol.messages import ModelRef, PlanRequest

BOUND = 3e-5  # what 32 random layers make of rounding; two layers stay below 1e-5

FILES = {
    "flux": ("clip_l", "t5xxl"),
    "sd3": ("clip_l", "clip_g"),
    "sdxl": ("clip_g", "clip_l"),
    "pixart": ("t5xxl",),
    "hunyuan_dit": ("hydit_clip", "mt5xl"),
}
"""SD3 joins its T5 at the width of the real one, which no small file has; the T5 is the same as Flux's."""

CONFIGS = {
    "clip_l_model_config": {"hidden_size": CLIP_L["width"], "intermediate_size": 4 * CLIP_L["width"], "num_attention_heads": 1, "num_hidden_layers": CLIP_L["layers"]},
    "clip_g_model_config": {"hidden_size": CLIP_G["width"], "intermediate_size": 4 * CLIP_G["width"], "num_attention_heads": 1, "num_hidden_layers": CLIP_G["layers"]},
    "hydit_clip_model_config": {"hidden_size": BERT["width"], "intermediate_size": 4 * BERT["width"], "num_attention_heads": 1, "num_hidden_layers": BERT["layers"]},
    "mt5xl_model_config": {"d_model": MT5["width"], "d_ff": 2 * MT5["width"], "num_heads": 2, "num_layers": MT5["layers"], "vocab_size": MT5["vocabulary"]},
    "t5xxl_model_config": {"d_model": T5["width"], "d_ff": 2 * T5["width"], "num_heads": 2, "num_layers": T5["layers"]},
}  # fmt: skip
"""What the narrow encoders have otherwise than those that ComfyUI's configurations describe."""


KINDS = {
    "flux": comfy.text_encoders.flux.FluxClipModel,
    "sd3": comfy.text_encoders.sd3_clip.SD3ClipModel,
    "sdxl": comfy.sdxl_clip.SDXLClipModel,
    "pixart": comfy.text_encoders.pixart_t5.PixArtT5XXL,
    "hunyuan_dit": comfy.text_encoders.hydit.HyditModel,
}
"""ComfyUI's own models of several encoders."""


def encoder(service: Service, name: str) -> pack.Encoder:
    spec = Dispatcher(
        service.endpoint, ModelRef(kind="text_encoders", name=f"{name}.safetensors"), PlanRequest()
    )
    return spec, daemon.client(spec.endpoint).load(spec.model, spec.plan).model


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a textual inversion for CLIP-L, of two vectors."""
    folder = tmp_path_factory.mktemp("embeddings")
    vectors = torch.randn(2, CLIP_L["width"], generator=torch.Generator().manual_seed(8))
    save_file({"clip_l": vectors}, folder / "cat.safetensors")
    return folder


@pytest.fixture(scope="module", params=FILES)
def pair(request: pytest.FixtureRequest, xfuser: Service, models: Path, embeddings: Path) -> tuple[Any, Any]:
    """(the daemon's, ComfyUI's own)"""
    names = FILES[request.param]
    folder_paths.add_model_folder_path("text_encoders", str(models / "text_encoders"))
    remote = pack.make_clip(request.param, [encoder(xfuser, name) for name in names])
    if "clip_l" in names:
        remote.tokenizer = _narrow(type(remote.tokenizer)(embedding_directory=str(embeddings)))
    options = {"t5": False} if request.param == "sd3" else {}
    stage = KINDS[request.param](dtype=torch.float32, model_options=CONFIGS, **options)
    for name in names:
        getattr(stage, name).transformer.load_state_dict(
            load_file(models / "text_encoders" / f"{name}.safetensors"), strict=False
        )
    local = comfy.sd.CLIP(no_init=True)
    for attribute, value in vars(remote).items():
        setattr(local, attribute, value)
    local.cond_stage_model = stage
    local.patcher = comfy.model_patcher.ModelPatcher(stage, torch.device("cpu"), torch.device("cpu"))
    return remote, local


def _narrow(tokenizer: Any) -> Any:
    """A tokenizer refuses vectors of another width than the encoders' that it was made for."""
    tokenizer.clip_l.embedding_size = CLIP_L["width"]
    return tokenizer


def apart(ours: Any, theirs: Any) -> float:
    """The worst of a CONDITIONING's tensors."""
    assert len(ours) == len(theirs)
    worst = 0.0
    for (a, given), (b, expected) in zip(ours, theirs, strict=True):
        assert given.keys() == expected.keys()
        pairs = [(a, b), *((given[key], expected[key]) for key in given)]
        for x, y in pairs:
            if isinstance(y, torch.Tensor):
                assert x.shape == y.shape
                assert x.dtype == y.dtype
                if not y.is_floating_point():
                    assert torch.equal(x, y)
                    continue
                scale = float(y.std()) or 1.0
                worst = max(worst, float((x - y).abs().max()) / scale)
            else:
                assert x == y
    print(f"max difference over std: {worst:.1e}")
    return worst


TEXTS = {
    "plain": "a red circle left of a blue square",
    "empty": "",
    "weighted": "a (red:1.4) circle [left] of a (blue square:0.6)",
    "over two sections": "one two three four five six seven eight nine ten " * 12,
    "in Chinese": "蓝色方块左边的红色圆圈",
    "with a textual inversion": "a photo of embedding:cat on a chair",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_clip_text_encode(pair: tuple[Any, Any], text: str) -> None:
    ours, theirs = (nodes.CLIPTextEncode().encode(clip, text)[0] for clip in pair)
    assert apart(ours, theirs) <= BOUND


def test_clip_text_encode_flux(pair: tuple[Any, Any]) -> None:
    if not isinstance(pair[1].cond_stage_model, (KINDS["flux"], KINDS["sd3"])):
        pytest.skip("a node for another model")
    ours, theirs = (
        call(nodes_flux.CLIPTextEncodeFlux, clip, "red circle", TEXTS["plain"], 2.5) for clip in pair
    )
    assert apart(ours, theirs) <= BOUND
    assert ours[0][1]["guidance"] == 2.5


FAMILIES = {
    KINDS["sdxl"]: (nodes_clip_sdxl.CLIPTextEncodeSDXL, (640, 512, 8, 16, 1024, 768, TEXTS["plain"], "a (red:1.4) circle")),
    KINDS["pixart"]: (nodes_pixart.CLIPTextEncodePixArtAlpha, (1024, 768, TEXTS["plain"])),
    KINDS["hunyuan_dit"]: (nodes_hunyuan.CLIPTextEncodeHunyuanDiT, (TEXTS["plain"], TEXTS["in Chinese"])),
}  # fmt: skip
"""Text nodes that ComfyUI has for one of them, and what they are given beside the CLIP."""


def test_the_text_nodes_of_a_family(pair: tuple[Any, Any]) -> None:
    node, arguments = FAMILIES.get(type(pair[1].cond_stage_model), (None, ()))
    if node is None:
        pytest.skip("has none of its own")
    ours, theirs = (call(node, clip, *arguments) for clip in pair)
    if node is nodes_hunyuan.CLIPTextEncodeHunyuanDiT:
        assert {"attention_mask", "conditioning_mt5xl", "attention_mask_mt5xl"} <= ours[0][1].keys()
    assert apart(ours, theirs) <= BOUND


def test_clip_set_last_layer(pair: tuple[Any, Any]) -> None:
    whole, skipped = [], []
    for clip in pair:
        whole.append(nodes.CLIPTextEncode().encode(clip, TEXTS["plain"])[0])
        earlier = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
        skipped.append(nodes.CLIPTextEncode().encode(earlier, TEXTS["plain"])[0])
    assert apart(*skipped) <= BOUND
    assert apart(*whole) <= BOUND  # and the clip that it was made from is as it was


def test_a_stock_lora_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(XditError, match="LoRA"):
        comfy.sd.load_lora_for_models(None, pair[0], {"lora_te1_x.lora_up.weight": torch.ones(1)}, 0.0, 1.0)


def test_saving_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(XditError, match="weights"):
        pair[0].get_sd()


def test_two_of_a_kind_are_refused(xfuser: Service) -> None:
    with pytest.raises(XditError, match="both a clip_l"):
        pack.make_clip("flux", [encoder(xfuser, "clip_l")] * 2)


def test_a_missing_encoder_is_named(xfuser: Service) -> None:
    with pytest.raises(XditError, match="clip_l and t5xxl"):
        pack.make_clip("flux", [encoder(xfuser, "clip_l")])


def test_a_type_that_is_not_built_says_so(xfuser: Service) -> None:
    with pytest.raises(XditError, match="not built yet"):
        pack.make_clip("wan", [encoder(xfuser, "t5xxl")])


def test_nothing_is_left_behind(xfuser: Service) -> None:
    assert not daemon.client(xfuser.endpoint).status().runs
