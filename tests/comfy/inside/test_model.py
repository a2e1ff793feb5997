"""The MODEL: ComfyUI's own code around it gives a local model's latents, and what cannot travel is refused."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import nodes
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_model_advanced

from comfy_nodes import daemon
from comfy_nodes.patcher import remote as leaf_of
from tests.comfy.inside.conftest import Serve, load
from tests.comfy.inside.texts import latent, text
from tests.live.service import Service, wait_for
from xditd.client import Run
from xditd.protocol.errors import XditError

STEPS = 4


def ksampler(
    model: Any, positive: Any = None, negative: Any = None, cfg: float = 4.0, **named: Any
) -> torch.Tensor:
    positive, negative = positive or text(1), negative or text(2, 17)
    options = {"sampler": "euler", "scheduler": "simple", "latent": latent(), **named}
    sampled = nodes.common_ksampler(
        model, 5, STEPS, cfg, options["sampler"], options["scheduler"], positive, negative, options["latent"]
    )
    result: torch.Tensor = sampled[0]["samples"]
    return result


def call(node: Any, *arguments: Any) -> Any:
    """The first output of a node, of ComfyUI's old kind or of its new one."""
    if hasattr(node, "execute"):
        return node.execute(*arguments).result[0]
    return getattr(node(), node.FUNCTION)(*arguments)[0]


# ------------------------------------------------------------------------------------------------- it is the same


def test_a_ksampler_gives_the_local_latent(remote: Any, local: Any) -> None:
    assert torch.equal(ksampler(remote), ksampler(local))


def test_a_picture_out_of_a_batch_has_its_own_noise(remote: Any, local: Any) -> None:
    """LatentFromBatch keeps which of the batch it was."""
    picked = {**latent(batch=2), "batch_index": [0, 3]}
    assert torch.equal(ksampler(remote, latent=picked), ksampler(local, latent=picked))
    assert not torch.equal(ksampler(remote, latent=picked), ksampler(remote, latent=latent(batch=2)))


@pytest.mark.parametrize("guider", ["BasicGuider", "CFGGuider", "DualCFGGuider"])
def test_any_guider_gives_the_local_latent(remote: Any, local: Any, guider: str) -> None:
    custom = nodes_custom_sampler

    def sample(model: Any) -> torch.Tensor:
        made = {
            "BasicGuider": lambda: call(custom.BasicGuider, model, text(1)),
            "CFGGuider": lambda: call(custom.CFGGuider, model, text(1), text(2, 17), 3.0),
            "DualCFGGuider": lambda: call(
                custom.DualCFGGuider, model, text(1), text(3, 19), text(2, 17), 3.0, 2.0, "regular"
            ),
        }[guider]
        sigmas = call(custom.BasicScheduler, model, "simple", STEPS, 1.0)
        sampler, noise = call(custom.KSamplerSelect, "heun"), call(custom.RandomNoise, 9)
        sampled = call(custom.SamplerCustomAdvanced, noise, made(), sampler, sigmas, latent())
        result: torch.Tensor = sampled["samples"]
        return result

    assert torch.equal(sample(remote), sample(local))


def test_a_changed_shift_holds(remote: Any, local: Any) -> None:
    """Nodes such as ModelSamplingFlux change what surrounds the transformer, on a clone."""

    def shifted(model: Any) -> Any:
        return call(nodes_model_advanced.ModelSamplingFlux, model, 2.0, 1.0, 512, 512)

    assert torch.equal(ksampler(shifted(remote)), ksampler(shifted(local)))
    assert not torch.equal(ksampler(shifted(remote)), ksampler(remote))


def test_a_third_partys_sampler_works(remote: Any, local: Any) -> None:
    def halving(
        model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, **_: Any
    ) -> torch.Tensor:
        for sigma, after in itertools.pairwise(sigmas):
            denoised = model(x, sigma * x.new_ones(x.shape[0]), **extra_args)
            x = denoised + (x - denoised) * (after / sigma)
        return x

    def sample(model: Any) -> torch.Tensor:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
        noise = torch.randn(1, 16, 12, 10, generator=torch.Generator().manual_seed(3))
        return comfy.samplers.sample(
            model, noise, text(1), text(2), 3.0, torch.device("cpu"), comfy.samplers.KSAMPLER(halving), sigmas,
            latent_image=torch.zeros_like(noise),
        )  # fmt: skip

    assert torch.equal(sample(remote), sample(local))


