"""Text encoders by their headers, alone and in a checkpoint, and what they may be asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog.sparse_files import SMALL_FLUX, entries, header_of, prefixed, write
from xditd.catalog.catalog import Catalog
from xditd.catalog.detection import PREFIXES, recognise
from xditd.catalog.families import bert, clip, family, flux, t5
from xditd.catalog.header import read_header
from xditd.catalog.quantised import plain
from xditd.catalog.roots import model_roots
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import EncodeText, ModelInfo, ModelRef, Plan
from xditd.protocol.tensors import Tensor

CLIP_L = {
    "width": 768,
    "layers": 12,
    "heads": 12,
    "vocabulary": 49408,
    "positions": 77,
    "intermediate": 3072,
    "projection": 1,
    "openclip": 0,
}
CLIP_G = CLIP_L | {"width": 1280, "layers": 32, "heads": 20, "intermediate": 5120}
T5_XXL = {
    "width": 4096,
    "layers": 24,
    "heads": 64,
    "head_dim": 64,
    "ff": 10240,
    "vocabulary": 32128,
    "gated": 1,
}
MT5_XL = T5_XXL | {"width": 2048, "heads": 32, "ff": 5120, "vocabulary": 250112}
BERT = {
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "vocabulary": 47020,
    "positions": 512,
    "types": 2,
    "intermediate": 4096,
}
TINY_BERT = BERT | {"width": 64, "layers": 2, "heads": 1, "intermediate": 128}
TINY_CLIP = CLIP_L | {"width": 64, "layers": 2, "heads": 1, "intermediate": 128}
TINY_T5 = T5_XXL | {"width": 32, "layers": 2, "heads": 2, "head_dim": 16, "ff": 48}


def refusal(header, part="text_encoder") -> XditError:
    with pytest.raises(XditError) as caught:
        recognise(header, part)
    return caught.value


# ------------------------------------------------------------------------------------------------------ what it is


def test_clip_l_at_its_real_size(tmp_path):
    shapes = clip.parameters(CLIP_L)
    header = read_header(write(tmp_path / "clip_l.safetensors", entries(shapes, "F16")))
    found = recognise(header, "text_encoder")
    assert (found.family, found.variant, found.dtype, found.facts) == ("clip", "clip_l", "float16", CLIP_L)
    assert found.parameters == 123_060_480 + 768 * 768  # as transformers counts, and the projection


def test_clip_g_is_told_by_its_depth():
    found = recognise(header_of(clip.parameters(CLIP_G), "F16"), "text_encoder")
    assert (found.variant, found.facts) == ("clip_g", CLIP_G)
    assert found.parameters == 694_659_840


def test_clip_g_has_as_many_parameters_in_openclips_layout():
    facts = CLIP_G | {"openclip": 1}
    for prefix, part in (("", "text_encoder"), ("conditioner.embedders.1.model.", "clip_g")):
        shapes = prefixed(prefix, clip.parameters(facts))
        found = recognise(header_of(shapes | {f"{prefix}logit_scale": ()}, "F16"), part)
        assert (found.variant, found.facts, found.prefix) == ("clip_g", facts, prefix)
        assert found.parameters == 694_659_840


def test_a_clip_h_in_openclips_layout_is_not_taken_for_a_clip_l():
    error = refusal(header_of(clip.parameters(CLIP_G | {"layers": 24, "openclip": 1})))
    assert error.code is Code.NOT_BUILT
    assert "CLIP-H" in error.message


def test_the_encoders_of_a_hunyuandit_at_their_real_size():
    found = recognise(header_of(bert.parameters(BERT), "F16"), "text_encoder")
    assert (found.family, found.facts) == ("bert", BERT)
    assert found.parameters == 350_986_240  # as transformers counts
    found = recognise(header_of(t5.parameters(MT5_XL), "F16"), "text_encoder")
    assert (found.family, found.facts, found.parameters) == ("t5", MT5_XL, 1_669_958_656)


def test_what_a_bert_has_beside_its_layers_is_no_matter():
    extra = {
        "bert.pooler.dense.weight": (64, 64),
        "bert.embeddings.position_ids": (1, 512),
        "cls.predictions.bias": (9,),
    }
    assert recognise(header_of(bert.parameters(TINY_BERT) | extra), "text_encoder").facts == TINY_BERT


def test_what_older_files_have_besides_is_no_matter():
    extra = {
        "text_model.embeddings.position_ids": (1, 77),
        "logit_scale": (),
        "visual_projection.weight": (3, 4),
    }
    found = recognise(header_of(clip.parameters(CLIP_L) | extra), "text_encoder")
    assert found.facts == CLIP_L
    plain = {key: shape for key, shape in clip.parameters(CLIP_L).items() if key != "text_projection.weight"}
    assert recognise(header_of(plain), "text_encoder").facts == CLIP_L | {"projection": 0}


@pytest.mark.parametrize("layers", [23, 24, 30])
def test_a_clip_h_is_not_taken_for_a_clip_l(layers):
    error = refusal(header_of(clip.parameters(CLIP_L | {"layers": layers})))
    assert error.code is Code.NOT_BUILT
    assert "CLIP-H" in error.message


def test_a_siglip_is_not_taken_for_a_clip():
    error = refusal(header_of(clip.parameters(CLIP_L) | {"text_model.head.weight": (768, 768)}))
    assert error.code is Code.NOT_BUILT
    assert "text_model.head.weight" in error.message


@pytest.mark.parametrize("dtype", ["F16", "F8_E4M3", "F8_E5M2"])
def test_t5_xxl_at_its_real_size(tmp_path, dtype):
    header = read_header(write(tmp_path / "t5xxl.safetensors", entries(t5.parameters(T5_XXL), dtype)))
    found = recognise(header, "text_encoder")
    assert (found.family, found.facts) == ("t5", T5_XXL)
    assert (len(header.tensors), found.parameters) == (219, 4_762_310_656)


def test_a_t5_may_say_its_embedding_twice():
    shapes = t5.parameters(TINY_T5) | {"encoder.embed_tokens.weight": (32128, 32)}
    assert (
        recognise(header_of(shapes), "text_encoder").parameters
        == recognise(header_of(t5.parameters(TINY_T5)), "text_encoder").parameters
    )


def test_the_first_t5_has_no_gate():
    facts = TINY_T5 | {"gated": 0}
    assert recognise(header_of(t5.parameters(facts)), "text_encoder").facts == facts


def test_a_umt5_is_not_taken_for_a_t5():
    """It has a bias of relative positions in every block."""
    key = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    error = refusal(header_of(t5.parameters(TINY_T5) | {key: (32, 2)}))
    assert error.code is Code.NOT_BUILT
    assert key in error.message


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_weights_of_scaled_fp8_know_their_scales(ending, prefix):
    weight = prefix + "encoder.block.0.layer.0.SelfAttention.q.weight"
    shapes = prefixed(prefix, t5.parameters(TINY_T5))
    numbers = {
        weight.replace("weight", ending): (),
        prefix + "scaled_fp8": (2,),
        weight.replace("weight", "scale_input"): (),
    }
    raw = header_of(shapes, "F8_E4M3")
    raw = replace(raw, tensors={**raw.tensors, **header_of(numbers, "F32").tensors})
    header = plain(raw)
    assert recognise(header, "t5xxl" if prefix else "text_encoder").dtype == "float8_e4m3fn"
    assert header.tensors[weight].scale == raw.tensors[weight.replace("weight", ending)]
    assert header.tensors.keys() == shapes.keys()


@pytest.mark.parametrize(
    ("part", "prefix"), [(part, prefix) for part in ("clip_l", "clip_g") for prefix in PREFIXES[part]]
)
def test_clip_is_found_in_a_checkpoint(part, prefix):
    shapes = prefixed(prefix, clip.parameters(TINY_CLIP)) | {f"text_encoders.{part}.logit_scale": ()}
    assert recognise(header_of(shapes), part).prefix == prefix
    assert refusal(header_of(shapes), "t5xxl").code is Code.UNKNOWN_FAMILY


@pytest.mark.parametrize(
    ("part", "shapes"),
    [
        ("clip", clip.parameters(TINY_CLIP)),
        ("openclip", clip.parameters(TINY_CLIP | {"openclip": 1})),
        ("t5", t5.parameters(TINY_T5)),
        ("bert", bert.parameters(TINY_BERT)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_spoilt_file_does_anything_but_be_refused(part, shapes):
    sizes = st.lists(st.integers(0, 5) | st.integers(0, 2**53), max_size=5).map(tuple)
    needed = sorted(
        set(shapes) - {"text_projection.weight", "text_projection"}
    )  # without it, it is another CLIP

    @settings(max_examples=150, deadline=None)
    @given(st.dictionaries(st.sampled_from(needed), st.none() | sizes, min_size=1, max_size=3))
    def spoil(changes):
        changes = {key: shape for key, shape in changes.items() if shape != shapes[key]}
        spoilt = {key: shape for key, shape in (shapes | changes).items() if shape is not None}
        if changes:
            refusal(header_of(spoilt)).message.encode()

    spoil()


# --------------------------------------------------------------------------------------------------- where it lies


@pytest.fixture
def models(tmp_path):
    return tmp_path / "comfyui" / "models"


@pytest.fixture
def catalog(models):
    return Catalog(model_roots(comfyui=models.parent, user="xditd"))


def test_a_text_encoder_is_found_under_either_name_of_its_kind(catalog, models):
    write(models / "clip" / "clip_l.safetensors", entries(clip.parameters(TINY_CLIP)))
    write(models / "text_encoders" / "t5xxl.safetensors", entries(t5.parameters(TINY_T5)))
    for kind in ("clip", "text_encoders"):
        assert catalog.find(ModelRef(kind=kind, name="clip_l.safetensors")).info.family == "clip"
        info = catalog.find(ModelRef(kind=kind, name="t5xxl.safetensors")).info
        assert (info.kind, info.part, info.family) == ("text_encoders", "text_encoder", "t5")
    assert len(catalog.list("clip")[0]) == 2


def test_a_checkpoint_lists_the_encoders_that_it_holds_and_no_other(catalog, models):
    shapes = prefixed("model.diffusion_model.", flux.parameters(SMALL_FLUX))
    shapes |= prefixed("text_encoders.clip_l.transformer.", clip.parameters(TINY_CLIP))
    shapes |= prefixed("text_encoders.t5xxl.transformer.", t5.parameters(TINY_T5))
    write(models / "checkpoints" / "all.safetensors", entries(shapes))
    listed, skipped = catalog.list()
    assert [(info.part, info.family) for info in listed] == [
        ("transformer", "flux"),
        ("clip_l", "clip"),
        ("t5xxl", "t5"),
    ]
    assert skipped == ()
    with pytest.raises(XditError, match="no clip_g") as refused:
        catalog.find(ModelRef(kind="checkpoints", name="all.safetensors", part="clip_g"))
    assert refused.value.code is Code.UNKNOWN_FAMILY


@pytest.mark.parametrize(
    ("shapes", "label"), [(clip.parameters(TINY_CLIP), "a CLIP"), (t5.parameters(TINY_T5), "a T5")]
)
def test_a_text_encoder_among_the_transformers_is_called_what_it_is(shapes, label):
    error = refusal(header_of(shapes), "transformer")
    assert error.code is Code.UNKNOWN_FAMILY
    assert f"holds {label} text encoder, and no transformer" in error.message


# --------------------------------------------------------------------------------------------- what it may be asked


def info(name, facts) -> ModelInfo:
    return ModelInfo(
        kind="text_encoders", name="x.safetensors", part="text_encoder", family=name, variant="", dtype="float16",
        bytes=1, parameters=1, facts=facts,
    )  # fmt: skip


CLIP, BARE, T5 = info("clip", CLIP_L), info("clip", CLIP_L | {"projection": 0}), info("t5", T5_XXL)


def tensor(*shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(dtype=dtype, shape=shape, frame=0)


def ask(tokens=(2, 77), dtype="int32", **fields) -> EncodeText:
    return EncodeText(id=1, run=1, tokens=tensor(*tokens, dtype=dtype), **fields)


def test_what_fits_passes():
    check = family("clip").check_encode_text
    check(CLIP, ask())
    check(
        CLIP,
        ask(
            dtype="int64",
            vectors=tensor(3, 768, dtype="float16"),
            mask=tensor(2, 77, dtype="uint8"),
            layer=-12,
            final_norm=False,
            pooled="projected",
            out=tensor(2, 77, 768),
            pooled_out=tensor(2, 768),
        ),
    )
    check(BARE, ask(layer=11, pooled="plain"))
    family("t5").check_encode_text(T5, ask((4, 4096), layer=23))
    family("t5").check_plan(T5, Plan(devices=("cuda:0",)))
    family("bert").check_encode_text(
        info("bert", BERT), ask((4, 512), mask=tensor(4, 512, dtype="int64"), layer=-2)
    )


@pytest.mark.parametrize(
    ("model", "asked", "code", "word"),
    [
        (CLIP, ask((1, 78)), Code.BAD_TENSOR, "77 tokens"),
        (T5, ask((1, 4097)), Code.BAD_TENSOR, "4096 tokens"),
        (info("bert", BERT), ask((1, 513)), Code.BAD_TENSOR, "512 tokens"),
        (info("bert", BERT), ask(pooled="plain"), Code.BAD_VALUE, "it gives none."),
        (CLIP, ask((300, 77)), Code.BAD_TENSOR, "16384"),
        (CLIP, ask((77,)), Code.BAD_TENSOR, "[B, n]"),
        (CLIP, ask(dtype="float32"), Code.BAD_TENSOR, "int32 or int64"),
        (CLIP, ask(vectors=tensor(3, 1280)), Code.BAD_TENSOR, "[k, 768]"),
        (CLIP, ask(vectors=tensor(3, 768, dtype="int64")), Code.BAD_TENSOR, "int64"),
        (CLIP, ask(vectors=tensor(5000, 768)), Code.BAD_TENSOR, "4096 are taken"),
        (CLIP, ask(mask=tensor(1, 77, dtype="int32")), Code.BAD_TENSOR, "[2, 77]"),
        (CLIP, ask(mask=tensor(2, 77)), Code.BAD_TENSOR, "uint8"),
        (CLIP, ask(layer=12), Code.BAD_VALUE, "between -12 and 11"),
        (CLIP, ask(layer=-13), Code.BAD_VALUE, "between -12 and 11"),
        (CLIP, ask(pooled="mean"), Code.BAD_VALUE, "none, plain, projected"),
        (BARE, ask(pooled="projected"), Code.BAD_VALUE, "it gives none, plain."),
        (T5, ask(pooled="plain"), Code.BAD_VALUE, "it gives none."),
        (CLIP, ask(out=tensor(2, 77, 768, dtype="float16")), Code.BAD_TENSOR, "float32"),
        (CLIP, ask(out=tensor(2, 76, 768)), Code.BAD_TENSOR, "[2, 77, 768]"),
        (CLIP, ask(pooled_out=tensor(2, 768)), Code.BAD_VALUE, "pooled is none"),
        (CLIP, ask(pooled="plain", pooled_out=tensor(2, 767)), Code.BAD_TENSOR, "[2, 768]"),
    ],
)
def test_what_does_not_fit_is_refused(model, asked, code, word):
    with pytest.raises(XditError) as caught:
        family(model.family).check_encode_text(model, asked)
    assert caught.value.code is code
    assert word in caught.value.message


def test_it_runs_on_one_device():
    rules = family("clip")
    with pytest.raises(XditError) as caught:
        rules.check_plan(CLIP, Plan(devices=("a", "b")))
    assert (caught.value.code, "one device" in caught.value.message) == (Code.NOT_BUILT, True)
