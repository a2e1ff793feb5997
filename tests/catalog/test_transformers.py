"""Transformers beside Flux: what their files are, by keys and shapes alone, and what their plans and inputs must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import pytest

from tests.catalog.sparse_files import header_of, prefixed
from tests.catalog.test_catalog_inputs import info, refused, sample, tensor
from xditd.catalog.detection import PREFIXES, recognise
from xditd.catalog.families import FAMILIES, hunyuandit, pixart, sd3, sdxl
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Plan
from xditd.protocol.tensors import Tensor

SD3 = {
    "width": 1536, "heads": 24, "head_dim": 64, "blocks": 24, "dual_blocks": 0, "qk_norm": 0, "positions": 192,
    "context_width": 4096, "pooled_width": 2048, "latent_channels": 16, "scale": 8,
}  # fmt: skip
SD35_LARGE = SD3 | {"width": 2432, "heads": 38, "blocks": 38, "qk_norm": 1}
SD35_MEDIUM = SD3 | {"dual_blocks": 13, "qk_norm": 1, "positions": 384}

SIGMA = {
    "width": 1152, "heads": 16, "blocks": 28, "context_width": 4096, "text_tokens": 300, "positions": 0, "sizes": 0,
    "latent_channels": 4, "predicted_channels": 8, "scale": 8,
}  # fmt: skip
ALPHA = SIGMA | {"text_tokens": 120, "positions": 64, "sizes": 1}

HUNYUAN12 = {
    "width": 1408, "heads": 16, "head_dim": 88, "blocks": 40, "ff": 6144, "context_width": 1024, "t5_width": 2048,
    "pooled_width": 1024, "text_tokens": 77, "t5_tokens": 256, "sizes": 0, "latent_channels": 4, "predicted_channels": 8,
    "scale": 8,
}  # fmt: skip
HUNYUAN11 = HUNYUAN12 | {"sizes": 1}

SDXL = {
    "levels": 3, "middle_depth": 10, "context_width": 2048, "vector_width": 2816, "latent_channels": 4, "v": 0, "zsnr": 0,
    "scale": 8, "channels_0": 320, "channels_1": 640, "channels_2": 1280, "depth_0": 0, "depth_1": 2, "depth_2": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A model that people have: its facts, and what its makers say of it."""

    family: ModuleType
    facts: Mapping[str, int]
    variant: str
    parameters: int
    keys: int


KNOWN = {
    "sd3_medium": Known(sd3, SD3, "3", 2_084_951_104, 491),
    "sd3.5_large": Known(sd3, SD35_LARGE, "3.5_large", 8_146_280_768, 923),
    "sd3.5_medium": Known(sd3, SD35_MEDIUM, "3.5_medium", 2_469_663_936, 665),
    "pixart_sigma": Known(pixart, SIGMA, "sigma", 612_084_896, 436),
    "pixart_alpha": Known(pixart, ALPHA, "alpha", 616_559_264, 445),
    "hunyuandit_1.2": Known(hunyuandit, HUNYUAN12, "1.2", 1_499_952_032, 1304),
    "hunyuandit_1.1": Known(hunyuandit, HUNYUAN11, "1.1", 1_516_534_048, 1305),
    "sdxl": Known(sdxl, SDXL, "eps", 2_567_463_684, 1680),
}
SMALL: dict[ModuleType, Mapping[str, int]] = {
    sd3: SD35_MEDIUM | {"width": 128, "heads": 2, "blocks": 3, "dual_blocks": 1, "positions": 8},
    pixart: ALPHA | {"width": 96, "blocks": 2, "positions": 32},
    hunyuandit: HUNYUAN11
    | {"width": 32, "heads": 4, "head_dim": 8, "blocks": 4, "ff": 64, "context_width": 24, "t5_width": 16}
    | {"pooled_width": 12, "text_tokens": 5, "t5_tokens": 6},
    sdxl: {
        **{key: value for key, value in SDXL.items() if not key.endswith("_2")},
        **{"levels": 2, "middle_depth": 1, "channels_0": 64, "channels_1": 128, "depth_1": 1},
    },
}

FREE: dict[ModuleType, set[str]] = {
    sd3: {"context_embedder.weight", "y_embedder.mlp.0.weight"},
    pixart: {"pos_embed", "y_embedder.y_embedding"},
    hunyuandit: {"text_embedding_padding", "style_embedder.weight"},
    sdxl: set(),
}
"""Tensors that alone tell a width, or that may be missing."""


def refusal(shapes: Mapping[str, tuple[int, ...]]) -> XditError:
    with pytest.raises(XditError) as caught:
        recognise(header_of(shapes), "transformer")
    return caught.value


