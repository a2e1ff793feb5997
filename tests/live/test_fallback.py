"""A plan that cannot be had: real ranks fail at the start, for memory, or again and again; the picture is a true one, and told of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.live.conftest import FLUX, Serve
from tests.live.service import Service
from tests.live.test_image import AE, MODEL, SIGMAS, TOLERANCE, given, noise
from tests.rank.reference import Reference, error, euler
from xditd.client import Client, DegradedWarning, Run
from xditd.models.making import flux_facts
from xditd.protocol.errors import XditError
from xditd.protocol.messages import Happened, PlanRequest, Rebound

TWO = PlanRequest(ulysses=2)
NEVER = PlanRequest(ulysses=2, fallback="never")
NOISE = noise(18, 22)
X = torch.zeros(1, 16, 4, 4)
LONG = torch.linspace(1, 0, 401).tolist()

Faulty = Callable[..., Service]


@pytest.fixture
def faulty(serve: Serve) -> Faulty:
    """A daemon in whose groups of several ranks the second has faults."""

    def start(limit: int = 3, **faults: str) -> Service:
        settings = {"devices.cpu_ranks": 4, "restart.limit": limit, "restart.backoff": 0.01}
        return serve(**settings, **{"debug.rank_options": {"only_rank": "1", **faults}})

    return start


@pytest.fixture(scope="module")
def expected(models: Path) -> torch.Tensor:
    """Of one process without a daemon."""
    reference = Reference(models / MODEL, flux_facts(**FLUX))
    return euler(lambda x, t: reference.predict(x, t, **given(31), guidance=3.5), SIGMAS, NOISE)


@pytest.fixture
def client(request: pytest.FixtureRequest, faulty: Faulty) -> Iterator[Client]:
    """Of a daemon with the faults that the test names."""
    with faulty(**request.param).client() as client:
        yield client


def sample(run: Run) -> torch.Tensor:
    run.put_conditioning("prompt", given(31), {"guidance": 3.5})
    return run.sample(NOISE, SIGMAS, "prompt").clone()


def told(client: Client) -> list[Happened]:
    """The events that the daemon has kept, until it tells of a run that is degraded."""
    heard: list[Happened] = []

    def hear(event: Happened) -> None:
        heard.append(event)
        if event.event == "run_degraded":
            raise StopIteration

    with pytest.raises(StopIteration):
        client.watch(hear, after=0)
    return heard


def refused(client: Client, model: str = "echo/echo") -> XditError:
    """What comes of the same where a fallback is not wanted."""
    try:
        with client.open_run(model, NEVER) as run:
            if model == MODEL:
                sample(run)
            else:
                run.put_conditioning("c", {"context": X})
                run.sample(X, LONG, "c")
    except XditError as error:
        return error
    raise AssertionError("it was done")


@pytest.mark.parametrize(
    ("client", "code", "why"),
    [
        ({"fail_at_load": "1"}, "load_failed", "A fault that a test asked for"),
        pytest.param(
            {"crash_at_load": "1", "limit": 1},
            "model_failed",
            "was killed by SIGKILL",
            marks=pytest.mark.soak,
        ),
    ],
    ids=["raises", "killed"],
    indirect=["client"],
)
def test_a_plan_whose_ranks_do_not_start_is_followed_by_one_device(
    client: Client, code: str, why: str, expected: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    with client.open_run(MODEL, TWO) as run:
        assert run.plan.devices == ("cpu:0",), "the device on which a rank failed is left out"
        assert "ulysses 2 on cpu:0, cpu:1 could not be had" in run.degraded
        assert why in run.degraded
        latent = sample(run)
        report = client.status()
        assert [one.degraded for one in (*report.runs, *report.groups)] == [run.degraded] * 2
        event = told(client)[-1]
        assert (event.run, event.message) == (run.id, run.degraded)
    with capsys.disabled():
        print(f"\n  degraded, {code}: {error(latent, expected):.1e}", end="")
    assert error(latent, expected) < TOLERANCE
    assert refused(client).code == code


@pytest.mark.soak  # real ranks twice; tests/daemon/test_fallback.py has it without any
@pytest.mark.parametrize("client", [{"oom_at_order": "1"}], indirect=True)
def test_a_turn_that_memory_is_too_small_for_is_done_on_one_device(
    client: Client, expected: torch.Tensor
) -> None:
    events: list[object] = []
    with client.open_run(MODEL, TWO, on_event=events.append) as run:
        assert (run.plan.ulysses, run.degraded) == (2, "")
        assert error(sample(run), expected) < TOLERANCE
        assert run.plan.devices == ("cpu:0",)
        assert "ran out of memory" in run.degraded
        (event,) = [event for event in events if isinstance(event, Rebound)]
        assert event.degraded == run.degraded
        assert error(sample(run), expected) < TOLERANCE, "and so is what comes after"
    assert refused(client, MODEL).code == "out_of_memory"


def test_a_picture_that_memory_is_too_small_for_is_decoded_in_tiles(serve: Serve) -> None:
    service = serve(**{"debug.rank_options": {"oom_when_whole": "1"}})
    latent = noise(9, 7)
    with service.client() as client:
        plan = PlanRequest(offload="model")  # of a VAE, the last of what is exact
        with client.open_run(AE, plan) as run:
            image = run.decode(latent)
            assert "in tiles of 512 pixels, which is approximate" in run.degraded
            assert told(client)[-1].message == run.degraded
        assert torch.equal(image, client.decode(AE, latent, plan, tile=512)), "one tile is the picture whole"
        with pytest.warns(DegradedWarning, match="in tiles of 512 pixels"):
            client.decode(AE, latent, plan)
        never = PlanRequest(offload="model", fallback="never")
        for asked, options in ((plan, {"tile": 0}), (never, {})):
            with pytest.raises(XditError) as failed:
                client.decode(AE, latent, asked, **options)
            assert failed.value.code == "out_of_memory"
    assert f"Degraded: ae.safetensors: {run.degraded}" in service.said()


@pytest.mark.soak  # three starts of real ranks
def test_devices_that_lack_memory_for_a_shared_picture_leave_it_to_one_in_tiles(serve: Serve) -> None:
    service = serve(**{"debug.rank_options": {"oom_when_whole": "1"}})
    latent = noise(9, 7)
    with service.client() as client, client.open_run(AE, PlanRequest(patch=2)) as run:
        image = run.decode(latent)
        assert len(run.plan.devices) == 1
        assert "patch 2 on cpu:0, cpu:1 could not be had" in run.degraded
        assert "in tiles of 512 pixels" in run.degraded
        assert torch.equal(image, client.decode(AE, latent, tile=512))


@pytest.mark.soak  # four starts of real ranks; tests/daemon/test_fallback.py has it without any
@pytest.mark.parametrize("client", [{"crash_at_order": "2"}], indirect=True)
def test_ranks_that_die_in_mid_run_again_and_again_cost_the_plan_and_not_the_picture(
    client: Client, expected: torch.Tensor
) -> None:
    events: list[object] = []
    with client.open_run(MODEL, TWO, on_event=events.append) as run:
        assert error(sample(run), expected) < TOLERANCE
        assert "was killed by SIGKILL" in run.degraded
    moved = [event.degraded for event in events if isinstance(event, Rebound)]
    assert moved == ["", "", run.degraded], "twice it was asked again under the plan, then under another"
    assert refused(client).code == "rank_lost"


def test_half_of_the_devices_come_before_one(faulty: Faulty) -> None:
    service = faulty(limit=1, only_rank="2", crash_at_load="1")
    with service.client() as client:
        loaded = client.load("echo/echo", PlanRequest(ulysses=2, ring=2))
        assert (loaded.plan.ulysses, loaded.plan.ring) == (2, 1)
        assert loaded.plan.devices == ("cpu:0", "cpu:1")
        assert "ulysses 2 × ring 2 on cpu:0, cpu:1, cpu:2, cpu:3 could not be had" in loaded.degraded
        starts = service.said().count("Starting echo")
        with client.open_run("echo/echo", PlanRequest(ulysses=2, ring=2)) as run:
            assert run.group == loaded.group
            assert run.degraded == loaded.degraded
        assert service.said().count("Starting echo") == starts == 2, (
            "what failed a moment ago is not tried again"
        )
        with pytest.raises(XditError, match="choose auto or never"):
            client.load("echo/echo", PlanRequest(fallback="perhaps"))
    assert "Degraded: echo: ulysses 2 × ring 2" in service.said()


def test_a_daemon_that_is_told_never_fails_unless_a_request_says_otherwise(serve: Serve) -> None:
    faults = {"only_rank": "1", "fail_at_load": "1"}
    service = serve(**{"debug.rank_options": faults, "compute.fallback": "never"})
    with service.client() as client:
        with pytest.raises(XditError) as failed:
            client.load("echo/echo", TWO)
        assert failed.value.code == "load_failed"
        assert client.load("echo/echo", PlanRequest(ulysses=2, fallback="auto")).degraded
