"""The demo in ComfyUI: its tokens, its conditioning and its picture are those that `xditctl demo` has."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

import comfy.samplers
import folder_paths
import nodes
import pytest
import torch
from rich.console import Console

from comfy_nodes import daemon, loaders, samplers
from tests.comfy.inside.conftest import XFUSER_RANKS, Serve
from tests.comfy.inside.test_clip import apart
from tests.comfy.inside.test_families import far
from tests.live.service import Service
from tools.train_demo import scenes
from xditd.cli import drawing, schedule
from xditd.demo import conditioning, prompt

CAPTIONS = 300
STEPS, SIDE, SEED = 10, 256, 5

BOUND = 1e-5  # of a tensor's own spread


@pytest.fixture(scope="module")
def service(serve: Serve) -> Service:
    """A daemon with two ranks that lists the demo's models, which ComfyUI has, too."""
    kinds = ("diffusion_models", "vae", "text_encoders")
    folders = {kind: str(prompt.folder() / kind) for kind in kinds}
    for kind, folder in folders.items():
        folder_paths.add_model_folder_path(kind, folder)
    return serve(
        **{
            "debug.rank_command": XFUSER_RANKS,
            "devices.cpu_ranks": 2,
            "models.folders": {kind: [folder] for kind, folder in folders.items()},
        }
    )


@pytest.fixture(scope="module")
def clip(service: Service) -> Any:
    names = {"clip_name1": conditioning.CLIP.name, "clip_name2": conditioning.T5.name}
    return loaders.LoadDualCLIP.execute("flux", endpoint=service.endpoint, **names).result[0]


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


def test_a_prompt_through_load_dual_clip_is_what_the_demo_conditions_with(
    service: Service, clip: Any
) -> None:
    """The stock CLIP Text Encode over our loader, and `conditioning.encode`, of the same daemon."""
    for text in (prompt.EXAMPLE, "", "three small yellow stars on a blue background"):
        theirs = nodes.CLIPTextEncode().encode(clip, text)[0]
        ours = conditioning.encode(daemon.client(service.endpoint), text)
        context, pooled = (
            torch.frombuffer(ours[key].memory, dtype=torch.float32).view(ours[key].shape)
            for key in ("context", "pooled")
        )
        assert apart([[context, {"pooled_output": pooled}]], theirs) <= BOUND


@pytest.mark.parametrize("cfg", [1.0, 3.5])
def test_a_workflow_draws_the_demos_picture(
    service: Service, clip: Any, cfg: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """From our loaders by stock nodes and our KSampler to VAE Decode, on the two ranks that `xditctl demo` draws with.

    A trained model makes much of the last bit of a sigma. So the demo's own way goes by ComfyUI's very sigmas; what its
    own make of the latent is printed beside.
    """
    model, dispatcher = loaders.LoadUNet.execute(
        conditioning.FLUX.name, "default", strategy="USP", endpoint=service.endpoint
    ).result
    vae = loaders.LoadVAE.execute(conditioning.VAE.name, endpoint=service.endpoint).result[0]
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (prompt.EXAMPLE, ""))
    empty = nodes.EmptyLatentImage().generate(SIDE, SIDE)[0]
    wanted = dict(
        zip(samplers.SHARED, (STEPS, cfg, "euler", "simple", positive, negative, empty), strict=True)
    )
    (latent,) = samplers.KSampler.execute(SEED, 1.0, model=model, dispatcher=dispatcher, **wanted).result
    (image,) = nodes.VAEDecode().decode(vae, latent)

    client, console = daemon.client(service.endpoint), Console(file=io.StringIO())
    wish = drawing.Wish(
        model=conditioning.FLUX,
        plan=dispatcher.plan,
        prompt=prompt.EXAMPLE,
        steps=STEPS,
        seed=SEED,
        size=(SIDE, SIDE),
        cfg=cfg,
    )
    simple = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", STEPS
    ).tolist()
    info = client.load(conditioning.FLUX, dispatcher.plan).model
    assert schedule.sigmas(schedule.known(info), STEPS, schedule.habits(info).mu) == pytest.approx(
        simple, abs=1e-6
    )
    drawn = drawing.draw(client, replace(wish, sigmas=tuple(simple)), console)
    picture = drawing.decode(client, conditioning.VAE, drawn.latent, console)
    assert len(drawn.plan.devices) == 2
    assert image.shape == (1, SIDE, SIDE, 3)
    figures = {"latent": far(latent["samples"], drawn.latent), "picture": far(image, picture)}
    own = far(latent["samples"], drawing.draw(client, wish, console).latent)
    with capsys.disabled():
        said = ", ".join(f"{what} {figure:.1e}" for what, figure in figures.items())
        print(f"\n  the demo at cfg {cfg:g}: {said}; by its own sigmas: {own:.1e}", end="")
    assert max(figures.values()) <= BOUND
