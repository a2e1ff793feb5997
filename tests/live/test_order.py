"""What a client sends by two ways comes in its order: a turn never overtakes the conditioning that it names."""

from __future__ import annotations

import pytest
import torch

from tests.live.conftest import Serve
from xditd.protocol.errors import XditError

X = torch.zeros(1, 16, 4, 4)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["slots", "frames"])
def test_conditioning_that_is_not_waited_for_is_there_when_it_is_named(
    serve: Serve, shared_memory: bool
) -> None:
    service = serve()
    with service.client(shared_memory=shared_memory) as client, client.open_run("echo/echo") as run:
        for i in range(50):
            for key in ("a", "b", "c"):  # the daemon reads one message a time from each way
                run.put_conditioning(f"{key}{i % 20}", {"context": X}, wait=False)
            run.sample(X, [1.0, 0.0], f"c{i % 20}")
            for key in ("d", "e", "f"):
                run.put_conditioning(f"{key}{i % 20}", {"context": X}, wait=False)
            run.denoise([(X, 0.5, f"f{i % 20}")])


def test_what_is_wrong_with_it_is_told_by_what_comes_next(serve: Serve) -> None:
    service = serve()
    with service.client() as client:
        run = client.open_run("diffusion_models/flux.safetensors")
        run.put_conditioning("c", {"context": X}, wait=False)
        with pytest.raises(XditError, match="pooled"):
            run.sample(X, [1.0, 0.0], "c")
