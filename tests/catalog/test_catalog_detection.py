"""What a file is, by keys and shapes alone: the families that run, and the name of what does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog.sparse_files import (
    FLUX_DEV,
    FLUX_SCHNELL,
    FLUX_VAE,
    SDXL_VAE,
    SMALL_FLUX,
    entries,
    header_of,
    prefixed,
    write,
    write_flux,
    write_vae,
)
from xditd.catalog.detection import PREFIXES, recognise
from xditd.catalog.families import FAMILIES, autoencoder_kl, family, flux
from xditd.catalog.families.expected import LOADABLE
from xditd.catalog.families.known import LOOKALIKES, OTHERS
from xditd.catalog.header import read_header
from xditd.protocol.errors import Code, XditError


def refusal(header, part="transformer") -> XditError:
    with pytest.raises(XditError) as caught:
        recognise(header, part)
    assert header.name in caught.value.message
    return caught.value


# ---------------------------------------------------------------------------------------------------- Flux


def test_flux_dev_at_its_real_size(tmp_path):
    header = read_header(write_flux(tmp_path / "flux1-dev.safetensors", FLUX_DEV))
    found = recognise(header, "transformer")
    assert (found.family, found.variant, found.dtype) == ("flux", "dev", "bfloat16")
    assert found.facts == FLUX_DEV
    assert len(header.tensors) == 780
    assert found.parameters == 11_901_408_320


def test_flux_schnell_has_no_guidance():
    found = recognise(header_of(flux.parameters(FLUX_SCHNELL)), "transformer")
    assert (found.variant, found.facts["guidance"]) == ("schnell", 0)
    assert found.parameters == 11_891_178_560


@pytest.mark.parametrize("prefix", PREFIXES["transformer"])
def test_flux_is_found_under_its_prefixes(prefix):
    found = recognise(header_of(prefixed(prefix, flux.parameters(SMALL_FLUX))), "transformer")
    assert (found.prefix, found.facts) == (prefix, SMALL_FLUX)


@pytest.mark.parametrize(("dtype", "name"), list(LOADABLE.items()))
def test_the_dtype_is_that_of_most_parameters(tmp_path, dtype, name):
    shapes = flux.parameters(SMALL_FLUX)
    small = {key: shape for key, shape in shapes.items() if len(shape) == 1}
    large = {key: shape for key, shape in shapes.items() if len(shape) == 2}
    table = entries(small, "F32")
    end = max(entry["data_offsets"][1] for entry in table.values())
    header = read_header(write(tmp_path / "m.safetensors", table | entries(large, dtype, begin=end)))
    assert recognise(header, "transformer").dtype == name


@pytest.mark.parametrize(
    "key",
    [
        "double_blocks.1.txt_attn.qkv.weight",
        "single_blocks.2.linear1.bias",
        "time_in.in_layer.weight",
        "txt_in.bias",
    ],
)
def test_a_shape_that_the_others_contradict_is_named(key):
    shapes = flux.parameters(SMALL_FLUX)
    odd = shapes | {key: tuple(size + 1 for size in shapes[key])}
    error = refusal(header_of(odd))
    assert error.code is Code.FILE_INVALID
    assert key in error.message


@pytest.mark.parametrize(
    "key", ["double_blocks.1.txt_attn.qkv.weight", "vector_in.in_layer.weight", "final_layer.linear.bias"]
)
def test_a_parameter_that_is_not_there_is_named(key):
    shapes = flux.parameters(SMALL_FLUX)
    del shapes[key]
    error = refusal(header_of(shapes))
    assert error.code is Code.FILE_INVALID
    assert key in error.message


def test_a_missing_block_is_named():
    shapes = {k: s for k, s in flux.parameters(SMALL_FLUX).items() if not k.startswith("single_blocks.1.")}
    assert "single_blocks.1" in refusal(header_of(shapes)).message


def test_a_flood_of_blocks_costs_no_time():
    shapes = flux.parameters(SMALL_FLUX) | {
        f"double_blocks.{i}.img_mod.lin.weight": (1, 1) for i in range(5000)
    }
    assert refusal(header_of(shapes)).code is Code.FILE_INVALID


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"double_blocks.0.img_attn.qkv.lora_gate": (1,)}, "does not know"),
    ],
)
def test_a_flux_with_more_than_flux_is_not_built(extra, word):
    error = refusal(header_of(flux.parameters(SMALL_FLUX) | extra))
    assert error.code is Code.NOT_BUILT
    assert word in error.message


def test_what_else_lies_in_a_checkpoint_is_no_concern_of_the_transformer():
    shapes = prefixed("model.diffusion_model.", flux.parameters(SMALL_FLUX))
    others = {"text_encoders.clip_l.logit_scale": (), "double_blocks_ema": (3,)}
    assert recognise(header_of(shapes | others), "transformer").family == "flux"


@pytest.mark.parametrize("dtype", ["U8", "I8", "F8_E8M0", "F4"])
def test_quantised_weights_are_not_built_and_say_what_to_use(dtype):
    error = refusal(header_of(flux.parameters(SMALL_FLUX), dtype))
    assert error.code is Code.NOT_BUILT
    assert "quantised" in error.message
    assert "bf16" in error.message


def test_flux_with_further_input_channels_is_not_built():
    """FLUX.1-Fill-dev takes 384 columns, FLUX.1-Canny-dev 128; both predict 64."""
    shapes = flux.parameters(SMALL_FLUX) | {"img_in.weight": (SMALL_FLUX["width"], 384)}
    error = refusal(header_of(shapes))
    assert error.code is Code.NOT_BUILT
    assert "Fill" in error.message


# ----------------------------------------------------------------------------------------------------- VAE


def test_the_vae_of_flux_at_its_real_size(tmp_path):
    header = read_header(write_vae(tmp_path / "ae.safetensors"))
    found = recognise(header, "vae")
    assert (found.family, found.dtype, found.facts) == ("autoencoder_kl", "float32", FLUX_VAE)
    assert (len(header.tensors), found.parameters) == (244, 83_819_683)


def test_the_vae_of_sdxl_has_convolutions_around_its_latent():
    found = recognise(header_of(autoencoder_kl.parameters(SDXL_VAE)), "vae")
    assert found.facts == SDXL_VAE
    assert found.parameters == 83_653_863


@pytest.mark.parametrize("prefix", PREFIXES["vae"])
def test_a_vae_is_found_under_its_prefixes(prefix):
    shapes = prefixed(prefix, autoencoder_kl.parameters(FLUX_VAE))
    assert recognise(header_of(shapes | {"loss.logvar": ()}), "vae").prefix == prefix


def test_a_vae_without_its_encoder_is_refused():
    shapes = {k: s for k, s in autoencoder_kl.parameters(FLUX_VAE).items() if not k.startswith("encoder.")}
    error = refusal(header_of(shapes), "vae")
    assert error.code is Code.FILE_INVALID
    assert "encoder.down.0" in error.message


@pytest.mark.parametrize(
    "key",
    [
        "encoder.down.1.block.0.nin_shortcut.weight",
        "decoder.up.3.upsample.conv.bias",
        "decoder.mid.attn_1.q.weight",
    ],
)
def test_an_odd_vae_is_named_by_its_key(key):
    shapes = autoencoder_kl.parameters(FLUX_VAE)
    shapes[key] = (*shapes[key][:-1], shapes[key][-1] + 1)
    assert key in refusal(header_of(shapes), "vae").message


def test_a_flood_of_levels_makes_no_flood_of_numbers():
    shapes = autoencoder_kl.parameters(FLUX_VAE) | {f"encoder.down.{i}.x": (1,) for i in range(5000)}
    assert refusal(header_of(shapes), "vae").code is Code.FILE_INVALID


def test_widths_that_the_normalisation_does_not_divide_are_refused():
    facts = FLUX_VAE | {"channels": 48, "channels_0": 48}
    assert "multiple of 32" in refusal(header_of(autoencoder_kl.parameters(facts)), "vae").message


# ---------------------------------------------------------------------------------------------- all the rest


@pytest.mark.parametrize(
    ("label", "keys"), LOOKALIKES + OTHERS, ids=[f"{label}, {keys[0]}" for label, keys in LOOKALIKES + OTHERS]
)
def test_a_known_kind_of_model_is_named_where_it_does_not_run(label, keys):
    shapes = {key.replace("*", "some.module"): (1,) for key in keys}
    error = refusal(header_of(shapes))
    assert error.code is Code.NOT_BUILT
    assert f"is {label}; this version runs Flux" in error.message


@pytest.mark.parametrize(
    ("label", "keys"), LOOKALIKES, ids=[f"{label}, {keys[0]}" for label, keys in LOOKALIKES]
)
def test_what_has_the_keys_of_flux_among_its_own_is_not_taken_for_flux(label, keys):
    extra = {key.replace("*", "some.module"): (1,) for key in keys}
    error = refusal(header_of(flux.parameters(SMALL_FLUX) | extra))
    assert error.code is Code.NOT_BUILT
    assert label in error.message


def test_the_prefix_of_a_checkpoint_hides_no_known_model():
    shapes = prefixed(
        "model.diffusion_model.", {"input_blocks.0.0.weight": (1,), "label_emb.0.0.weight": (1, 2560)}
    )
    assert "an SDXL refiner" in refusal(header_of(shapes)).message


def test_one_shard_of_several_is_not_built():
    header = header_of(flux.parameters(SMALL_FLUX), name="flux-00001-of-00003.safetensors")
    error = refusal(header)
    assert error.code is Code.NOT_BUILT
    assert "shards" in error.message


def test_an_unknown_file_is_refused_with_a_few_of_its_keys():
    error = refusal(header_of({f"mystery.{i}.weight": (1,) for i in range(40)}))
    assert error.code is Code.UNKNOWN_FAMILY
    assert "mystery.0.weight" in error.message
    assert "36 more" in error.message
    assert refusal(header_of({})).code is Code.UNKNOWN_FAMILY


def test_the_other_part_is_named_where_it_was_given():
    error = refusal(header_of(autoencoder_kl.parameters(FLUX_VAE)))
    assert error.code is Code.UNKNOWN_FAMILY
    assert "an AutoencoderKL VAE" in error.message
    assert "a Flux transformer" in refusal(header_of(flux.parameters(SMALL_FLUX)), "vae").message


def test_keys_of_strangers_do_not_break_the_sentence():
    error = refusal(header_of({"\n\x1b[31m": (1,), "x" * 5000: (1,)}))
    assert error.message.isprintable()
    assert len(error.message) < 500


TINY_VAE = SDXL_VAE | {"channels": 32} | {f"channels_{i}": 32 for i in range(4)}
TINY_FLUX = SMALL_FLUX | {"double_blocks": 1, "single_blocks": 1}


@pytest.mark.parametrize(
    ("part", "shapes"),
    [("transformer", flux.parameters(TINY_FLUX)), ("vae", autoencoder_kl.parameters(TINY_VAE))],
)
def test_no_spoilt_file_does_anything_but_be_refused(part, shapes):
    sizes = st.lists(st.integers(0, 5) | st.integers(0, 2**53), max_size=5).map(tuple)

    @settings(max_examples=150, deadline=None)
    @given(st.dictionaries(st.sampled_from(sorted(shapes)), st.none() | sizes, min_size=1, max_size=3))
    def spoil(changes):
        changes = {key: shape for key, shape in changes.items() if shape != shapes[key]}
        spoilt = {key: shape for key, shape in (shapes | changes).items() if shape is not None}
        if changes:
            refusal(header_of(spoilt), part).message.encode()

    spoil()


def test_families_are_found_by_name():
    assert family("flux").part == "transformer"
    assert set(FAMILIES) == {
        "flux",
        "sd3",
        "pixart",
        "hunyuandit",
        "sdxl",
        "autoencoder_kl",
        "clip",
        "t5",
        "bert",
        "echo",
    }
    with pytest.raises(XditError) as caught:
        family("sd7")
    assert caught.value.code is Code.UNKNOWN_FAMILY
