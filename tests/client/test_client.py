"""What a program can ask, through shared memory and through frames alike."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.client.fake_daemon import FakeDaemon
from tests.client.threads import later
from xditd.client import Client, Degraded, DegradedWarning
from xditd.client.buffers import Buffer
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef, PlanRequest

MODEL = "diffusion_models/flux/dev.safetensors"


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (1, 16, 8, 8))).to(dtype)


def in_use(client: Client) -> int:
    connection = client._connection
    assert connection is not None
    return connection.arena.in_use if connection.arena is not None else 0


def test_it_knows_its_daemon(daemon: FakeDaemon, client: Client) -> None:
    assert client.epoch == daemon.epoch
    assert client.daemon_version == "0.fake"
    assert "flux" in client.capabilities
    assert client.limits.runs == 16
    assert client.status().state == "serving"
    assert client.models().models[0].family == "flux"
    assert client.load(MODEL).warm
    assert client.unload(group="g1").groups == ("g1",)
    assert client.sleep(group="g1").groups == ("g1",)
    client.cancel(7)
    client.drain()


def test_a_model_is_named_by_kind_and_name(daemon: FakeDaemon, client: Client) -> None:
    client.load(MODEL, PlanRequest(devices=("cpu:0",), ulysses=1))
    client.load(ModelRef(kind="vae", name="a/b", dtype="float32"))
    first, second = daemon.wait_for("load", 2)
    assert first.model == ModelRef(kind="diffusion_models", name="flux/dev.safetensors")
    assert first.plan == PlanRequest(devices=("cpu:0",), ulysses=1)
    assert second.model.dtype == "float32"
    for wrong in ("dev.safetensors", "/dev", "vae/", ""):
        with pytest.raises(XditError) as refusal:
            client.load(wrong)
        assert refusal.value.code == Code.BAD_VALUE


def test_a_run_denoises_what_it_is_given_and_leaves_nothing(daemon: FakeDaemon, client: Client) -> None:
    events: list[object] = []
    with client.open_run(MODEL, label="a picture", on_event=events.append) as run:
        assert (run.group, run.plan.devices, run.model.variant) == ("g1", ("cpu:0",), "dev")
        run.put_conditioning("positive", {"context": x(1, 5, 4), "pooled": x(1, 4)}, {"guidance": 3.5})
        one, two = x(), x(2, 16, 4, 4, dtype=torch.bfloat16)
        got = run.denoise([(one, 0.5, "positive"), (two, torch.tensor([1.0, 1.0]), "positive")])
        assert torch.equal(got[0], one * 2 + 0.5)
        assert torch.equal(got[1], two * 2 + 1.0)
        assert got[1].dtype == torch.bfloat16
    del got
    assert in_use(client) == 0
    (event,) = events
    assert isinstance(event, m.Queued)
    (put,) = daemon.wait_for("put_conditioning")
    assert put.values == {"guidance": 3.5}
    assert put.tensors["context"].shape == (1, 5, 4)
    assert daemon.wait_for("denoise")[0].items[1].t == (1.0, 1.0)
    assert daemon.wait_for("close")[0].run == run.id


@pytest.mark.parametrize("lanes", [True, False])
def test_steps_take_the_lane_where_the_daemon_offers_one_and_its_loss_is_no_loss(
    daemon: FakeDaemon, lanes: bool
) -> None:
    daemon.lanes = lanes
    with Client(daemon.endpoint) as client, client.open_run(MODEL) as run:
        run.denoise([(x(), 0.0, "c")])
        assert len(daemon._by_lane) == lanes
        for peer in list(daemon._lanes):
            daemon.do(lambda peer=peer: daemon._close_lane(peer))
        run.denoise([(x(), 0.0, "c")])
        assert len(daemon._by_lane) == lanes


def test_any_strides_and_dtypes_arrive_as_they_are(client: Client) -> None:
    with client.open_run(MODEL) as run:
        for given in (
            x(1, 16, 8, 8).transpose(2, 3),
            x(1, 16, 8, 8)[:, ::2],
            x(1, 16, 8, 8, dtype=torch.float16),
            x(3, 1, 1, 1).expand(3, 16, 4, 4),
            x().requires_grad_(),
        ):
            (got,) = run.denoise([(given, 0.0, "c")])
            assert got.shape == given.shape
            assert torch.equal(got, given.detach() * 2)
            assert not got.requires_grad


@pytest.mark.parametrize("wrong", [x().to(torch.complex64), torch.empty(0, 16, 8, 8), [1.0], None])
def test_what_cannot_travel_is_refused_here(client: Client, wrong: object) -> None:
    with client.open_run(MODEL) as run:
        with pytest.raises(XditError) as refusal:
            run.denoise([(x(), 0.0, "c"), (wrong, 0.0, "c")])  # type: ignore[list-item]
        assert refusal.value.code == Code.BAD_TENSOR
        assert in_use(client) == 0  # what was put before it is given back
        run.denoise([(x(), 0.0, "c")])


def test_a_sample_shows_every_step_and_returns_the_latent(daemon: FakeDaemon, client: Client) -> None:
    noise = x()
    seen: list[tuple[int, int, float]] = []
    shown: list[torch.Tensor | None] = []

    def callback(step: int, total: int, sigma: float, x0: torch.Tensor | None) -> None:
        seen.append((step, total, sigma))
        shown.append(x0)
        daemon.let_go()  # the next step: in a rank it takes longer than an event to come here

    daemon.hold.add("progress")
    sigmas = torch.linspace(1, 0, 11)
    with client.open_run(MODEL) as run:
        got = run.sample(noise, sigmas, "positive", negative="n", cfg=2.0, latent=x(), callback=callback)
    assert torch.allclose(got, noise + 10)
    assert [step for step, *_ in seen] == list(range(1, 11))
    assert [sigma for *_, sigma in seen] == [float(s) for s in sigmas[1:]]
    for step, x0 in enumerate(shown, 1):
        assert x0 is not None
        assert torch.allclose(x0, noise + step)  # a copy of its own
    shown.clear()
    del got, x0
    assert in_use(client) == 0
    (asked,) = daemon.wait_for("sample")
    assert (asked.negative, asked.cfg, asked.sampler) == ("n", 2.0, "euler")


def test_previews_that_were_written_over_meanwhile_are_not_shown(daemon: FakeDaemon, client: Client) -> None:
    noise = x()
    shown: dict[int, torch.Tensor] = {}

    def callback(step: int, total: int, sigma: float, x0: torch.Tensor | None) -> None:
        if x0 is not None:
            shown[step] = x0
        if step == 1:  # slow: when it is done, all steps have come
            daemon.hold.clear()
            daemon.let_go()
            client.status()  # its answer comes behind them

    daemon.hold.add("progress")
    with client.open_run(MODEL) as run:
        run.sample(noise, torch.linspace(1, 0, 11), "c", callback=callback)
        in_slots = bool(daemon.wait_for("sample")[0].previews)
    assert list(shown) == ([1, 9, 10] if in_slots else list(range(1, 11)))
    for step, x0 in shown.items():
        assert torch.allclose(x0, noise + step)


def test_a_sample_without_previews_asks_for_none(daemon: FakeDaemon, client: Client) -> None:
    got: list[object] = []
    with client.open_run(MODEL) as run:
        run.sample(x(), [1.0, 0.0], "c", callback=lambda *step: got.append(step[3]), previews=False)
        run.sample(x(), [1.0, 0.0], "c")
    assert got == [None]
    assert not any(asked.previews or asked.preview_frames for asked in daemon.wait_for("sample", 2))


def test_a_vae_decodes_and_encodes_in_a_run_of_its_own(daemon: FakeDaemon, client: Client) -> None:
    latent = x(2, 16, 4, 6, dtype=torch.bfloat16)
    image = client.decode("vae/ae.safetensors", latent)
    assert (image.shape, image.dtype) == ((2, 32, 48, 3), torch.float32)
    assert torch.equal(image[:, ::8, ::8], latent[:, :3].permute(0, 2, 3, 1).float())
    back = client.encode("vae/ae.safetensors", image)
    assert back.shape == latent.shape
    assert torch.equal(back[:, 3], latent[:, 0].float())
    assert len(daemon.wait_for("close", 2)) == 2
    del image, back
    assert in_use(client) == 0


@pytest.mark.parametrize("tag", ["run_opened", "decoded"])
def test_what_is_decoded_otherwise_than_asked_is_told_or_warned_of(
    daemon: FakeDaemon, client: Client, tag: str
) -> None:
    heard: list[object] = []
    client.decode("vae/ae.safetensors", x(1, 16, 4, 4), on_event=heard.append)
    assert not any(isinstance(event, Degraded) for event in heard)
    daemon.degraded[tag] = "it was done with less"
    client.decode("vae/ae.safetensors", x(1, 16, 4, 4), on_event=heard.append)
    assert heard[-1] == Degraded("x.safetensors", "it was done with less")
    with pytest.warns(DegradedWarning, match=r"x\.safetensors was degraded: it was done with less") as warned:
        client.decode("vae/ae.safetensors", x(1, 16, 4, 4))
    assert [warning.filename for warning in warned] == [__file__], "the line that asked"


def test_what_is_encoded_otherwise_than_asked_is_told_too(daemon: FakeDaemon, client: Client) -> None:
    daemon.degraded["encoded"] = "it was done with less"
    with pytest.warns(DegradedWarning, match="it was done with less"):
        client.encode("vae/ae.safetensors", x(1, 16, 16, 3))


def test_a_latent_of_a_shape_we_do_not_know_is_answered_with_a_frame(
    daemon: FakeDaemon, sharing: Client
) -> None:
    with sharing.open_run("vae/odd") as run:
        image = x(1, 4, 4, 3)  # smaller than one pixel of a latent: what comes of it is the daemon's to say
        latent = run.encode(image)
    assert torch.equal(latent, image[:, :1, :1, :1].expand(1, 16, 1, 1))
    assert daemon.wait_for("encode")[0].out is None


def test_results_stay_as_they_are_while_steps_go_on(client: Client) -> None:
    with client.open_run(MODEL) as run:
        given = [x() for _ in range(20)]
        results = [run.denoise([(tensor, 0.0, "c")])[0] for tensor in given]
        parts = [result[:, 3] for result in results]
        del results
        for _ in range(20):
            run.denoise([(x(), 0.0, "c")])
        for tensor, part in zip(given, parts, strict=True):
            assert torch.equal(part, tensor[:, 3] * 2)


def test_a_slot_is_used_again_when_its_result_is_gone(sharing: Client) -> None:
    with sharing.open_run(MODEL) as run:
        (first,) = run.denoise([(x(), 0.0, "c")])
        place = first.data_ptr()
        (second,) = run.denoise([(x(), 0.0, "c")])
        assert second.data_ptr() != place
        del first
        (third,) = run.denoise([(x(), 0.0, "c")])
        assert third.data_ptr() == place


def test_conditioning_lies_still_until_the_run_is_closed(sharing: Client) -> None:
    run = sharing.open_run(MODEL)
    run.put_conditioning("c", {"context": x(1, 5, 64)})
    assert in_use(sharing) == 5 * 64 * 4
    run.denoise([(x(), 0.0, "c")])
    assert in_use(sharing) == 5 * 64 * 4
    run.close()
    assert in_use(sharing) == 0


def test_results_that_a_program_hoards_exhaust_its_arena_with_a_clear_error(sharing: Client) -> None:
    hoard = []
    with sharing.open_run(MODEL) as run:
        with pytest.raises(XditError, match="Let go of results") as refusal:
            hoard.extend(iter(lambda: run.denoise([(x(1, 16, 128, 128), 0.0, "c")]), None))
        assert refusal.value.code == Code.ARENA_EXHAUSTED
        assert len(hoard) > 10
        hoard.clear()
        run.denoise([(x(1, 16, 128, 128), 0.0, "c")])


def test_buffers_go_where_tensors_go_and_need_no_torch(daemon: FakeDaemon) -> None:
    script = """
