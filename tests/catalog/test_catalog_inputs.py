"""What a model's inputs and plan must be, refused before a rank is asked, with what would work."""

from __future__ import annotations

import math

import pytest

from tests.catalog.sparse_files import FLUX_DEV, FLUX_VAE
from xditd.catalog.families import autoencoder_of, family, text_encoder_of, transformer_of
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan, Sample
from xditd.protocol.tensors import Tensor


def info(name: str, facts=None, variant: str = "") -> ModelInfo:
    return ModelInfo(
        kind="diffusion_models", name="dev.safetensors", part="", family=name, variant=variant, dtype="bfloat16",
        bytes=1, parameters=1, facts=facts or {},
    )  # fmt: skip


FLUX = info("flux", FLUX_DEV, "dev")
VAE = info("autoencoder_kl", FLUX_VAE)
ECHO = info("echo")


def tensor(*shape: int, dtype: str = "bfloat16") -> Tensor:
    return Tensor(dtype=dtype, shape=shape, frame=0)


X = tensor(1, 16, 33, 50)
CONTEXT = tensor(1, 77, 4096)
POOLED = tensor(1, 768)
CONDITIONING = {"context": CONTEXT, "pooled": POOLED}


def sample(**changes) -> Sample:
    given = {
        "id": 1,
        "run": 1,
        "sampler": "euler",
        "sigmas": (1.0, 0.5, 0.0),
        "noise": X,
        "conditioning": "positive",
    }
    return Sample(**(given | changes))


def refused(code: Code, word: str, check, *args) -> None:
    with pytest.raises(XditError) as caught:
        check(*args)
    assert caught.value.code is code
    assert word in caught.value.message


# -------------------------------------------------------------------------------------------- Flux: conditioning


@pytest.mark.parametrize("tokens", [1, 15, 77, 256, 512])
def test_flux_takes_a_text_of_any_length(tokens):
    conditioning = {"context": tensor(1, tokens, 4096), "pooled": POOLED}
    family("flux").check_conditioning(FLUX, conditioning, {"guidance": 3.5})
    family("flux").check_conditioning(FLUX, conditioning, {})


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"pooled": None}, Code.BAD_VALUE, "needs the tensor pooled"),
        ({"context": None, "pooled": None}, Code.BAD_VALUE, "none came"),
        ({"mask": tensor(1, 77)}, Code.BAD_VALUE, "context, pooled, but mask came"),
        ({"context": tensor(1, 77, 2048)}, Code.BAD_TENSOR, "[B, n, 4096]"),
        ({"context": tensor(77, 4096)}, Code.BAD_TENSOR, "[B, n, 4096]"),
        ({"pooled": tensor(1, 1280)}, Code.BAD_TENSOR, "[B, 768]"),
        ({"context": tensor(1, 77, 4096, dtype="int64")}, Code.BAD_TENSOR, "float32"),
        ({"pooled": tensor(1, 768, dtype="float64")}, Code.BAD_TENSOR, "float32"),
        ({"context": tensor(2, 77, 4096), "pooled": tensor(3, 768)}, Code.BAD_TENSOR, "batch 2"),
    ],
)
def test_other_conditioning_is_refused_naming_what_flux_takes(changes, code, word):
    tensors = {key: value for key, value in (CONDITIONING | changes).items() if value is not None}
    refused(code, word, family("flux").check_conditioning, FLUX, tensors, {})


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -1.0])
def test_a_guidance_that_cannot_be_is_refused(guidance):
    check = family("flux").check_conditioning
    refused(Code.BAD_VALUE, "guidance", check, FLUX, CONDITIONING, {"guidance": guidance})


def test_a_value_that_flux_does_not_know_is_refused():
    check = family("flux").check_conditioning
    refused(Code.BAD_VALUE, "guidance, but strength came", check, FLUX, CONDITIONING, {"strength": 1.0})


# ------------------------------------------------------------------------------------------------ Flux: denoise


def test_a_step_of_any_size_and_batch_passes():
    check = family("flux").check_denoise
    check(FLUX, X, (0.9,), CONDITIONING)
    check(FLUX, X, (0.9,), CONDITIONING, X)
    check(FLUX, tensor(3, 16, 1, 1), (0.0, 0.5, 1.0), CONDITIONING)
    check(FLUX, tensor(3, 16, 8, 8), (1.0,), {"context": tensor(3, 9, 4096), "pooled": POOLED})


