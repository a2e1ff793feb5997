"""Three models and memory for two: each comes when it is asked for, another goes, every result is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.live.conftest import VAE, Serve
from tests.live.service import Service, wait_for
from xditd.client import Client
from xditd.models.making import make_vae
from xditd.protocol.errors import XditError
from xditd.protocol.messages import ModelRef, PlanRequest

ONE = PlanRequest(devices=("0",))
NAMES = ("a", "b", "c")
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for seed, name in enumerate(NAMES):
        make_vae(folder / f"{name}.safetensors", **VAE, dtype=torch.float32, seed=seed)
    return folder


@pytest.fixture
def service(serve: Serve, three: Path) -> Service:
    """A daemon whose memory holds two and a half of the models, by their weights alone."""
    size = (three / "a.safetensors").stat().st_size
    return serve(
        **{
            "models.folders": {"vae": [str(three)]},
            "devices.cpu_memory": int(2.5 * size),
            "devices.activation_memory": 0,
        }
    )


def model(name: str) -> str:
    return f"vae/{name}.safetensors"


def decode(client: Client, name: str) -> torch.Tensor:
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(7))
    return client.decode(model(name), latent, ONE).clone()


def there(client: Client) -> set[str]:
    return {group.model.name[0] for group in client.status().groups if group.state == "ready"}


def test_three_models_come_and_go_in_memory_for_two_and_every_run_is_right(service: Service) -> None:
    with service.client() as client:
        first = {name: decode(client, name) for name in NAMES}
        assert there(client) == {"b", "c"}
        assert not torch.equal(first["a"], first["b"])
        assert torch.equal(decode(client, "a"), first["a"])  # loaded again, b is driven out
        assert there(client) == {"a", "c"}
        assert torch.equal(decode(client, "c"), first["c"])
        assert len(service.ranks()) == 2
        before = service.rss()
        freed = client.free_memory()
        assert len(freed.groups) == 2
        assert freed.in_use == ()
        assert freed.before[0].models > 0
        assert freed.after[0].models == 0
        assert service.ranks() == []
        after = service.rss()
        print(f"\n  daemon and ranks: {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB", end="")
        assert after < before / 4


def test_a_model_in_use_is_not_driven_out(serve: Serve) -> None:
    """The echo in three dtypes is three models, each counted with what its activations are said to take."""
    service = serve(**{"devices.activation_memory": "100MiB", "devices.cpu_memory": "250MiB"})
    a, b, c = (ModelRef(kind="echo", name="echo", dtype=dtype) for dtype in DTYPES)
    with service.client() as client:
        with client.open_run(a, ONE), client.open_run(b, ONE):
            with pytest.raises(XditError) as waited:
                client.open_run(c, ONE, timeout=0.5)
            assert waited.value.code == "timeout"
            assert len(service.ranks()) == 2
            freed = client.free_memory()
            assert (freed.groups, len(freed.in_use)) == ((), 2)
        with client.open_run(c, ONE) as run:
            assert len(service.ranks()) == 2
            with pytest.raises(XditError, match="group_busy"):
                client.unload(group=run.group)
        unloaded = client.unload(group=run.group)
        assert unloaded.before[0].models - unloaded.after[0].models == 100 << 20
        assert len(service.ranks()) == 1


def test_a_model_that_is_not_kept_is_gone_when_its_run_is_over(serve: Serve) -> None:
    service = serve(**{"models.keep_alive": "never"})
    with service.client() as client:
        with client.open_run("echo/echo", ONE):
            assert len(client.status().groups) == 1
        wait_for(lambda: not client.status().groups and not service.ranks(), "the ranks to be gone")
        with client.open_run("echo/echo", ONE) as run:
            assert run.group == "g2"