import sys, array
from xditd.client import Client
from xditd.client.buffers import Buffer
with Client(sys.argv[1]) as client, client.open_run("diffusion_models/m") as run:
    run.put_conditioning("c", {"context": Buffer(b"12345678", "float32", (1, 2))})
    (got,) = run.denoise([(Buffer(array.array("f", [1, 2, 3]), "float32", (1, 3)), 1.0, "c")])
    print(got.memory.cast("f").tolist(), got.dtype, got.shape, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, daemon.endpoint],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "[3.0, 5.0, 7.0] float32 (1, 3) False\n", done.stderr


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (3,)), ("complex64", (1,)), ("uint8", (9,))])
def test_a_buffer_that_does_not_fit_its_shape_is_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(XditError) as refusal:
        Buffer(bytes(8), dtype, shape)
    assert refusal.value.code == Code.BAD_TENSOR


def test_a_frame_over_the_daemons_limit_is_refused_before_it_is_sent(daemon: FakeDaemon) -> None:
    with (
        Client(daemon.endpoint, shared_memory=False) as client,
        client.open_run(MODEL) as run,
        pytest.raises(XditError) as refusal,
    ):
        run.denoise([(torch.zeros(1, 16, 1024, 1024), 0.0, "c")])
    assert refusal.value.code == Code.TOO_LARGE
    assert not daemon._of("denoise")