@pytest.mark.parametrize(
    ("x", "t", "out", "code", "word"),
    [
        (tensor(1, 4, 8, 8), (0.5,), None, Code.BAD_TENSOR, "[B, 16, H, W]"),
        (tensor(16, 8, 8), (0.5,), None, Code.BAD_TENSOR, "[B, 16, H, W]"),
        (tensor(1, 16, 8, 8, dtype="uint8"), (0.5,), None, Code.BAD_TENSOR, "uint8"),
        (X, (1.5,), None, Code.BAD_VALUE, "between 0 and 1"),
        (X, (-0.1,), None, Code.BAD_VALUE, "between 0 and 1"),
        (X, (math.nan,), None, Code.BAD_VALUE, "nan"),
        (X, (), None, Code.BAD_VALUE, "0 values"),
        (X, (0.5, 0.5), None, Code.BAD_VALUE, "2 values"),
        (tensor(3, 16, 8, 8), (0.5, 0.5), None, Code.BAD_VALUE, "1 or 3"),
        (X, (0.5,), tensor(1, 16, 33, 49), Code.BAD_TENSOR, "[1, 16, 33, 50]"),
        (X, (0.5,), tensor(1, 16, 33, 50, dtype="int32"), Code.BAD_TENSOR, "out has dtype"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(x, t, out, code, word):
    refused(code, word, family("flux").check_denoise, FLUX, x, t, CONDITIONING, out)


def test_conditioning_of_another_batch_is_refused_with_the_step():
    conditioning = {"context": tensor(2, 9, 4096), "pooled": tensor(2, 768)}
    check = family("flux").check_denoise
    refused(Code.BAD_TENSOR, "context has batch 2", check, FLUX, tensor(3, 16, 8, 8), (0.5,), conditioning)


# ------------------------------------------------------------------------------------------------- Flux: sample


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddim"])
def test_the_white_list_of_samplers_passes(sampler):
    family("flux").check_sample(FLUX, sample(sampler=sampler), CONDITIONING)
    family("flux").check_sample(FLUX, sample(cfg=4.0, negative="n"), CONDITIONING, CONDITIONING)
    family("flux").check_sample(
        FLUX, sample(latent=X, out=X, previews=(X, X), sigmas=(0.7, 0.1)), CONDITIONING
    )


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"sampler": "dpm_2_ancestral"}, Code.BAD_VALUE, "euler, heun, dpmpp_2m, ddim"),
        ({"sigmas": (1.0,)}, Code.BAD_VALUE, "two sigmas"),
        ({"sigmas": (1.0, 0.5, 0.5)}, Code.BAD_VALUE, "0.5 comes after 0.5"),
        ({"sigmas": (0.5, 0.6)}, Code.BAD_VALUE, "descend"),
        ({"sigmas": (1.1, 0.0)}, Code.BAD_VALUE, "between 0 and 1"),
        ({"sigmas": (1.0, -0.1)}, Code.BAD_VALUE, "between 0 and 1"),
        ({"sigmas": (math.nan, 0.0)}, Code.BAD_VALUE, "nan"),
        ({"cfg": 4.0}, Code.BAD_VALUE, "negative"),
        ({"cfg": 0.0, "negative": "n"}, Code.BAD_VALUE, "above 0"),
        ({"cfg": math.inf, "negative": "n"}, Code.BAD_VALUE, "above 0"),
        ({"noise": tensor(1, 4, 8, 8)}, Code.BAD_TENSOR, "noise"),
        ({"latent": tensor(1, 16, 8, 8)}, Code.BAD_TENSOR, "latent"),
        ({"out": tensor(1, 16, 8, 8)}, Code.BAD_TENSOR, "out"),
        ({"previews": (X, tensor(1, 16, 8, 8))}, Code.BAD_TENSOR, "preview 1"),
    ],
)
def test_a_loop_that_cannot_be_run_is_refused(changes, code, word):
    refused(code, word, family("flux").check_sample, FLUX, sample(**changes), CONDITIONING)


def test_a_negative_of_another_batch_is_refused():
    negative = {"context": tensor(2, 9, 4096), "pooled": tensor(2, 768)}
    check = family("flux").check_sample
    refused(Code.BAD_TENSOR, "batch 2", check, FLUX, sample(cfg=4.0, negative="n"), CONDITIONING, negative)


# --------------------------------------------------------------------------------------------------- Flux: plan


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 5), (2, 2), (8, 1), (24, 1)])
def test_flux_runs_where_ulysses_divides_its_heads(ulysses, ring):
    devices = tuple(f"cuda:{i}" for i in range(ulysses * ring))
    family("flux").check_plan(FLUX, Plan(devices=devices, ulysses=ulysses, ring=ring))


def test_heads_that_ulysses_does_not_divide_are_refused_with_the_degrees_that_would_work():
    plan = Plan(devices=tuple("abcde"), ulysses=5)
    refused(Code.BAD_PLAN, "the 24 heads", family("flux").check_plan, FLUX, plan)
    refused(Code.BAD_PLAN, "1, 2, 3, 4, 6, 8, 12, 24 would", family("flux").check_plan, FLUX, plan)


def test_degrees_that_are_not_built_are_refused():
    plan = Plan(devices=tuple("abcd"), pipefusion=2, ring=2)
    refused(Code.NOT_BUILT, "pipefusion together with ring", family("flux").check_plan, FLUX, plan)


