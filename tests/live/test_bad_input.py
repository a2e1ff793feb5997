"""What cannot be is refused with a code and a sentence, before a rank is asked, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import save_file

from tests.live.conftest import FLUX, VAE
from tests.live.service import Service, serving
from xditd.client import Client
from xditd.models.making import make_flux, make_vae
from xditd.protocol import codec
from xditd.protocol import messages as m
from xditd.protocol.errors import XditError
from xditd.protocol.tensors import Tensor

FLUX_MODEL = "diffusion_models/flux.safetensors"
TWO = m.PlanRequest(ulysses=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with one good Flux and much that is none."""
    root = tmp_path_factory.mktemp("models")
    models = root / "diffusion_models"
    good = make_flux(models / "flux.safetensors", **FLUX, dtype=torch.float32)
    make_vae(root / "vae" / "ae.safetensors", **VAE)
    (models / "truncated.safetensors").write_bytes(good.read_bytes()[:-1000])
    (models / "empty.safetensors").write_bytes(b"")
    (models / "pickle.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))
    torch.save({"weight": torch.zeros(2)}, models / "flux.ckpt")
    save_file({"some.layer.weight": torch.zeros(4, 4)}, models / "foreign.safetensors")
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 999]}}).encode()
    (models / "lying.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return root


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {
        "devices.cpu_ranks": 4,
        "models.folders": {kind: [str(folder / kind)] for kind in ("diffusion_models", "vae")},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client


def refused(action: Any, *arguments: Any, **named: Any) -> str:
    """The code of the refusal; its sentence must be one, and end as one."""
    with pytest.raises(XditError) as error:
        action(*arguments, **named)
    message = error.value.message
    assert message.endswith("."), message
    assert "\n" not in message
    assert "Traceback" not in message
    return str(error.value.code)


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("diffusion_models/nowhere.safetensors", "model_not_visible"),
        ("diffusion_models/../vae/ae.safetensors", "bad_value"),
        ("diffusion_models//etc/passwd", "bad_value"),
        ("nonsense/flux.safetensors", "bad_value"),
        ("diffusion_models/truncated.safetensors", "file_invalid"),
        ("diffusion_models/empty.safetensors", "file_invalid"),
        ("diffusion_models/lying.safetensors", "file_invalid"),
        ("diffusion_models/pickle.safetensors", "file_refused"),
        ("diffusion_models/flux.ckpt", "file_refused"),
        ("diffusion_models/foreign.safetensors", "unknown_family"),
    ],
)
def test_a_file_that_is_no_model_starts_no_rank(
    client: Client, service: Service, model: str, code: str
) -> None:
    before = len(client.status().groups)
    assert refused(client.open_run, model) == code
    assert refused(client.load, model) == code
    assert len(client.status().groups) == before
    assert client.status().runs == ()


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        (m.PlanRequest(ulysses=2, devices=("0", "1", "2")), "bad_plan"),
        (m.PlanRequest(ulysses=3, devices=("0", "1", "2")), "bad_plan"),  # 4 heads
        (m.PlanRequest(ulysses=8), "bad_plan"),
        (m.PlanRequest(devices=("7",)), "bad_device"),
        (m.PlanRequest(pipefusion=2, ulysses=2), "not_built"),
    ],
)
def test_a_plan_that_cannot_be_starts_no_rank(client: Client, plan: m.PlanRequest, code: str) -> None:
    before = len(client.status().groups)
    assert refused(client.open_run, FLUX_MODEL, plan) == code
    assert len(client.status().groups) == before


