"""The daemon's loop in the place of ComfyUI's: the same latents, and what it has not is refused."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.patcher_extension
import nodes
import pytest
import torch

from comfy_nodes.daemon_loop import LOOPS, in_daemon
from tests.comfy.inside.conftest import load
from tests.comfy.inside.texts import latent, text
from tests.live.service import Service
from xditd.protocol.errors import XditError

STEPS, BOUND = 6, 1e-5


@pytest.fixture(scope="module")
def model(xfuser: Service) -> Any:
    return load(xfuser)


def sample(
    model: Any, sampler: str = "euler", cfg: float = 1.0, given: Any = None, **named: Any
) -> torch.Tensor:
    sampled = nodes.common_ksampler(
        model,
        5,
        STEPS,
        cfg,
        sampler,
        "simple",
        text(1, guidance=3.0),
        text(2, 17),
        given or latent(),
        **named,
    )
    result: torch.Tensor = sampled[0]["samples"]
    return result


@pytest.mark.parametrize("sampler", LOOPS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_it_gives_the_latent_of_comfyuis_loop(model: Any, sampler: str, cfg: float) -> None:
    ours, theirs = sample(in_daemon(model), sampler, cfg), sample(model, sampler, cfg)
    error = float((ours - theirs).abs().max()) / float(theirs.std())
    print(f"{sampler}, cfg {cfg:g}: {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize(
    "way",
    [{"denoise": 0.5}, {"start_step": 2, "last_step": 4}, {"start_step": 2, "disable_noise": True}],
    ids=str,
)
def test_it_begins_and_ends_where_it_is_told(model: Any, way: dict[str, Any]) -> None:
    given = latent(batch=2, seed=3)
    ours, theirs = (sample(each, given=given, **way) for each in (in_daemon(model), model))
    error = float((ours - theirs).abs().max()) / float(theirs.std())
    print(f"{error:.1e}")
    assert error <= BOUND


def test_a_sampler_that_it_has_not_is_refused(model: Any) -> None:
    with pytest.raises(XditError, match="loop comfyui"):
        sample(in_daemon(model), "uni_pc")


def test_a_mask_is_refused(model: Any) -> None:
    with pytest.raises(XditError, match="noise mask"):
        sample(in_daemon(model), given={**latent(seed=1), "noise_mask": torch.ones(1, 96, 80)})


def test_a_conditioning_for_some_of_the_steps_is_refused(model: Any) -> None:
    with pytest.raises(XditError, match="loop comfyui"):
        nodes.common_ksampler(
            in_daemon(model),
            5,
            STEPS,
            1.0,
            "euler",
            "simple",
            text(1, start_percent=0.0, end_percent=0.5),
            text(2),
            latent(),
        )


def test_somebodys_own_guidance_is_refused(model: Any) -> None:
    clone = in_daemon(model)
    clone.set_model_sampler_cfg_function(lambda args: args["cond"])
    with pytest.raises(XditError, match="sampler_cfg_function"):
        sample(clone)


@pytest.mark.parametrize("kind", ["APPLY_MODEL", "PREDICT_NOISE", "SAMPLER_SAMPLE"])
def test_another_nodes_wrapper_is_refused_and_not_passed_over(model: Any, kind: str) -> None:
    clone = in_daemon(model)
    clone.add_wrapper_with_key(
        getattr(comfy.patcher_extension.WrappersMP, kind), "other", lambda execute, *a, **k: execute(*a, **k)
    )
    with pytest.raises(XditError, match="another node"):
        sample(clone)


def test_a_patch_is_refused(model: Any) -> None:
    clone = in_daemon(model)
    clone.model_options["transformer_options"]["patches"] = {"attn1_patch": [lambda *a: a]}
    with pytest.raises(XditError, match="attn1_patch"):
        sample(clone)


def test_a_schedule_of_another_kind_is_refused(model: Any) -> None:
    """A model sampling that gives the transformer other times than sigma."""
    clone = in_daemon(model)
    clone.add_object_patch(
        "model_sampling",
        comfy.model_base.model_sampling(model.model.model_config, comfy.model_base.ModelType.FLOW),
    )
    with pytest.raises(XditError, match="model sampling"):
        sample(clone)
