"""Load LoRA (xDiT): the latents of ComfyUI's own LoRA loader on its own model, whoever trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import nodes
import pytest
import torch
from safetensors.torch import save_file

from comfy_nodes import daemon, samplers
from comfy_nodes.daemon_loop import in_daemon
from comfy_nodes.loras import LoadLoRA
from comfy_nodes.patcher import wish
from tests.comfy.inside import own
from tests.comfy.inside.conftest import FLUX, XFUSER_RANKS, Serve
from tests.comfy.inside.test_families import BOUND, KINDS, far, ksampler, load, plan
from tests.comfy.inside.texts import latent
from tests.live.service import Service
from xditd.models.making import flux_facts, make_flux
from xditd.models.making_loras import make_lora
from xditd.models.making_transformers import hunyuandit_facts, pixart_facts, sd3_facts, sdxl_facts
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import PlanRequest

FACTS = {
    "sd3": sd3_facts(context_width=64, pooled_width=32),
    "pixart_sigma": pixart_facts(width=1152, blocks=1),
    "sdxl": sdxl_facts(context_width=64),
    "hunyuandit_1.2": hunyuandit_facts(),
    "hunyuandit_1.1": hunyuandit_facts(sizes=True),
    "flux": flux_facts(**FLUX),
}

CASES = [
    ("flux", ("kohya", "bfl-peft", "diffusers", "onetrainer")),
    ("sd3", ("kohya", "diffusers", "onetrainer")),
    ("pixart_sigma", ("kohya", "diffusers")),
    ("sdxl", ("kohya", "kohya-diffusers")),
    ("hunyuandit_1.2", ("makers-peft", "kohya")),  # its makers' own, first
    ("hunyuandit_1.1", ("makers-peft", "kohya")),
]
"""By family: the forms that ComfyUI reads as well."""

SOAKED = ("hunyuandit_1.1",)
"""Those that are like another, and so not in every run of the tests."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for name, forms in CASES:
        if name == "flux":
            make_flux(folder / "models" / "flux.safetensors", **FLUX, dtype=torch.float32)
        else:
            KINDS[name].make(folder / "models" / f"{name}.safetensors")
        for seed, form in enumerate(forms):
            path = folder / "loras" / f"{name}-{form}.safetensors"
            make_lora(path, name.partition("_")[0], FACTS[name], form, seed=seed)
    folder_paths.add_model_folder_path("loras", str(folder / "loras"))
    return folder