def facts_or_refusal(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, int] | None:
    try:
        return recognise(header_of(shapes), "transformer").facts
    except XditError:
        return None


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("prefix", PREFIXES["transformer"])
def test_a_real_model_is_known_by_its_shapes(known: Known, prefix: str) -> None:
    shapes = known.family.parameters(known.facts)
    found = recognise(header_of(prefixed(prefix, shapes), "F16"), "transformer")
    assert (found.family, found.variant, found.dtype) == (known.family.name, known.variant, "float16")
    assert (found.prefix, found.facts) == (prefix, known.facts)
    assert (found.parameters, len(shapes)) == (known.parameters, known.keys)


@pytest.mark.parametrize("family", SMALL, ids=lambda family: family.name)
def test_no_missing_or_odd_parameter_passes_for_the_right_one(family: ModuleType) -> None:
    """It is refused; or it is the one tensor that tells a size which models may differ in, and is another model's."""
    shapes = family.parameters(SMALL[family])
    assert recognise(header_of(shapes), "transformer").facts == SMALL[family]
    passed = set()
    for key, shape in shapes.items():
        changes = [{}, *({key: odd} for odd in ((*shape[:-1], shape[-1] + 1), (), (0,), (*shape, 1)))]
        for change in changes:
            spoilt = {name: value for name, value in shapes.items() if name != key} | change
            facts = facts_or_refusal(spoilt)
            if facts is not None:
                assert facts != SMALL[family], key
                passed.add(key)
    assert passed <= FREE[family]


@pytest.mark.parametrize("family", SMALL, ids=lambda family: family.name)
def test_parameters_that_nobody_knows_are_not_ignored(family: ModuleType) -> None:
    shapes = family.parameters(SMALL[family])
    some = next(key for key in shapes if key.endswith(".weight"))
    error = refusal(shapes | {some.replace(".weight", ".gate"): (1,)})
    assert error.code is Code.NOT_BUILT


def test_an_sd3_with_a_context_processor_is_not_built() -> None:
    error = refusal(sd3.parameters(SMALL[sd3]) | {"context_processor.layers.0.attn.qkv.weight": (1, 1)})
    assert error.code is Code.NOT_BUILT
    assert "context_processor" in error.message


def test_positions_of_an_sd3_that_are_no_square_are_refused() -> None:
    shapes = sd3.parameters(SMALL[sd3])
    assert "no square" in refusal(shapes | {"pos_embed": (1, 65, 128)}).message
    assert "no square" in refusal(shapes | {"pos_embed": (1, 2**53, 128)}).message


# ------------------------------------------------------------------------------------------------ conditioning

GIVEN: dict[str, dict[str, Tensor]] = {
    "sd3_medium": {"context": tensor(1, 154, 4096), "pooled": tensor(1, 2048)},
    "pixart_alpha": {"context": tensor(1, 120, 4096)},
    "hunyuandit_1.1": {"context": tensor(1, 77, 1024), "context_t5": tensor(1, 256, 2048)},
    "sdxl": {"context": tensor(1, 77, 2048), "vector": tensor(1, 2816)},
}
LATENT = {
    "sd3_medium": tensor(1, 16, 33, 50),
    "pixart_alpha": tensor(1, 4, 128, 96),
    "hunyuandit_1.1": tensor(1, 4, 33, 50),
    "sdxl": tensor(1, 4, 33, 50),
}
HIGHEST = {"sd3_medium": 1000.0, "pixart_alpha": 999.0, "hunyuandit_1.1": 999.0, "sdxl": 999.0}


def model(name: str):
    known = KNOWN[name]
    return known.family, info(known.family.name, dict(known.facts), known.variant)


@pytest.mark.parametrize("name", GIVEN)
def test_a_conditioning_and_a_step_of_any_length_pass(name: str) -> None:
    family, described = model(name)
    for tokens in (77, 300) if family is hunyuandit else (1, 15, 300):
        given = GIVEN[name] | {"context": tensor(2, tokens, GIVEN[name]["context"].shape[2])}
        family.check_conditioning(described, given, {})
        x = LATENT[name]
        two = tensor(2, *x.shape[1:])
        family.check_denoise(described, two, (HIGHEST[name], 0.0), given, two)


