"""A model is loaded by two ranks: its client hears how far, and the file is in memory once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.live.conftest import FLUX
from tests.live.service import Service, serving
from tests.live.test_image import MODEL, given, noise
from xditd.catalog.families import flux
from xditd.models.making import flux_facts
from xditd.protocol.messages import PlanRequest, Queued

PLAN = PlanRequest(ulysses=2)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Service]:
    settings = {
        "devices.cpu_ranks": 2,
        "models.folders": {"diffusion_models": [str(models / "diffusion_models")]},
    }
    with serving(tmp_path_factory.mktemp("s"), **settings) as service:
        yield service


def mapped(pid: int, path: Path) -> dict[str, int]:
    """KiB of a process's mapping of a file: resident, its proportional share, and copied for itself."""
    figures = {"Rss": 0, "Pss": 0, "Anonymous": 0}
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and name in figures:
            figures[name] += int(value.split()[0])
    return figures


def test_two_ranks_have_one_copy_of_the_file_between_them(service: Service, models: Path, capsys) -> None:
    heard: list[Queued] = []
    path = models / MODEL
    with service.client() as client:
        client.load(MODEL, PLAN, on_event=heard.append)
        with client.open_run(MODEL, PLAN) as run:  # a turn, so that every page was looked at
            run.put_conditioning("prompt", given(77), {"guidance": 3.5})
            run.denoise([(noise(18, 22), 0.7, "prompt")])
            ranks = [rank.pid for rank in client.status().groups[0].ranks]
            figures = [mapped(pid, path) for pid in ranks]
    size = path.stat().st_size // 1024
    resident, share = (sum(figure[name] for figure in figures) for name in ("Rss", "Pss"))
    with capsys.disabled():
        print(
            f"\n  {size} KiB of file, two ranks: {resident} KiB resident, {share} KiB in proportion", end=""
        )
    assert len(ranks) == 2
    assert resident > 1.8 * size, "both have it all"
    assert share < 1.05 * size, "and share it"
    assert [figure["Anonymous"] for figure in figures] == [0, 0]
    assert {psutil.Process(pid).ppid() for pid in ranks} == {service.process.pid}

    loading = [event for event in heard if event.total]
    weights = sum(math.prod(shape) for shape in flux.parameters(flux_facts(**FLUX)).values())
    assert {event.phase for event in loading} == {"loading"}
    assert {event.total for event in loading} == {2 * 4 * weights}
    assert loading[-1].loaded == loading[-1].total
    assert [event.loaded for event in loading] == sorted(event.loaded for event in loading)
