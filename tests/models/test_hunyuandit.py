"""HunyuanDiT: every parameter has its place, patches know theirs at any size, and every input shows in the prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel

from tests.catalog.test_transformers import HUNYUAN11, HUNYUAN12
from tests.rank.families import CASES, FEW, normal
from xditd.catalog.families import hunyuandit
from xditd.catalog.layouts.hunyuandit import pieces
from xditd.models.families import load
from xditd.models.hunyuandit.config import config, spans

CPU = torch.device("cpu")
NAMES = ["hunyuandit_1.2", "hunyuandit_1.1"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def network_of(tmp_path, name: str, dtype: torch.dtype = torch.float32):
    return load("hunyuandit", CASES[name].make(tmp_path / "m.safetensors"), "transformer", CPU, dtype)


@pytest.mark.parametrize("facts", [HUNYUAN12, HUNYUAN11], ids=NAMES)
def test_every_parameter_of_the_real_networks_has_its_place(facts) -> None:
    with torch.device("meta"):
        network = HunyuanDiT2DModel(**config(facts))
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes = hunyuandit.parameters(facts)
    assert {name: piece.shape(shapes[piece.key]) for name, piece in pieces(facts).items()} == expected
    assert shapes.keys() == {piece.key for piece in pieces(facts).values()}


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_what_diffusers_whole_module_gives_with_the_makers_places(tmp_path, name: str) -> None:
    """Square and not, of odd sides, and with texts longer than the padding."""
    case = CASES[name]
    path = case.make(tmp_path / "m.safetensors")
    network, reference = load("hunyuandit", path, "transformer", CPU, torch.float32), case.reference(path)
    t = torch.tensor([900.0, 20.0])
    for size in case.sizes:
        for text in (5, FEW[0], 31):
            given, x = case.conditioning(text), normal(2, 4, *size)
            ours, theirs = network.predict(x, t, network.condition(given, {})), reference(x, t, given)
            assert (ours - theirs).abs().max() < 1e-5 * theirs.std(), (size, text)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (48, 80), (80, 48), (64, 96), (9, 31)])
def test_places_are_the_makers_and_off_the_square_not_diffusers(tmp_path, rows: int, columns: int) -> None:
    """diffusers takes (stop · (n − 1) / n) for the last place, which is right only where the first is 0."""
    network = network_of(tmp_path, "hunyuandit_1.2")
    (top, bottom), (left, right) = spans(rows, columns)
    down = np.linspace(top, bottom, rows, endpoint=False, dtype=np.float32)
    across = np.linspace(left, right, columns, endpoint=False, dtype=np.float32)
    frequency = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    angles = [
        torch.outer(torch.from_numpy(line), frequency).repeat_interleave(2, dim=1) for line in (across, down)
    ]
    expected = torch.cat([angles[0].repeat(rows, 1), angles[1].repeat_interleave(columns, dim=0)], dim=1)
    cos, sin = network._turns(rows, columns)
    assert torch.allclose(cos, expected.cos(), atol=1e-5)
    assert torch.allclose(sin, expected.sin(), atol=1e-5)
    theirs, _ = get_2d_rotary_pos_embed(16, ((top, left), (bottom, right)), (rows, columns))
    assert ((cos - theirs).abs().max() < 1e-5) == (rows == columns)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_time_is_not_rounded_to_the_compute_dtype(tmp_path, name: str, dtype: torch.dtype) -> None:
    """In bfloat16, 601 would be 600; and the arithmetic stays in the compute dtype, whatever a time's is."""
    network = network_of(tmp_path, name, dtype)
    seen: list[torch.Tensor] = []
    projection = network.backbone.time_extra_emb.time_proj
    projection.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    given = network.condition(CASES[name].conditioning(9), {})
    output = network.predict(normal(1, 4, 8, 6), torch.tensor([601.0]), given)
    assert torch.equal(torch.cat(seen), torch.tensor([601.0]))
    assert output.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_a_prediction_tells_every_input_apart(tmp_path, name: str) -> None:
    network, given = network_of(tmp_path, name), CASES[name].conditioning(9)
    x, t = normal(1, 4, 12, 10), torch.tensor([500.0])
    size = {"height": 96.0, "width": 80.0}

    def predict(x=x, t=t, values=None, **changes):
        return network.predict(x, t, network.condition(given | changes, values or {}))

    base = predict()
    assert base.shape == x.shape
    assert 0.5 < base.std() < 3
    assert torch.equal(base, predict(values=size))  # the latent's, where none is given
    for changed in (
        predict(x=x + 0.2 * torch.randn_like(x)),
        predict(t=t + 100),
        predict(context=-given["context"]),
        predict(context_t5=-given["context_t5"]),
        predict(mask=torch.ones_like(given["mask"])),
        predict(mask_t5=torch.ones_like(given["mask_t5"])),
        predict(x=x.roll(2, 3)).roll(-2, 3),  # positions
    ):
        assert (changed - base).std() > 0.02
    for name_of_size in hunyuandit.VALUES:
        changed = predict(values={**size, name_of_size: 700.0})
        if network.backbone.config.use_style_cond_and_image_meta_size:
            assert (changed - base).std() > 0.02
        else:
            assert torch.equal(changed, base)


def test_what_a_mask_hides_does_not_matter(tmp_path) -> None:
    """But for the pooled text, which HunyuanDiT takes of all tokens of mT5's."""
    network, given = network_of(tmp_path, "hunyuandit_1.2"), CASES["hunyuandit_1.2"].conditioning(9)
    hidden = torch.where(given["mask"][..., None].bool(), given["context"], 99.0)
    x, t = normal(1, 4, 8, 6), torch.tensor([500.0])
    ours, theirs = (
        network.predict(x, t, network.condition(given | {"context": text}, {}))
        for text in (hidden, given["context"])
    )
    assert torch.equal(ours, theirs)


def test_no_mask_is_one_that_hides_nothing(tmp_path) -> None:
    network, given = network_of(tmp_path, "hunyuandit_1.2"), CASES["hunyuandit_1.2"].conditioning(9)
    texts = {name: given[name] for name in ("context", "context_t5")}
    ones = {name: torch.ones_like(given[name]) for name in ("mask", "mask_t5")}
    x, t = normal(1, 4, 8, 6), torch.tensor([500.0])
    ours, theirs = (network.predict(x, t, network.condition(each, {})) for each in (texts, texts | ones))
    assert torch.equal(ours, theirs)