@pytest.mark.parametrize("name", GIVEN)
def test_another_conditioning_is_refused_naming_what_it_takes(name: str) -> None:
    family, described = model(name)

    def refuse(code: Code, word: str, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
        refused(code, word, family.check_conditioning, described, tensors, values)

    given = GIVEN[name]
    refuse(Code.BAD_VALUE, "but strange came", given | {"strange": tensor(1, 2)}, {})
    refuse(Code.BAD_VALUE, "but strength came", given, {"strength": 1.0})
    for key, value in given.items():
        refuse(Code.BAD_VALUE, f"needs the tensor {key}", {n: t for n, t in given.items() if n != key}, {})
        wider = tensor(*value.shape[:-1], value.shape[-1] + 1)
        refuse(Code.BAD_TENSOR, key, given | {key: wider}, {})
        refuse(Code.BAD_TENSOR, key, given | {key: tensor(*value.shape, dtype="int64")}, {})
    if len(given) > 1:
        batches = {key: tensor(2 + i, *value.shape[1:]) for i, (key, value) in enumerate(given.items())}
        refuse(Code.BAD_TENSOR, "batch 2", batches, {})


@pytest.mark.parametrize("name", GIVEN)
def test_a_step_that_does_not_fit_is_refused(name: str) -> None:
    family, described = model(name)
    x = LATENT[name]

    def refuse(code: Code, word: str, x: Tensor, t: tuple[float, ...], out: Tensor | None = None) -> None:
        refused(code, word, family.check_denoise, described, x, t, GIVEN[name], out)

    refuse(Code.BAD_TENSOR, "[B, ", tensor(1, 3, 8, 8), (0.5,))
    refuse(Code.BAD_VALUE, "between", x, (HIGHEST[name] + 1,))
    refuse(Code.BAD_VALUE, "nan", x, (math.nan,))
    refuse(Code.BAD_TENSOR, "out has shape", x, (0.5,), tensor(1, 3, 8, 8))


@pytest.mark.parametrize("height", [385, 500])
def test_a_latent_beyond_the_positions_of_an_sd3_is_refused(height: int) -> None:
    family, described = model("sd3_medium")
    given = GIVEN["sd3_medium"]
    refused(
        Code.BAD_TENSOR, "384 × 384", family.check_denoise, described, tensor(1, 16, height, 8), (0.5,), given
    )
    noise = tensor(1, 16, 8, height)
    refused(Code.BAD_TENSOR, "384 × 384", family.check_sample, described, sample(noise=noise), given)
    family.check_denoise(described, tensor(1, 16, 384, 384), (0.5,), given)


def test_what_an_sdxl_predicts_is_told_by_keys_of_its_own() -> None:
    shapes = sdxl.parameters(SMALL[sdxl])
    for extra, variant, zsnr in (
        ({}, "eps", 0),
        ({"v_pred": (0,)}, "v", 0),
        ({"v_pred": (0,), "ztsnr": (0,)}, "v", 1),
    ):
        found = recognise(header_of(shapes | extra), "transformer")
        assert (found.variant, found.facts["zsnr"]) == (variant, zsnr)


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_an_sdxl_of_another_sampling_is_not_built(key: str) -> None:
    assert refusal(sdxl.parameters(SMALL[sdxl]) | {key: (1,)}).code is Code.NOT_BUILT


def test_an_sdxl_for_inpainting_and_its_distilled_relatives_are_not_built() -> None:
    shapes = sdxl.parameters(SMALL[sdxl])
    assert "inpainting" in refusal(shapes | {"input_blocks.0.0.weight": (64, 9, 3, 3)}).message
    distilled = {key: shape for key, shape in shapes.items() if not key.startswith("middle_block.1.")}
    assert "SSD-1B" in refusal(distilled).message


@pytest.mark.parametrize("size", [(65, 64), (64, 63), (30, 34), (2, 2)])
def test_a_latent_that_a_pixart_has_no_positions_for_is_refused(size: tuple[int, int]) -> None:
    family, described = model("pixart_alpha")
    x = tensor(1, 4, *size)
    refused(Code.BAD_TENSOR, "even", family.check_denoise, described, x, (5.0,), GIVEN["pixart_alpha"])


def test_sizes_of_a_pixart_that_cannot_be_are_refused() -> None:
    family, described = model("pixart_alpha")
    check, given = family.check_conditioning, GIVEN["pixart_alpha"]
    check(described, given, {"height": 1024.0, "width": 768.0, "aspect_ratio": 1.33})
    for value in (math.nan, math.inf, 0.0, -8.0):
        refused(Code.BAD_VALUE, "width", check, described, given, {"width": value})


def test_masks_of_a_hunyuandit_say_which_of_its_tokens_are_text() -> None:
    family, described = model("hunyuandit_1.1")
    check, given = family.check_conditioning, GIVEN["hunyuandit_1.1"]
    for dtype in ("int64", "int32", "uint8", "float32", "bfloat16"):
        masks = {"mask": tensor(1, 77, dtype=dtype), "mask_t5": tensor(2, 256, dtype=dtype)}
        check(described, given | masks, {})
    refused(Code.BAD_TENSOR, "mask_t5 has shape", check, described, given | {"mask_t5": tensor(1, 77)}, {})
    refused(
        Code.BAD_TENSOR, "mask has dtype", check, described, given | {"mask": tensor(1, 77, dtype="bool")}, {}
    )


@pytest.mark.parametrize(("key", "least"), [("context", 77), ("context_t5", 256)])
def test_a_text_that_is_shorter_than_the_padding_of_a_hunyuandit_is_refused(key: str, least: int) -> None:
    family, described = model("hunyuandit_1.1")
    given = GIVEN["hunyuandit_1.1"]
    short = {key: tensor(1, least - 1, given[key].shape[2])}
    refused(
        Code.BAD_TENSOR, f"{least} tokens at least", family.check_conditioning, described, given | short, {}
    )


def test_sizes_of_a_hunyuandit_that_cannot_be_are_refused() -> None:
    family, described = model("hunyuandit_1.1")
    check, given = family.check_conditioning, GIVEN["hunyuandit_1.1"]
    check(described, given, {"height": 768.0, "width": 1024.0, "target_height": 768.0, "crop_top": 0.0})
    for name, value in (("width", 0.0), ("crop_left", -1.0), ("target_width", math.inf)):
        refused(Code.BAD_VALUE, name, check, described, given, {name: value})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"blocks.0.attn1.q_norm.weight": (6,)}, "multiple of 4"),
        ({"pooler.c_proj.weight": (12, 12)}, "8 heads"),
        ({"text_embedding_padding": (6, 24)}, "padding of 6"),
        ({"final_layer.linear.weight": (20, 32)}, "20 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_of_a_hunyuandit_that_cannot_be_are_refused(change, word: str) -> None:
    assert word in refusal(hunyuandit.parameters(SMALL[hunyuandit]) | change).message


def test_a_hunyuandit_of_an_odd_depth_is_refused() -> None:
    assert "3 blocks" in refusal(hunyuandit.parameters(SMALL[hunyuandit] | {"blocks": 3})).message


@pytest.mark.parametrize("name", GIVEN)
def test_a_loop_begins_at_most_at_the_highest_sigma_of_the_model(name: str) -> None:
    family, described = model(name)
    highest = family.noise(described.facts).highest

    def ask(**changes):
        return sample(noise=LATENT[name], **changes)

    family.check_sample(described, ask(sigmas=(highest, highest / 2, 0.0)), GIVEN[name])
    above = ask(sigmas=(highest * 1.01, 0.0))
    refused(Code.BAD_VALUE, "between 0 and", family.check_sample, described, above, GIVEN[name])
    other = sample(noise=tensor(1, 3, 8, 8))
    refused(Code.BAD_TENSOR, "noise has shape", family.check_sample, described, other, GIVEN[name])


@pytest.mark.parametrize("size", [(65, 64), (30, 34)])
def test_a_pixart_is_not_sampled_where_it_has_no_positions(size: tuple[int, int]) -> None:
    family, described = model("pixart_alpha")
    asked = sample(noise=tensor(1, 4, *size))
    refused(Code.BAD_TENSOR, "noise has shape", family.check_sample, described, asked, GIVEN["pixart_alpha"])


# -------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", GIVEN)
def test_a_plan_that_cannot_run_is_refused_with_what_would(name: str) -> None:
    family, described = model(name)
    family.check_plan(described, Plan(devices=("a",)))
    pipelined = Plan(devices=tuple("abcd"), pipefusion=2, cfg=2)
    shared = Plan(devices=tuple("abcdefgh"), tensor=2, ring=2, cfg=2)
    if family.parallel:
        family.check_plan(described, shared)
        family.check_plan(described, pipelined)
        many = Plan(devices=tuple("a" * 1000), pipefusion=1000)
        refused(Code.BAD_PLAN, "needs as many blocks", family.check_plan, described, many)
        family.check_plan(described, Plan(devices=tuple("abcdef"), ulysses=2, ring=3))
        refused(Code.BAD_PLAN, "heads", family.check_plan, described, Plan(devices=tuple("abcde"), ulysses=5))
    else:
        refused(Code.NOT_BUILT, "2 is not built", family.check_plan, described, shared)
        refused(Code.NOT_BUILT, "2 is not built", family.check_plan, described, pipelined)
        refused(
            Code.NOT_BUILT, "one device", family.check_plan, described, Plan(devices=("a", "b"), ulysses=2)
        )


def test_all_transformers_are_tried_here() -> None:
    tried = {known.family.name for known in KNOWN.values()}
    assert tried == {name for name, family in FAMILIES.items() if family.part == "transformer"} - {"flux"}