def test_a_refusal_is_raised_with_its_code_and_the_client_goes_on(client: Client) -> None:
    with pytest.raises(XditError) as refusal:
        client.open_run("diffusion_models/missing")
    assert refusal.value.code == Code.MODEL_NOT_VISIBLE
    assert client.status().state == "serving"


def test_an_answer_that_was_not_asked_for_is_refused(daemon: FakeDaemon, client: Client) -> None:
    daemon.hold.add("status")
    asked = later(client.status)
    (request,) = daemon.wait_for("status")
    daemon.say(m.Cancelled(re=request.id, run=1))
    with pytest.raises(XditError, match="Cancelled") as refusal:
        asked.result(10)
    assert refusal.value.code == Code.BAD_MESSAGE


def test_an_answer_with_another_slot_than_was_asked_for_is_refused(
    daemon: FakeDaemon, sharing: Client
) -> None:
    run = sharing.open_run(MODEL)
    daemon.hold.add("denoise")
    asked = later(run.denoise, [(x(), 0.0, "c")])
    (request,) = daemon.wait_for("denoise")
    daemon.say(m.Denoised(re=request.id, outputs=(request.items[0].x,), seconds=0.0))
    with pytest.raises(XditError) as refusal:
        asked.result(10)
    assert refusal.value.code == Code.BAD_SLOT
    assert in_use(sharing) == 0


