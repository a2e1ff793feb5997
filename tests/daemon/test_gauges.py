"""What the hardware tells, through an NVML that is made up: what is there is shown, what is not is nil, nothing crashes."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from tests.daemon.fake_nvml import FakeNvml, Gpu
from tests.live.service import wait_for
from xditd.daemon import devices
from xditd.daemon.gauges import LINKS_EVERY, Gauges
from xditd.protocol.errors import XditError
from xditd.protocol.figures import DeviceStatus, Nvlink


@pytest.fixture
def nvml(monkeypatch):
    """Puts an NVML with these GPUs in place of the real one."""

    def put(*gpus: Gpu, **options) -> FakeNvml:
        fake = FakeNvml(*gpus, **options)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


def seen() -> list[DeviceStatus]:
    gauges = Gauges(devices.own("auto", (), 2))
    gauges.look()
    return list(gauges.status({"cuda:0"}, time.monotonic()))


def test_a_gpu_that_tells_everything(nvml):
    nvml(Gpu(0, reasons=0x04 | 0x40, links={0: "switch", 1: "switch", 2: None}), Gpu(1))
    first, second = seen()
    assert (first.name, first.model, first.uuid) == ("cuda:0", "NVIDIA H100", "GPU-0")
    assert (first.memory_total, first.memory_used) == (80 << 30, 20 << 30)
    assert (first.temperature, first.power, first.power_limit, first.utilization) == (54, 612.4, 700.0, 97)
    assert first.throttled == ("power_cap", "hardware_thermal")
    assert first.nvlink == Nvlink(links=3, up=2, generation=4, speed=26.562e9, peers={"switch": 2})
    assert (first.busy, second.busy) == (True, False)
    assert first.age < 5


def test_links_from_gpu_to_gpu_name_the_peer_by_its_number(nvml):
    second = Gpu(1)
    nvml(Gpu(0, links={0: second, 1: second, 2: Gpu(9)}, version=4), second)
    links = seen()[0].nvlink
    assert links.peers == {"cuda:1": 2, "00000000:09:00.0": 1}
    assert links.generation == 3


def test_a_card_that_tells_nothing_has_nil_everywhere(nvml):
    dumb = Gpu(0, memory=None, temperature=None, power=None, limit=None, load=None, reasons=None)
    nvml(dumb)
    (told,) = seen()
    assert told == DeviceStatus(
        name="cuda:0", model="NVIDIA H100", uuid="GPU-0", busy=True, age=told.age
    )  # what is not told is None


def test_a_gpu_that_falls_off_the_bus_goes_on_being_listed(nvml):
    fake = nvml(Gpu(0, links={0: "switch"}))
    gauges = Gauges(devices.own("auto", (), 2))
    gauges.look()
    fake.lost = True
    gauges.look()
    (told,) = gauges.status(set(), time.monotonic())
    assert (told.name, told.memory_used, told.temperature, told.power) == ("cuda:0", None, None, None)


def test_links_are_not_asked_for_at_every_look(nvml):
    fake = nvml(Gpu(0, links=dict.fromkeys(range(18), "switch")))
    gauges = Gauges(devices.own("auto", (), 2))
    gauges.look()
    first, fake.asked = fake.asked, 0
    gauges.look()
    assert fake.asked < first / 4
    for _ in range(LINKS_EVERY - 2):
        gauges.look()
    fake.asked = 0
    gauges.look()
    assert fake.asked == first


@pytest.mark.parametrize("absent", ["driver", "package"])
def test_without_nvml_there_are_cpu_ranks_with_the_machines_memory(nvml, monkeypatch, absent):
    if absent == "driver":
        nvml(driver=False)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    told = seen()
    assert [device.name for device in told] == ["cpu:0", "cpu:1"]
    assert told[0].memory_total
    assert (told[0].power, told[0].nvlink, told[0].throttled) == (None, None, None)
    with pytest.raises(XditError, match="NVML sees none"):
        devices.own("cuda", (), 2)


def test_a_driver_that_hangs_holds_up_nobody_and_its_figures_grow_old(nvml, monkeypatch):
    gpu = Gpu(0)
    fake = nvml(gpu)
    gauges = Gauges(devices.own("auto", (), 2), interval=0.005)
    gauges.start()
    hangs, let_go = threading.Event(), threading.Event()

    def hang(handle: Gpu) -> None:
        hangs.set()
        let_go.wait(30)

    monkeypatch.setattr(fake, "nvmlDeviceGetMemoryInfo", hang)
    assert hangs.wait(30)
    before = time.monotonic()
    (told,) = gauges.status(set(), before + 60)
    assert time.monotonic() - before < 1
    assert told.age >= 60
    assert told.temperature == 54, "the last figures stay"
    let_go.set()
    gauges.close()


def test_the_thread_outlives_whatever_nvml_raises_and_ends_when_it_is_told(nvml, monkeypatch, caplog):
    fake = nvml(Gpu(0))
    gauges = Gauges(devices.own("auto", (), 2), interval=0.005)
    gauges.start()
    monkeypatch.setattr(fake, "nvmlDeviceGetTemperature", lambda *a: 1 / 0)
    wait_for(lambda: "cannot be read" in caplog.text, "the complaint")
    monkeypatch.setattr(fake, "nvmlDeviceGetTemperature", lambda *a: 77)
    wait_for(lambda: gauges.status(set(), 0.0)[0].temperature == 77, "a new figure")
    assert caplog.text.count("cannot be read") == 1
    gauges.close()
    assert not gauges._thread.is_alive()
