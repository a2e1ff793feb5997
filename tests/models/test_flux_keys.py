"""The key map gives diffusers' network what diffusers' own converter gives it, at the one width that this knows."""

from __future__ import annotations

import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from xditd.catalog.families import flux
from xditd.catalog.layouts.flux import pieces
from xditd.models.flux.config import config, rope
from xditd.models.making import flux_facts


def test_it_agrees_with_diffusers_converter_at_the_real_width() -> None:
    """Real numbers of rows, which is all that both cut by; one column instead of thousands."""
    facts = flux_facts(heads=24, double_blocks=2, single_blocks=2)
    weights = {
        key: torch.randn(shape[0], *(1 for _ in shape[1:])) for key, shape in flux.parameters(facts).items()
    }
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(weights))
    ours = pieces(facts)
    assert ours.keys() == converted.keys()
    for name, piece in ours.items():
        value = weights[piece.key]
        if piece.rows is not None:
            value = value[slice(*piece.rows)]
        if piece.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        assert torch.equal(value, converted[name]), name


def test_every_parameter_of_the_real_networks_has_its_place() -> None:
    """dev and schnell, 19 and 38 blocks."""
    for guidance in (True, False):
        facts = flux_facts(heads=24, double_blocks=19, single_blocks=38, guidance=guidance)
        with torch.device("meta"):
            network = FluxTransformer2DModel(**config(facts))
        assert network.state_dict().keys() == pieces(facts).keys()


def test_rope_is_the_makers_at_their_width_and_even_at_any() -> None:
    assert rope(128) == (16, 56, 56)
    for head_dim in (16, 24, 32, 64, 96, 256):
        parts = rope(head_dim)
        assert sum(parts) == head_dim
        assert all(part > 0 and part % 2 == 0 for part in parts)
