"""A client that tokenizes gets hidden states and pooled outputs from the daemon: the same as from transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.live.service import Service, serving
from tests.models.text_references import END, ClipReference, T5Reference
from xditd.client.buffers import Buffer
from xditd.models.making import make_text_models
from xditd.protocol.errors import XditError
from xditd.protocol.messages import ModelRef

CHECKPOINT = "flux-small.safetensors"
CLIP, T5 = "text_encoders/clip_l.safetensors", "clip/t5xxl.safetensors"
TOLERANCE = 1e-5


def part(name: str) -> ModelRef:
    return ModelRef(kind="checkpoints", name=CHECKPOINT, part=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_text_models(root)
    return root


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    kinds = ("diffusion_models", "vae", "checkpoints", "text_encoders")
    settings = {
        "devices.cpu_ranks": 2,
        "models.folders": {kind: [str(folder / kind)] for kind in kinds},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        yield service


def tokens(length: int = 77, batch: int = 2) -> torch.Tensor:
    """Texts that end in their middle, with numbers that either encoder knows."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 32000, (batch, length), generator=generator, dtype=torch.int32)


def ended(length: int = 77) -> torch.Tensor:
    given = tokens(length)
    given[0, 5:] = given[1, length // 2 :] = END
    return given


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "model", [pytest.param(CLIP, marks=pytest.mark.soak), part("clip_l")], ids=["file", "checkpoint"]
)
def test_clip_gives_what_transformers_gives(service, folder, model, capsys):
    alone = model == CLIP
    path = folder / (CLIP if alone else f"checkpoints/{CHECKPOINT}")
    reference = ClipReference(path, "" if alone else "text_encoders.clip_l.transformer.")
    with service.client() as client, client.open_run(model) as run:
        assert (run.model.family, run.model.variant, run.plan.devices) == ("clip", "clip_l", ("cpu:0",))
        found = []
        for layer, final_norm, pooled in (
            (None, True, "none"),
            (-2, True, "plain"),
            (-2, False, "projected"),
            (0, False, "plain"),
        ):
            ours = run.encode_text(ended(), layer=layer, final_norm=final_norm, pooled=pooled)
            theirs = reference(ended(), layer=layer, final_norm=final_norm, pooled=pooled)
            assert (ours[1] is None) == (theirs[1] is None)
            found += [error(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None]
    with capsys.disabled():
        print(f"\n  CLIP through the daemon, {path.name}: {max(found):.1e} from transformers")
    assert max(found) < TOLERANCE


@pytest.mark.parametrize(
    "model", [T5, pytest.param(part("t5xxl"), marks=pytest.mark.soak)], ids=["file", "checkpoint"]
)
def test_t5_gives_what_transformers_gives(service, folder, model, capsys):
    alone = model == T5
    path = folder / ("text_encoders/t5xxl.safetensors" if alone else f"checkpoints/{CHECKPOINT}")
    reference = T5Reference(path, "" if alone else "text_encoders.t5xxl.transformer.")
    mask = torch.ones(2, 256, dtype=torch.int32)
    mask[0, 9:] = mask[1, 100:] = 0
    with service.client() as client, client.open_run(model) as run:
        assert run.model.family == "t5"
        found = []
        for fields in ({}, {"layer": -2}, {"layer": 0, "final_norm": False}):
            hidden, pooled = run.encode_text(tokens(256), **fields)
            assert pooled is None
            found.append(error(hidden, reference(tokens(256), **fields)[0]))
        hidden, _ = run.encode_text(tokens(256), mask=mask)
        expected, _ = reference(tokens(256), mask=mask)
        found.append(error(hidden[mask.bool()], expected[mask.bool()]))
    with capsys.disabled():
        print(f"\n  T5 through the daemon, {path.name}: {max(found):.1e} from transformers")
    assert max(found) < TOLERANCE


def test_vectors_of_textual_inversion_stand_for_tokens(service, folder):
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    given = ended()
    given[0, 2], given[0, 3] = -1, -2
    with service.client() as client:
        hidden, pooled = client.encode_text(CLIP, given, vectors=vectors, pooled="plain")
        plain, _ = client.encode_text(CLIP, given.clamp(min=0))
    expected, expected_pooled = ClipReference(folder / CLIP, vectors=vectors)(given, pooled="plain")
    assert max(error(hidden, expected), error(pooled, expected_pooled)) < TOLERANCE
    assert error(plain, expected) > 0.01


@pytest.mark.parametrize(
    ("model", "token", "word"),
    [
        (CLIP, 49408, "0 and 49407"),
        (T5, 32128, "0 and 32127"),
        (CLIP, -3, "-2 and -1"),
        (T5, -(2**31), "-2 and -1"),
    ],
)
def test_a_token_that_is_none_is_refused_and_the_group_goes_on(service, model, token, word):
    width = 64 if model == CLIP else 128
    bad = tokens()
    bad[1, 70] = token
    with service.client() as client, client.open_run(model) as run:
        before, _ = run.encode_text(tokens())
        pids = {process.pid for process in service.ranks()}
        for _ in range(3):
            with pytest.raises(XditError, match=word) as refused:
                run.encode_text(bad, vectors=torch.zeros(2, width))
            assert refused.value.code == "bad_value"
        after, _ = run.encode_text(tokens())
        assert {process.pid for process in service.ranks()} == pids
        assert all(group.generation == 1 for group in client.status().groups)
    assert torch.equal(before, after)


def test_what_does_not_fit_is_refused_before_a_rank_is_asked(service):
    with service.client() as client, client.open_run(CLIP) as run:
        group = next(group for group in client.status().groups if group.group == run.group)
        for given, fields, code in (
            (tokens(78), {}, "bad_tensor"),
            (tokens().float(), {}, "bad_tensor"),
            (tokens(), {"layer": 2}, "bad_value"),
            (tokens(), {"pooled": "mean"}, "bad_value"),
            (tokens(), {"vectors": torch.zeros(1, 65)}, "bad_tensor"),
        ):
            with pytest.raises(XditError) as refused:
                run.encode_text(given, **fields)
            assert refused.value.code == code
        for work in (
            lambda: run.decode(torch.zeros(1, 16, 4, 4)),
            lambda: run.denoise([(torch.zeros(1), 0.5, "c")]),
        ):
            with pytest.raises(XditError) as refused:
                work()
            assert refused.value.code in ("bad_value", "no_such_conditioning")
        (same,) = [other for other in client.status().groups if other.group == run.group]
        assert same.turns == group.turns


def test_a_client_without_shared_memory_or_torch_gets_the_same_bits(service):
    given, vectors = ended(), torch.randn(1, 64)
    given[1, 1] = -1
    mask = torch.ones(2, 77, dtype=torch.uint8)
    answers = []
    for shared_memory in (True, False):
        with service.client(shared_memory=shared_memory) as client:
            hidden, pooled = client.encode_text(CLIP, given, vectors=vectors, mask=mask, pooled="projected")
            answers.append((hidden.clone(), pooled.clone()))
            as_bytes = Buffer(bytearray(given.numpy().tobytes()), "int32", (2, 77))
            raw, _ = client.encode_text(CLIP, as_bytes, vectors=vectors, mask=mask)
            assert isinstance(raw, Buffer)
            answers.append(
                (torch.frombuffer(bytearray(raw.memory), dtype=torch.float32).view(raw.shape), pooled)
            )
    for hidden, pooled in answers:
        assert torch.equal(hidden, answers[0][0])
        assert torch.equal(pooled, answers[0][1])


def test_encoders_are_loaded_and_unloaded_like_any_model(service):
    with service.client() as client:
        listed = {(info.kind, info.name, info.part) for info in client.models().models}
        assert ("text_encoders", "clip_l.safetensors", "text_encoder") in listed
        assert {name for kind, _, name in listed if kind == "checkpoints"} == {
            "transformer",
            "vae",
            "clip_l",
            "t5xxl",
        }
        loaded = client.load(ModelRef(kind="text_encoders", name="t5xxl.safetensors", dtype="bfloat16"))
        (group,) = [group for group in client.status().groups if group.group == loaded.group]
        assert (group.family, group.dtype, group.state) == ("t5", "bfloat16", "ready")
        client.unload(group=loaded.group)
        assert loaded.group not in {
            group.group for group in client.status().groups if group.state in ("starting", "ready")
        }
        with pytest.raises(XditError, match="float32 or bfloat16") as refused:
            client.load(ModelRef(kind="text_encoders", name="t5xxl.safetensors", dtype="float16"))
        assert refused.value.code == "bad_value"


def test_one_checkpoint_makes_a_latent_of_a_prompt(service):
    """Text encoders and transformer on the same device, one after the other."""
    with service.client() as client:
        context, _ = client.encode_text(part("t5xxl"), tokens(256, 1))
        _, pooled = client.encode_text(part("clip_l"), ended()[:1].contiguous(), pooled="plain")
        with client.open_run(part("transformer")) as run:
            run.put_conditioning("prompt", {"context": context, "pooled": pooled}, {"guidance": 3.5})
            noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
            latent = run.sample(noise, [1.0, 0.5, 0.0], "prompt")
    assert latent.isfinite().all()
    assert 0.1 < latent.std() < 10