@pytest.fixture(scope="module")
def service(serve: Serve, folder: Path) -> Service:
    folders = {"diffusion_models": [str(folder / "models")], "loras": [str(folder / "loras")]}
    return serve(**{"debug.rank_command": XFUSER_RANKS, "devices.cpu_ranks": 2, "models.folders": folders})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node says."""
    lines: list[str] = []
    monkeypatch.setattr("comfy_nodes.loras.say", lines.append)
    return lines


def ours(model: Any, name: str, strength: float) -> Any:
    return LoadLoRA.execute(model, wish(model), name, strength).result[0]


def theirs(model: Any, path: Path, strength: float) -> Any:
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def of_file(path: Path, name: str) -> Any:
    if name == "flux":
        model = own.model(path)
        # By these ComfyUI knows diffusers' names for its modules.
        sizes = {"depth": FLUX["double_blocks"], "depth_single_blocks": FLUX["single_blocks"]}
        model.model.model_config.unet_config |= {**sizes, "hidden_size": FLUX["heads"] * FLUX["head_dim"]}
        return model
    return own.known(name.partition("_")[0], path)


def sample(model: Any, name: str) -> torch.Tensor:
    if name != "flux":
        return ksampler(model, name, ("euler", 3.0, 1, 17))
    generator = torch.Generator().manual_seed(1)
    text = [[torch.randn(1, 24, FLUX["context_width"], generator=generator),
             {"pooled_output": torch.randn(1, FLUX["pooled_width"], generator=generator)}]]  # fmt: skip
    result: torch.Tensor = nodes.common_ksampler(model, 5, 4, 1.0, "euler", "simple", text, text, latent())[
        0
    ]["samples"]
    return result


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        pytest.param(name, forms, id=name, marks=[pytest.mark.soak] if name in SOAKED else [])
        for name, forms in CASES
    ],
)
def test_the_latents_are_those_of_comfyuis_own_loader(
    service: Service, folder: Path, capsys: pytest.CaptureFixture[str], name: str, forms: tuple[str, ...]
) -> None:
    """The first one's strength is changed afterwards; all of them follow one another in the end."""
    local = of_file(folder / "models" / f"{name}.safetensors", name)
    devices = PlanRequest(ulysses=2) if name == "flux" else plan(name)
    remote = load(service, name, devices)
    figures, changed = {}, {}
    plain = sample(remote, name)
    for form in forms:
        lora = f"{name}-{form}.safetensors"
        expected = sample(theirs(local, folder / "loras" / lora, 0.8), name)
        figures[form] = far(sample(ours(remote, lora, 0.8), name), expected)
        changed[form] = far(plain, expected)
    every, all_of_theirs = remote, local
    for number, form in enumerate(forms):
        lora, strength = f"{name}-{form}.safetensors", 0.5 - 0.4 * number
        every, all_of_theirs = (
            ours(every, lora, strength),
            theirs(all_of_theirs, folder / "loras" / lora, strength),
        )
    figures["all at once"] = far(sample(every, name), sample(all_of_theirs, name))
    with capsys.disabled():
        print(f"\n  {name}: " + ", ".join(f"{what} {figure:.1e}" for what, figure in figures.items()), end="")
    assert max(figures.values()) <= 2 * BOUND
    assert min(changed.values()) > 0.01
    assert torch.equal(sample(remote, name), plain)
    if name == "sd3":
        assert far(sample(in_daemon(every), name), sample(all_of_theirs, name)) <= 2 * BOUND


def test_the_node_says_what_the_file_changes(service: Service, folder: Path, said: list[str]) -> None:
    remote = load(service, "flux", PlanRequest(ulysses=2))
    ours(remote, "flux-kohya.safetensors", 0.8)
    assert said.pop().startswith("✅ flux-kohya.safetensors × 0.8 changes 23 of 23 modules")
    pairs = comfy.utils.load_torch_file(str(folder / "loras" / "flux-kohya.safetensors"))
    for module in ("lora_unet_double_blocks_9_img_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        pairs |= {
            f"{module}.lora_up.weight": torch.ones(8, 4),
            f"{module}.lora_down.weight": torch.ones(4, 8),
        }
    save_file(pairs, folder / "loras" / "part.safetensors")
    ours(remote, "part.safetensors", 1.0)
    assert (
        "⚠️ part.safetensors × 1 changes 23 of 24 modules; the model has no lora_unet_double_blocks_9"
        in said[-1]
    )
    assert "1 changes of text encoders are left out" in said[-1]


def test_what_is_no_lora_for_the_model_is_refused_at_its_node(service: Service) -> None:
    remote = load(service, "flux", PlanRequest(ulysses=2))
    with pytest.raises(XditError) as caught:
        ours(remote, "sd3-kohya.safetensors", 1.0)
    assert caught.value.code == Code.LORA_MISMATCH


def test_model_and_dispatcher_must_have_the_same_loras(service: Service) -> None:
    remote = load(service, "flux", PlanRequest(ulysses=2))
    model, dispatcher = LoadLoRA.execute(remote, wish(remote), "flux-kohya.safetensors", 1.0).result
    assert wish(model) == dispatcher
    with pytest.raises(XditError, match="LoRAs differ"):
        samplers._sample({"model": model, "dispatcher": wish(remote)}, 1)


def test_what_was_set_on_the_model_before_stays(service: Service) -> None:
    remote = load(service, "flux", PlanRequest(ulysses=2)).clone()
    remote.model_options["transformer_options"]["sigmas"] = None
    remote.set_model_sampler_cfg_function(lambda arguments: arguments["cond"])
    with_lora = ours(remote, "flux-kohya.safetensors", 1.0)
    assert with_lora.model_options["sampler_cfg_function"] is not None
    assert daemon.client(service.endpoint).status().groups