# ---------------------------------------------------------------------------------------------------------- VAE


def test_a_vae_decodes_and_encodes():
    check = family("autoencoder_kl")
    check.check_decode(VAE, tensor(2, 16, 5, 7))
    check.check_decode(VAE, tensor(2, 16, 5, 7), tensor(2, 40, 56, 3, dtype="float32"))
    check.check_encode(VAE, tensor(1, 40, 56, 3, dtype="float32"))
    check.check_encode(VAE, tensor(1, 40, 56, 3, dtype="float32"), tensor(1, 16, 5, 7))
    check.check_plan(VAE, Plan(devices=("cuda:0",)))


@pytest.mark.parametrize(
    ("latent", "out", "word"),
    [
        (tensor(1, 4, 5, 7), None, "[B, 16, h, w]"),
        (tensor(1, 16, 5, 7, dtype="uint8"), None, "uint8"),
        (tensor(1, 16, 5, 7), tensor(1, 40, 56, 3), "float32"),
        (tensor(1, 16, 5, 7), tensor(1, 40, 57, 3, dtype="float32"), "[1, 40, 56, 3]"),
        (tensor(1, 16, 5, 7), tensor(1, 3, 40, 56, dtype="float32"), "[1, 40, 56, 3]"),
    ],
)
def test_a_decode_that_does_not_fit_is_refused(latent, out, word):
    refused(Code.BAD_TENSOR, word, family("autoencoder_kl").check_decode, VAE, latent, out)


@pytest.mark.parametrize(
    ("image", "out", "word"),
    [
        (tensor(1, 40, 57, 3), None, "crop it to 56 × 40"),
        (tensor(1, 3, 40, 56), None, "[B, H, W, 3]"),
        (tensor(1, 40, 56, 4), None, "[B, H, W, 3]"),
        (tensor(1, 40, 56, 3), tensor(1, 16, 5, 8), "[1, 16, 5, 7]"),
    ],
)
def test_an_encode_that_does_not_fit_is_refused(image, out, word):
    refused(Code.BAD_TENSOR, word, family("autoencoder_kl").check_encode, VAE, image, out)


def test_several_devices_of_a_vae_share_its_pictures_and_nothing_else():
    check = family("autoencoder_kl").check_plan
    check(VAE, Plan(devices=("a", "b"), patch=2))
    refused(Code.BAD_PLAN, "patch 1 is not 2 devices", check, VAE, Plan(devices=("a", "b")))
    refused(Code.NOT_BUILT, "patch would work", check, VAE, Plan(devices=("a", "b"), ulysses=2))


@pytest.mark.parametrize(("tile", "fits"), [(32, 64), (65, 64), (100, 96)])
def test_a_tile_whose_overlap_is_no_whole_latent_pixel_is_refused(tile, fits):
    for check in (family("autoencoder_kl").check_decode, family("autoencoder_kl").check_encode):
        refused(Code.BAD_VALUE, f"{fits} would work", check, VAE, tensor(1, 16, 8, 8), None, tile)


def test_a_model_that_is_asked_for_another_models_work_says_which_to_open():
    models = {"transformer": FLUX, "VAE": VAE, "text encoder": info("clip")}
    asks = {
        "transformer": (transformer_of, "denoise"),
        "VAE": (autoencoder_of, "decode"),
        "text encoder": (text_encoder_of, "encode text"),
    }
    for name, described in models.items():
        for other, (ask, verb) in asks.items():
            if name == other:
                assert ask(described, verb) is family(described.family)
            else:
                refused(Code.BAD_VALUE, f"does not {verb}; open a run of a {other}", ask, described, verb)
    assert transformer_of(ECHO, "denoise") is autoencoder_of(ECHO, "decode") is family("echo")
    refused(Code.BAD_VALUE, "open a run of a text encoder", text_encoder_of, ECHO, "encode text")


# --------------------------------------------------------------------------------------------------------- echo


def test_the_echo_takes_any_shape_and_gives_it_back():
    echo = family("echo")
    odd = tensor(7, 5, 3)
    echo.check_plan(ECHO, Plan(devices=("a", "b"), ulysses=2))
    echo.check_conditioning(ECHO, {"anything": odd}, {"some": 1.0})
    echo.check_denoise(ECHO, odd, (900.0,), {"anything": odd}, odd)
    echo.check_sample(ECHO, sample(noise=odd, sigmas=(14.6, 0.0)), {})
    echo.check_decode(ECHO, odd, tensor(1, 2, dtype="float32"))
    echo.check_encode(ECHO, odd, None)
    other = tensor(7, 5, 3, dtype="float32")
    refused(Code.BAD_TENSOR, "out has dtype", echo.check_denoise, ECHO, odd, (0.5,), {}, other)
    refused(Code.BAD_TENSOR, "out has shape", echo.check_denoise, ECHO, odd, (0.5,), {}, tensor(1))