def test_inputs_that_do_not_fit_never_reach_a_rank(client: Client) -> None:
    x = torch.zeros(1, 16, 8, 8)
    context, pooled = torch.zeros(1, 15, FLUX["context_width"]), torch.zeros(1, FLUX["pooled_width"])
    good = {"context": context, "pooled": pooled}
    with client.open_run(FLUX_MODEL, TWO) as run:
        run.put_conditioning("c", good)
        run.denoise([(x, 0.5, "c")])
        (group,) = client.status().groups

        assert refused(run.put_conditioning, "d", {"context": context}) == "bad_value"
        assert refused(run.put_conditioning, "d", {**good, "mask": pooled}) == "bad_value"
        assert refused(run.put_conditioning, "d", {**good, "context": context[..., :7]}) == "bad_tensor"
        assert refused(run.put_conditioning, "d", good, {"gidance": 3.5}) == "bad_value"
        assert refused(run.denoise, [(x, 0.5, "nothing")]) == "no_such_conditioning"
        assert refused(run.denoise, [(x[:, :4], 0.5, "c")]) == "bad_tensor"
        assert refused(run.denoise, [(x.long(), 0.5, "c")]) == "bad_tensor"
        assert refused(run.denoise, [(x, 1.5, "c")]) == "bad_value"
        assert refused(run.denoise, [(x, [0.5, 0.5], "c")]) == "bad_value"
        assert refused(run.denoise, [(x, float("nan"), "c")]) == "bad_value"
        assert refused(run.sample, x, [0.5, 1.0], "c") == "bad_value"
        assert refused(run.sample, x, [1.0, 0.5, 0.0], "c", sampler="lms") == "bad_value"
        assert refused(run.sample, x, [1.0, 0.0], "c", cfg=2.0) == "bad_value"
        assert refused(run.decode, x) in ("bad_value", "bad_tensor", "not_built")

        (prediction,) = run.denoise([(x, 0.5, "c")])  # and the run goes on
        assert prediction.shape == x.shape
        (after,) = client.status().groups
        assert (after.generation, after.turns) == (group.generation, group.turns + 1)
    assert client.status().runs == ()


def test_a_picture_too_small_for_a_ring_never_reaches_a_rank(client: Client) -> None:
    """One token of image and one of text, and two ranks: attention's parts could not be merged."""
    x, given = torch.zeros(1, 16, 2, 2), {"pooled": torch.zeros(1, FLUX["pooled_width"])}
    with client.open_run(FLUX_MODEL, m.PlanRequest(ring=2, devices=("0", "1"))) as run:
        run.put_conditioning("c", given | {"context": torch.zeros(1, 1, FLUX["context_width"])})
        run.put_conditioning("d", given | {"context": torch.zeros(1, 2, FLUX["context_width"])})
        with pytest.raises(
            XditError, match="1 text and 1 image tokens are too few for ring 2; ring 1 would work"
        ):
            run.denoise([(x, 0.5, "d"), (x, 0.5, "c")])
        assert refused(run.sample, x, [1.0, 0.0], "d", negative="c", cfg=2.0) == "bad_tensor"
        assert [group.turns for group in client.status().groups if group.plan.ring == 2] == [0]
        run.denoise([(x, 0.5, "d")])