def test_a_newer_daemons_messages_are_ignored_and_unreadable_ones_end_the_connection(
    daemon: FakeDaemon, client: Client, caplog
) -> None:
    class News(m.Struct, tag="news", tag_field="type"):  # type: ignore[name-defined,misc,call-arg]
        pass

    daemon.say(News())
    assert client.status().state == "serving"
    assert "newer" in caplog.text
    epoch = client.epoch
    daemon.do(lambda: [daemon._router.send_multipart([peer, b"\xc1"]) for peer in daemon._peers])
    with pytest.raises(XditError) as failure:
        client.status()
    assert failure.value.code == Code.BAD_MESSAGE
    assert client.epoch == epoch  # connected anew


def test_a_run_that_the_daemon_ended_says_why(daemon: FakeDaemon, client: Client) -> None:
    run = client.open_run(MODEL)
    daemon.say(
        m.RunEnded(run=run.id, code="run_idle", message="Run 1 was asked nothing for 60 s; open a new one.")
    )
    client.status()
    for ask in (lambda: run.denoise([(x(), 0.0, "c")]), lambda: run.put_conditioning("c", {"a": x()})):
        with pytest.raises(XditError, match="60 s") as failure:
            ask()
        assert failure.value.code == Code.RUN_IDLE
    run.close()
    assert in_use(client) == 0


def test_a_closed_or_cancelled_run_takes_nothing_more(daemon: FakeDaemon, client: Client) -> None:
    for end in ("close", "cancel"):
        run = client.open_run(MODEL)
        getattr(run, end)()
        with pytest.raises(XditError, match=f"{end[:5]}.*open a new run"):
            run.denoise([(x(), 0.0, "c")])
        run.close()
        run.cancel()
    assert len(daemon.wait_for("close")) == len(daemon.wait_for("cancel")) == 1


def test_a_rebound_run_knows_its_new_group(daemon: FakeDaemon, client: Client) -> None:
    events: list[object] = []
    run = client.open_run(MODEL, on_event=events.append)
    daemon.hold.add("denoise")
    asked = later(run.denoise, [(x(), 0.0, "c")])
    (request,) = daemon.wait_for("denoise")
    daemon.say(m.Rebound(re=request.id, run=run.id, group="g2", reason="rank 1 died"))
    daemon.let_go()
    asked.result(10)
    assert run.group == "g2"
    assert isinstance(events[-1], m.Rebound)