def test_a_conditioning_without_a_pooled_text_gets_zeros(remote: Any, local: Any) -> None:
    bare, zeros = text(1), text(1)
    zeros[0][1]["pooled_output"] = torch.zeros_like(zeros[0][1]["pooled_output"])
    bare[0][1]["pooled_output"] = None
    assert torch.equal(ksampler(remote, bare, cfg=1.0), ksampler(local, zeros, cfg=1.0))


def test_the_model_can_be_called_outside_of_a_sampling(remote: Any, local: Any, service: Service) -> None:
    def once(model: Any) -> torch.Tensor:
        (context, options), x = text(1)[0], latent(seed=4)["samples"]
        sigma = torch.tensor([0.7])
        return model.model.apply_model(
            x, sigma, c_crossattn=context, y=options["pooled_output"], guidance=torch.tensor([3.5])
        )

    assert torch.equal(once(remote), once(local))
    assert not daemon.client(service.endpoint).status().runs


# -------------------------------------------------------------------------------------- what goes over the wire


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of conditionings that were put."""
    keys: list[str] = []
    put = Run.put_conditioning

    def noted(self: Run, key: str, *arguments: Any, **named: Any) -> None:
        keys.append(key)
        put(self, key, *arguments, **named)

    monkeypatch.setattr(Run, "put_conditioning", noted)
    return keys


def turns(service: Service) -> int:
    return sum(group.turns for group in daemon.client(service.endpoint).status().groups)


@pytest.mark.parametrize("negative", [17, 24], ids=["texts of two lengths", "texts of one length"])
def test_cond_and_uncond_are_one_turn_a_step(
    remote: Any, service: Service, puts: list[str], negative: int
) -> None:
    before = turns(service)
    ksampler(remote, text(1), text(2, negative))
    assert turns(service) - before == STEPS
    assert len(puts) == 2


def test_what_somebody_changes_between_steps_is_put_anew(remote: Any, local: Any, puts: list[str]) -> None:
    def louder(model: Any) -> Any:
        clone, calls = model.clone(), []

        def wrap(apply: Any, call: Any) -> torch.Tensor:
            calls.append(call)
            c = dict(call["c"])
            c["c_crossattn"] = c["c_crossattn"] * (1.0 + len(calls) // 3)
            result: torch.Tensor = apply(call["input"], call["timestep"], **c)
            return result

        clone.set_model_unet_function_wrapper(wrap)
        return clone

    assert torch.equal(ksampler(louder(remote)), ksampler(louder(local)))
    assert len(puts) > 2


def test_wrappers_around_the_transformer_run(remote: Any, local: Any) -> None:
    def doubled(model: Any) -> Any:
        clone = model.clone()

        def wrap(execute: Any, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            result: torch.Tensor = execute(x * 1.1, *arguments, **named)
            return result

        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        clone.add_wrapper_with_key(kind, "a test", wrap)
        return clone

    # A local module of the tests calls its wrappers itself, as ours does.
    assert torch.equal(ksampler(doubled(remote)), ksampler(doubled(local)))


# --------------------------------------------------------------------------------------------------- how it ends


def test_a_run_ends_with_its_sampling(remote: Any, service: Service) -> None:
    seen: list[int] = []
    client = daemon.client(service.endpoint)
    clone = remote.clone()
    clone.set_model_sampler_post_cfg_function(
        lambda args: (seen.append(len(client.status().runs)), args["denoised"])[1]
    )
    ksampler(clone)
    assert seen == [1] * STEPS
    assert not client.status().runs


def test_a_sampling_that_fails_leaves_nothing_behind(remote: Any, local: Any, service: Service) -> None:
    def fail(args: Any) -> Any:
        raise ZeroDivisionError

    clone = remote.clone()
    clone.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(ZeroDivisionError):
        ksampler(clone)
    wait_for(lambda: not daemon.client(service.endpoint).status().runs, "the run to end")
    assert torch.equal(ksampler(remote), ksampler(local))


def test_cancel_cancels_within_a_step_and_the_next_run_works_at_once(serve: Serve, local: Any) -> None:
    slow = serve(**{"debug.rank_options": {"turn_seconds": "1.0"}})
    model = load(slow)
    began = threading.Event()
    clone = model.clone()
    clone.set_model_sampler_pre_cfg_function(lambda args: (began.set(), args["conds_out"])[1])
    pressed: list[float] = []

    def press() -> None:
        began.wait(60)
        client = daemon.client(slow.endpoint)
        wait_for(lambda: client.status().devices[0].busy, "the second step to be under way")
        pressed.append(time.monotonic())
        comfy.model_management.interrupt_current_processing()

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ksampler(clone)
    took = time.monotonic() - pressed[0]
    thread.join()
    print(f"cancelled after {took:.3f} s")
    assert took < 1.0, "it waited for the step"
    wait_for(lambda: not daemon.client(slow.endpoint).status().runs, "the run to end")
    assert torch.equal(ksampler(model), ksampler(local))


def test_a_daemon_that_is_restarted_costs_a_moment_and_not_the_image(serve: Serve, local: Any) -> None:
    first = serve()
    model = load(first)
    clone, steps = model.clone(), []

    def restart(args: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            first.kill()
            threading.Thread(target=lambda: serve(folder=first.folder)).start()
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(restart)
    assert torch.equal(ksampler(clone), ksampler(local))
    assert leaf_of(model).verdict().startswith("⚠️")
    assert torch.equal(ksampler(model), ksampler(local))
    assert leaf_of(model).verdict().startswith("✅")


# ----------------------------------------------------------------------------------------------------- refusals


def refused(word: str) -> Any:
    return pytest.raises(XditError, match=word)


def test_a_stock_lora_is_refused(remote: Any) -> None:
    lora = {
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(256, 4),
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 256),
    }
    with refused("use Load LoRA \\(xDiT\\)"):
        comfy.sd.load_lora_for_models(remote, None, lora, 1.0, 0.0)
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        with refused("LoRA"):
            comfy.sd.load_bypass_lora_for_models(remote, None, lora, 1.0, 0.0)


def test_saving_the_model_is_refused(remote: Any, tmp_path: Any) -> None:
    with refused("weights"):
        comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), remote)
    assert not list(tmp_path.iterdir())


def test_merging_is_refused(remote: Any) -> None:
    with refused("weights"):
        remote.get_key_patches("diffusion_model.")


def test_patches_are_refused_when_they_are_set(remote: Any) -> None:
    clone = remote.clone()
    with refused("attn1_patch"):
        clone.set_model_attn1_patch(lambda *arguments: arguments)
    with refused("attn1"):
        clone.set_model_attn1_replace(lambda *arguments: arguments, "double", 0)
    with refused("diffusion_model"):
        clone.add_object_patch("diffusion_model.img_in", object())


def test_patches_that_were_set_behind_its_back_are_refused_too(remote: Any) -> None:
    clone = remote.clone()
    clone.model_options["transformer_options"]["patches_replace"] = {
        "dit": {("double_block", 0): lambda *a: a}
    }
    with refused("patches"):
        ksampler(clone)


def test_an_option_that_nobody_knows_is_refused(remote: Any) -> None:
    clone = remote.clone()
    clone.model_options["transformer_options"]["rope_options"] = {"scale_x": 2.0}
    with refused("rope_options"):
        ksampler(clone)


def test_a_controlnet_is_refused(remote: Any) -> None:
    class Control(comfy.controlnet.ControlBase):
        def get_control(self, *arguments: Any) -> dict[str, Any]:
            return {"input": [torch.ones(1)]}

        def get_models(self) -> list[Any]:
            return []

    positive = text(1)
    positive[0][1]["control"] = Control()
    with refused("ControlNet"):
        ksampler(remote, positive, cfg=1.0)


def test_reference_latents_are_refused(remote: Any) -> None:
    with refused("ref_latents"):
        ksampler(remote, text(1, reference_latents=[latent(seed=1)["samples"]]), cfg=1.0)


def test_a_conditioning_without_a_text_is_refused(remote: Any) -> None:
    positive = text(1)
    positive[0][0] = None
    with refused("CLIP Text Encode"):
        ksampler(remote, positive, cfg=1.0)


def test_refusals_leave_nothing_behind(remote: Any, local: Any, service: Service) -> None:
    assert not daemon.client(service.endpoint).status().runs
    assert torch.equal(ksampler(remote), ksampler(local))


def test_a_conditioning_without_a_text_gets_that_of_an_empty_prompt(remote: Any, local: Any) -> None:
    """Where the loader has text encoders, as Load Checkpoint has."""
    (context, options), bare = text(7)[0], text(1)
    bare[0][0] = bare[0][1]["pooled_output"] = None
    leaf = leaf_of(remote)
    leaf.empty_prompt = lambda: {"context": context, "y": options["pooled_output"]}
    assert torch.equal(ksampler(remote, bare, cfg=1.0), ksampler(local, text(7), cfg=1.0))