class Raw:
    """A client that may say anything."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def say(self, header: bytes, *frames: bytes) -> Any:
        self.socket.send_multipart([header, *frames])
        assert self.socket.poll(10_000), "no answer"
        return codec.decode(self.socket.recv_multipart()[0], m.Reply, m.REPLIES)

    def ask(self, message: Any, *frames: bytes) -> Any:
        return self.say(codec.encode(message), *frames)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()


def test_a_client_of_another_version_is_told_which_versions_there_are(service: Service) -> None:
    with Raw(service.endpoint) as raw:
        failed = raw.ask(m.Hello(id=1, versions=(2, 9)))
        assert (failed.re, failed.code) == (1, "unsupported_version")
        assert failed.details == {"oldest": 1, "newest": 1}
        assert isinstance(raw.ask(m.Hello(id=2, versions=(1, 9))), m.Welcome)


def test_a_stranger_is_asked_to_say_hello(service: Service) -> None:
    with Raw(service.endpoint) as raw:
        assert raw.ask(m.Status(id=7)).code == "hello_required"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"", "bad_message"),
        (b"\xc1", "bad_message"),
        (b"[" * 70_000, "too_large"),
        (b"\x91" * 60_000, "bad_message"),
        (b"\x81\xa4type\xa5magic", "unknown_type"),
        (b"\x81\xa4type\xa5hello", "bad_message"),
    ],
)
def test_what_is_no_message_is_refused_and_the_daemon_goes_on(
    service: Service, header: bytes, code: str
) -> None:
    with Raw(service.endpoint) as raw:
        assert raw.say(header).code == code
        assert isinstance(raw.ask(m.Hello(id=1, versions=(1, 1))), m.Welcome)


def test_a_request_sent_twice_runs_once(service: Service) -> None:
    with Raw(service.endpoint) as raw:
        raw.ask(m.Hello(id=1, versions=(1, 1)))
        raw.socket.send(codec.encode(m.Status(id=2)))
        raw.socket.send(codec.encode(m.Status(id=2)))
        raw.socket.send(codec.encode(m.Status(id=3)))
        answers = [codec.decode(raw.socket.recv(), m.Reply, m.REPLIES).re for _ in range(2)]
        assert answers == [2, 3]


def test_bytes_that_are_not_there_are_refused(service: Service) -> None:
    with Raw(service.endpoint) as raw:
        raw.ask(m.Hello(id=1, versions=(1, 1)))
        reply = raw.ask(m.OpenRun(id=2, model=m.ModelRef(kind="vae", name="ae.safetensors")))
        while isinstance(reply, m.Queued):
            reply = codec.decode(raw.socket.recv(), m.Reply, m.REPLIES)
        shape = (1, 16, 2, 2)

        def decode(number: int, *frames: bytes, **where: Any) -> str:
            latent = Tensor(dtype="float32", shape=shape, **where)
            return str(raw.ask(m.Decode(id=number, run=reply.run, latent=latent), *frames).code)

        assert decode(3, segment=1) == "bad_slot"  # of another client, if of any
        assert decode(4, frame=0) == "bad_slot"
        assert decode(5, b"short", frame=0) == "bad_tensor"
        assert decode(6) == "bad_slot"
        ours = Tensor(dtype="float32", shape=shape, frame=0)
        assert isinstance(raw.ask(m.Decode(id=7, run=reply.run, latent=ours), bytes(ours.nbytes)), m.Decoded)
        raw.ask(m.Close(id=8, run=reply.run))


def test_another_clients_run_is_out_of_reach(service: Service, client: Client) -> None:
    with client.open_run("vae/ae.safetensors") as run, Raw(service.endpoint) as raw:
        raw.ask(m.Hello(id=1, versions=(1, 1)))
        assert raw.ask(m.Close(id=2, run=run.id)).code == "no_such_run"


def test_a_token_that_was_never_given_is_refused(service: Service) -> None:
    with Raw(service.endpoint) as raw:
        assert raw.ask(m.Hello(id=1, versions=(1, 1), token="0" * 32)).code == "not_permitted"


def test_configuration_that_cannot_be_ends_with_78(tmp_path: Path) -> None:
    import subprocess
    import sys

    file = tmp_path / "x.toml"
    file.write_text("[devices]\ncpu_rank = 2\n")
    ended = subprocess.run(
        [sys.executable, "-m", "xditd.daemon", f"--config={file}"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 78
    assert "cpu_ranks" in ended.stderr


def test_a_client_without_shared_memory_cannot_make_the_daemon_keep_everything(
    folder: Path, tmp_path: Path
) -> None:
    settings = {
        "debug.echo": True,
        "devices.kind": "cpu",
        "arena.first_bytes": "1MiB",
        "arena.per_client_bytes": "1MiB",
        "arena.total_bytes": "1MiB",
    }
    service = Service(tmp_path, settings)
    half = torch.zeros(1, 150_000)
    with service.client(shared_memory=False) as client, client.open_run("echo/echo") as run:
        run.put_conditioning("a", {"context": half})
        assert refused(run.put_conditioning, "b", {"context": half}) == "arena_exhausted"
        (x,) = run.denoise([(half, 1.0, "a")])
        assert torch.equal(x, half)
    assert service.stop() == 0
