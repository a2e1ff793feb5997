"""The demo's words against ComfyUI: the tokens of its tokenizers for Flux, and the conditioning of its text nodes."""

from __future__ import annotations

import random

import folder_paths
import nodes
import torch

from comfy_nodes import daemon, loaders
from tests.comfy.inside.conftest import XFUSER_RANKS, Serve
from tests.comfy.inside.test_clip import apart
from tools.train_demo import scenes
from xditd.demo import conditioning, prompt

CAPTIONS = 300


def test_every_caption_has_the_tokens_that_comfyui_gives():
    from comfy.text_encoders.flux import FluxTokenizer

    tokenizer = FluxTokenizer()
    chance = random.Random(7)
    for text in ["", *(scenes.caption(scenes.describe(chance), chance) for _ in range(CAPTIONS))]:
        theirs = tokenizer.tokenize_with_weights(text)
        ours = prompt.tokens(text)
        for name, mine in (("l", ours.clip), ("t5xxl", ours.t5)):
            (batch,) = theirs[name]
            assert [token for token, *_ in batch] == list(mine), f"{name}: {text}"


def test_a_prompt_through_load_dual_clip_is_what_the_demo_conditions_with(serve: Serve) -> None:
    """The stock CLIP Text Encode over our loader, and `conditioning.encode`, of the same daemon."""
    folders = {kind: str(prompt.folder() / kind) for kind in ("diffusion_models", "vae", "text_encoders")}
    folder_paths.add_model_folder_path("text_encoders", folders["text_encoders"])
    service = serve(
        **{
            "debug.rank_command": XFUSER_RANKS,
            "models.folders": {kind: [folder] for kind, folder in folders.items()},
        }
    )
    names = conditioning.CLIP.name, conditioning.T5.name
    clip = loaders.LoadDualCLIP.execute(
        "flux", endpoint=service.endpoint, clip_name1=names[0], clip_name2=names[1]
    ).result[0]
    for text in (prompt.EXAMPLE, "", "three small yellow stars on a blue background"):
        theirs = nodes.CLIPTextEncode().encode(clip, text)[0]
        ours = conditioning.encode(daemon.client(service.endpoint), text)
        context, pooled = (
            torch.frombuffer(ours[key].memory, dtype=torch.float32).view(ours[key].shape)
            for key in ("context", "pooled")
        )
        assert apart([[context, {"pooled_output": pooled}]], theirs) <= 1e-5
