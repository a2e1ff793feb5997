"""CLIP, T5 and BERT give what transformers' own classes give from the same file; tokens that are none are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.models.text_references import END, BertReference, ClipReference, T5Reference, weights_of
from xditd.models import families
from xditd.models.making import make_bert, make_clip, make_t5, make_text_models
from xditd.models.making_checkpoints import make_hunyuandit_checkpoint, make_sdxl_checkpoint
from xditd.models.reading import WeightFile
from xditd.protocol.errors import Code, XditError

CPU = torch.device("cpu")
REFERENCES = {"clip": ClipReference, "t5": T5Reference, "bert": BertReference}
MAKE = {"clip": make_clip, "t5": make_t5, "bert": make_bert}
MAKERS = {
    "clip-l": ("clip", make_clip, {"vocabulary": 49408, "width": 128}),
    "clip-l without projection": ("clip", make_clip, {"projection": False}),
    "clip-g": ("clip", make_clip, {"layers": 31}),
    "clip-g in OpenCLIP's layout": ("clip", make_clip, {"layers": 31, "openclip": True}),
    "bert": ("bert", make_bert, {"width": 128}),
    "t5": ("t5", make_t5, {}),
    "t5 without gate": ("t5", make_t5, {"gated": False, "heads": 3, "head_dim": 16}),
}
TOLERANCE = 2e-6


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def load(family: str, path: Path, dtype: torch.dtype = torch.float32, part: str = "text_encoder"):
    return families.load(family, path, part, CPU, dtype)


def texts(family: str = "clip", length: int = 77) -> torch.Tensor:
    """Three texts, ended early, in the middle and late; what follows is padding."""
    tokens = torch.randint(2, 32000, (3, length), generator=torch.Generator().manual_seed(length))
    for row, end in enumerate((4, length // 2, length - 1)):
        tokens[row, end:] = END if family == "clip" else 0
    return tokens


@pytest.fixture(scope="module", params=MAKERS)
def pair(request, tmp_path_factory):
    """Ours and theirs."""
    family, make, sizes = MAKERS[request.param]
    path = make(tmp_path_factory.mktemp("t") / "x.safetensors", **sizes)
    return family, load(family, path), REFERENCES[family](path)


@pytest.mark.parametrize(
    ("layer", "final_norm"), [(None, True), (-1, False), (-2, True), (-2, False), (0, True), (0, False)]
)
def test_every_layer_is_what_transformers_gives(pair, layer, final_norm):
    family, ours, theirs = pair
    tokens = texts(family)
    with torch.no_grad():
        hidden, pooled = ours.encode(tokens, layer=layer, final_norm=final_norm)
    assert pooled is None
    assert hidden.dtype == torch.float32
    assert error(hidden, theirs(tokens, layer=layer, final_norm=final_norm)[0]) < TOLERANCE


def test_a_mask_hides_padding(pair):
    family, ours, theirs = pair
    tokens = texts(family, 40)
    mask = torch.ones_like(tokens)
    mask[0, 5:] = mask[1, 20:] = 0
    with torch.no_grad():
        hidden, _ = ours.encode(tokens, mask=mask.to(torch.uint8))
        other, _ = ours.encode(tokens)
    expected, _ = theirs(tokens, mask=mask)
    seen = mask.bool()
    assert error(hidden[seen], expected[seen]) < TOLERANCE
    if family != "clip":  # which looks at nothing that comes after anyway
        assert error(other[seen], expected[seen]) > 0.01


def test_a_mask_that_hides_all_makes_no_nan(pair):
    family, ours, _ = pair
    tokens = texts(family, 40)
    with torch.no_grad():
        hidden, _ = ours.encode(tokens, mask=torch.zeros_like(tokens))
    assert hidden.isfinite().all()


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("pooled", ["plain", "projected"])
@pytest.mark.parametrize("openclip", [False, True], ids=["transformers", "openclip"])
def test_the_pooled_output_is_the_last_layers_at_the_end_of_the_text(tmp_path, layer, pooled, openclip):
    path = make_clip(tmp_path / "x.safetensors", openclip=openclip)
    with torch.no_grad():
        hidden, vector = load("clip", path).encode(texts(), layer=layer, pooled=pooled)
    expected_hidden, expected = ClipReference(path)(texts(), layer=layer, pooled=pooled)
    assert error(hidden, expected_hidden) < TOLERANCE
    assert error(vector, expected) < TOLERANCE


def test_of_a_text_without_an_end_the_last_token_is_taken(tmp_path):
    network = load("clip", make_clip(tmp_path / "x.safetensors"))
    tokens = texts()[:, :3]
    with torch.no_grad():
        hidden, pooled = network.encode(tokens, pooled="plain")
    assert torch.equal(pooled, hidden[:, -1])


@pytest.mark.parametrize("family", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_vectors_stand_for_tokens_below_zero(tmp_path, family, dtype):
    path = MAKE[family](tmp_path / "x.safetensors")
    width = 128 if family == "t5" else 64
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    tokens = texts(family).to(dtype)
    tokens[0, 1], tokens[0, 2], tokens[2, 30] = -1, -3, -2
    network, reference = load(family, path), REFERENCES[family](path, vectors=vectors)
    pooled = "plain" if family == "clip" else "none"
    with torch.no_grad():
        hidden, vector = network.encode(tokens, vectors=vectors, pooled=pooled)
    expected, expected_vector = reference(tokens, pooled=pooled)
    assert error(hidden, expected) < TOLERANCE
    if vector is not None:
        assert error(vector, expected_vector) < TOLERANCE


@pytest.mark.parametrize(
    ("token", "vectors", "word"),
    [
        (49408, 0, "A token is 49408; this encoder's lie between 0 and 49407."),
        (2**31 - 1, 2, "A token is 2147483647"),
        (-1, 0, "A token is -1"),
        (-3, 2, "A token is -3; .* and those of the 2 vectors between -2 and -1."),
        (-(2**31), 2, "A token is -2147483648"),
    ],
)
def test_a_token_that_is_none_is_refused(tmp_path, token, vectors, word):
    network = load("clip", make_clip(tmp_path / "x.safetensors"))
    tokens = texts().to(torch.int32)
    tokens[1, 7] = token
    with pytest.raises(XditError, match=word) as refused:
        network.encode(tokens, vectors=torch.zeros(vectors, 64) if vectors else None)
    assert refused.value.code is Code.BAD_VALUE


def test_a_checkpoints_encoders_are_those_of_the_files(tmp_path):
    """But for their rounding: the checkpoint is bfloat16."""
    make_text_models(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "flux-small.safetensors"
    for family, part, name in (("clip", "clip_l", "clip_l"), ("t5", "t5xxl", "t5xxl")):
        network = load(family, checkpoint, part=part)
        reference = REFERENCES[family](checkpoint, f"text_encoders.{part}.transformer.")
        alone = load(family, tmp_path / "text_encoders" / f"{name}.safetensors")
        with torch.no_grad():
            hidden, _ = network.encode(texts(family))
            near, _ = alone.encode(texts(family))
        assert error(hidden, reference(texts(family))[0]) < TOLERANCE
        assert 0 < error(hidden, near) < 0.05


@pytest.mark.parametrize(
    ("make", "encoders"),
    [
        (
            make_sdxl_checkpoint,
            {"clip_l": ("clip", "conditioner.embedders.0.transformer."), "clip_g": ("clip", "conditioner.embedders.1.model.")},
        ),
        (
            make_hunyuandit_checkpoint,
            {"hydit_clip": ("bert", "text_encoders.hydit_clip.transformer."), "mt5xl": ("t5", "text_encoders.mt5xl.transformer.")},
        ),
    ],
    ids=["sdxl", "hunyuandit"],
)  # fmt: skip
def test_the_encoders_of_a_makers_checkpoint_are_found_in_it(tmp_path, make, encoders):
    path = make(tmp_path / "x.safetensors")
    for part, (family, prefix) in encoders.items():
        with torch.no_grad():
            hidden, _ = load(family, path, part=part).encode(texts(family))
        assert error(hidden, REFERENCES[family](path, prefix)(texts(family))[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_fp8_file_is_what_its_rounded_weights_are(tmp_path, dtype):
    plain = weights_of(make_t5(tmp_path / "x.safetensors"))
    save_file({key: value.to(dtype) for key, value in plain.items()}, tmp_path / "fp8.safetensors")
    assert WeightFile(tmp_path / "fp8.safetensors").header.tensors["shared.weight"].dtype.startswith("F8")
    with torch.no_grad():
        hidden, _ = load("t5", tmp_path / "fp8.safetensors").encode(texts("t5"))
    assert error(hidden, T5Reference(tmp_path / "fp8.safetensors")(texts("t5"))[0]) < TOLERANCE


def test_bfloat16_is_near(tmp_path):
    for family, make in MAKE.items():
        path = make(tmp_path / f"{family}.safetensors")
        with torch.no_grad():
            hidden, _ = load(family, path, torch.bfloat16).encode(texts(family), mask=torch.ones(3, 77))
        assert hidden.dtype == torch.float32
        assert error(hidden, REFERENCES[family](path)(texts(family))[0]) < 0.05
