"""Weights that stay in fp8: real ranks give the picture of rounded weights, from a quarter of the memory of float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.live.conftest import FLUX, VAE
from tests.live.service import Service, serving, wait_for
from tests.live.test_image import MODEL, SIGMAS, TOLERANCE, given, noise
from tests.models.test_storage import rounded
from tests.rank.reference import Reference, error, euler
from xditd.client import Client
from xditd.models.making import flux_facts, make_flux, make_vae
from xditd.models.making_loras import make_lora
from xditd.protocol.errors import XditError
from xditd.protocol.figures import GroupStatus
from xditd.protocol.messages import PlanRequest

SHAPE = {**FLUX, "double_blocks": 4, "single_blocks": 8}
IN_FP8 = "diffusion_models/fp8.safetensors"
MARGIN = 1 << 20
E4M3 = "float8_e4m3fn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in float32, and as people have it in fp8: matrices alone."""
    folder = tmp_path_factory.mktemp("models")
    flux = make_flux(folder / "diffusion_models" / "flux.safetensors", **SHAPE, dtype=torch.float32)
    in_fp8 = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in load_file(flux).items()}
    save_file(in_fp8, flux.with_name("fp8.safetensors"))
    make_vae(folder / "vae" / "ae.safetensors", **VAE)
    make_lora(folder / "loras" / "ink.safetensors", "flux", flux_facts(**SHAPE))
    return folder


def settings(folder: Path) -> dict[str, object]:
    return {
        "models.folders": {kind: [str(folder / kind)] for kind in ("diffusion_models", "vae", "loras")},
        "devices.activation_memory": MARGIN,
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("s"), **settings(folder)) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client
        for group in client.status().groups:
            client.unload(group=group.group)


def sample(client: Client, model: str, plan: PlanRequest, **how: object) -> torch.Tensor:
    with client.open_run(model, plan, **how) as run:
        run.put_conditioning("prompt", given(31), {"guidance": 3.5})
        return run.sample(noise(18, 22), SIGMAS, "prompt").clone()


def expected(path: Path) -> torch.Tensor:
    """Plain diffusers in float32."""
    predict = partial(Reference(path, flux_facts(**SHAPE)).predict, **given(31), guidance=3.5)
    return euler(predict, SIGMAS, noise(18, 22))


def group(client: Client) -> GroupStatus:
    (group,) = client.status().groups
    return group


@pytest.mark.parametrize("weight_dtype", [E4M3, "float8_e5m2"])
def test_the_picture_is_that_of_rounded_weights(
    client: Client, folder: Path, weight_dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flux = folder / MODEL
    one, two = (
        sample(client, MODEL, PlanRequest(weight_dtype=weight_dtype, **plan))
        for plan in ({"devices": ("0",)}, {"ulysses": 2})
    )
    reference = expected(rounded(flux, weight_dtype))
    figures = error(one, reference), error(two, reference), error(two, one), error(one, expected(flux))
    with capsys.disabled():
        print("\n  {}: one rank {:.1e}, ulysses 2 {:.1e} off diffusers with rounded weights, {:.1e} from each other; {:.2f} off the weights of the file".format(weight_dtype, *figures), end="")  # fmt: skip
    assert max(figures[:3]) < TOLERANCE
    assert figures[3] > 100 * TOLERANCE, "else nothing was rounded"


def test_a_rank_has_a_quarter_of_float32_and_says_so(
    client: Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.load(MODEL, PlanRequest(devices=("0",)))
    (plain,) = group(client).ranks
    client.unload(group=group(client).group)
    loaded = client.load(MODEL, PlanRequest(devices=("0",), weight_dtype=E4M3))
    there = group(client)
    (rank,) = there.ranks
    answer = client.explain(MODEL, PlanRequest(devices=("0",), weight_dtype=E4M3))
    with capsys.disabled():
        print(f"\n  {rank.weights / plain.weights:.0%} of the bytes of float32, the layer that is cast among them; counted with {answer.candidates[0].weights / plain.weights:.0%}", end="")  # fmt: skip
    assert (there.plan.weight_dtype, there.dtype) == (E4M3, "float32")
    assert "rounded to float8_e4m3fn" in loaded.plan.reason
    # One of four double blocks is a tenth of all, in float32.
    assert rank.weights < 0.45 * plain.weights
    assert rank.weights == pytest.approx(answer.candidates[0].weights, rel=0.02)


def test_a_lora_is_added_to_what_is_in_fp8_in_full(client: Client, folder: Path) -> None:
    """As if it had been merged into the rounded weights, and these had not been rounded again."""
    plan = PlanRequest(devices=("0",), weight_dtype=E4M3)
    path = rounded(folder / MODEL, E4M3)
    same = path.with_name("rounded.safetensors")
    same.write_bytes(path.read_bytes())
    lora = [("ink.safetensors", 0.8)]
    found = sample(client, MODEL, plan, lora=lora)
    plain = sample(client, MODEL, plan)
    merged = sample(client, f"diffusion_models/{same.name}", PlanRequest(devices=("0",)), lora=lora)
    assert error(found, merged) < TOLERANCE
    assert error(found, plain) > 100 * TOLERANCE
    assert error(plain, expected(path)) < TOLERANCE, "and leaves nothing behind"


def test_it_sleeps_and_wakes_as_it_was(client: Client) -> None:
    plan = PlanRequest(ulysses=2, weight_dtype=E4M3)
    before = sample(client, MODEL, plan)
    client.sleep(group=group(client).group)
    wait_for(lambda: group(client).state == "asleep", "the model to sleep")
    assert torch.equal(sample(client, MODEL, plan), before)


@pytest.mark.parametrize(
    ("model", "plan", "code", "why"),
    [
        (MODEL, {"weight_dtype": E4M3, "ulysses": 2, "shard": True}, "not_built", "either alone is"),
        (MODEL, {"weight_dtype": "file"}, "bad_plan", "is in float32"),
        (MODEL, {"weight_dtype": "fp8"}, "bad_plan", "choose file, float8_e4m3fn"),
        ("vae/ae.safetensors", {"weight_dtype": E4M3}, "bad_plan", "for diffusion models"),
    ],
    ids=["sharded", "not-in-fp8", "strange", "vae"],
)
def test_what_cannot_be_is_refused_before_any_rank_is_there(
    client: Client, model: str, plan: dict[str, object], code: str, why: str
) -> None:
    with pytest.raises(XditError, match=why) as refused:
        client.load(model, PlanRequest(**plan))
    assert refused.value.code == code
    assert not client.status().groups


def test_a_file_in_fp8_stays_so_where_memory_lacks_and_its_picture_is_the_same(
    service: Service, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where nothing less may be had: it is nothing less."""
    one = PlanRequest(devices=("0",), fallback="never")
    with service.client() as client:
        assert client.load(IN_FP8, one).plan.weight_dtype == ""
        whole = sample(client, IN_FP8, one)
    room = int(0.5 * (folder / MODEL).stat().st_size) + MARGIN
    small = {**settings(folder), "devices.cpu_memory": room}
    with serving(tmp_path_factory.mktemp("s"), **small) as lacking, lacking.client() as client:
        loaded = client.load(IN_FP8, one)
        assert (loaded.plan.weight_dtype, loaded.degraded) == ("file", "")
        assert "stay in the fp8 of their file" in loaded.plan.reason
        assert error(sample(client, IN_FP8, one), whole) < TOLERANCE
        with pytest.raises(XditError) as refused:
            client.load(MODEL, one)
    assert refused.value.code == "out_of_memory"
