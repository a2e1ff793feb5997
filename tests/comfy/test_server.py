"""A real ComfyUI over its own HTTP and websocket, with our nodes in it and a real daemon with real ranks behind them."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfy.comfy import Comfy, Event, Outcome
from tests.comfy.workflows import api_form
from tests.live.service import Service, wait_for
from xditd.models.making import make_text_models

pytestmark = pytest.mark.timeout(600)

EXAMPLES = Path(__file__).parents[2] / "comfy_nodes" / "example_workflows"
STEPS, SIZE = 4, 128

Serve = Callable[..., Service]


@pytest.fixture(scope="module")
def models(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_text_models(folder)
    return folder


@pytest.fixture(scope="module")
def serve(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    services: list[Service] = []

    def start(**settings: Any) -> Service:
        base = {
            "devices.kind": "cpu",
            "devices.cpu_ranks": 2,
            "devices.threads": 1,
            "models.folders": {path.name: [str(path)] for path in models.iterdir()},
        }
        services.append(Service(tmp_path_factory.mktemp("s"), {**base, **settings}))
        return services[-1]

    yield start
    for service in services:
        service.kill()


@pytest.fixture(scope="module")
def service(serve: Serve) -> Service:
    return serve()


@pytest.fixture(scope="module")
def start(
    checkout: Path, python: str, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Service], Comfy]]:
    comfies: list[Comfy] = []

    def started(service: Service) -> Comfy:
        base = tmp_path_factory.mktemp("comfy")
        (base / "models").symlink_to(models)
        comfies.append(Comfy(checkout, python, base, {"XDITD_ENDPOINT": service.endpoint}))
        return comfies[-1]

    yield started
    for comfy in comfies:
        comfy.kill()


@pytest.fixture(scope="module")
def comfy(start: Callable[[Service], Comfy], service: Service) -> Comfy:
    return start(service)


def example(comfy: Comfy, name: str, files: dict[str, str], **inputs: Any) -> dict[str, Any]:
    """An example workflow as the browser would send it, with our files, and inputs of nodes by "class.input"."""
    workflow = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    prompt = api_form(workflow, comfy.get("object_info"))
    for node in prompt.values():
        for key, value in node["inputs"].items():
            if isinstance(value, str):
                node["inputs"][key] = files.get(value, value)
            if f"{node['class_type']}.{key}" in inputs:
                node["inputs"][key] = inputs[f"{node['class_type']}.{key}"]
    return prompt


FILES = {
    "flux1-dev.safetensors": "flux-small.safetensors",
    "clip_l.safetensors": "clip_l.safetensors",
    "t5xxl_fp16.safetensors": "t5xxl.safetensors",
    "ae.safetensors": "ae-small.safetensors",
    "flux1-dev-fp8.safetensors": "flux-small.safetensors",
}


def flux(comfy: Comfy, seed: int = 1, **inputs: Any) -> dict[str, Any]:
    small = {
        "EmptySD3LatentImage.width": SIZE,
        "EmptySD3LatentImage.height": SIZE,
        "XDiTKSampler.steps": STEPS,
        "XDiTKSampler.seed": seed,
    }
    return example(comfy, "flux_dev_xdit.json", FILES, **{**small, **inputs})


def picture(comfy: Comfy, outcome: Outcome) -> Image.Image:
    (saved,) = [image for output in outcome.outputs.values() if output for image in output.get("images", [])]
    path = f"view?filename={saved['filename']}&subfolder={saved['subfolder']}&type={saved['type']}"
    return Image.open(io.BytesIO(comfy.get(path)))


# ------------------------------------------------------------------------------------------------------ the way it is


def test_the_example_draws_a_picture_on_two_ranks(comfy: Comfy, service: Service) -> None:
    outcome = comfy.run(flux(comfy))
    assert not outcome.error
    assert picture(comfy, outcome).size == (SIZE, SIZE)
    assert (STEPS, STEPS) in outcome.progress
    assert outcome.previews, "no preview came"
    assert any(text.startswith("✅") and "cpu:0, cpu:1" in text for text in outcome.texts), outcome.texts
    with service.client() as client:
        groups = {group.family: len(group.ranks) for group in client.status().groups}
        assert groups == {"flux": 2, "clip": 1, "t5": 1, "autoencoder_kl": 1}
        assert not client.status().runs


def test_a_checkpoint_draws_too(comfy: Comfy) -> None:
    small = {"EmptySD3LatentImage.width": SIZE, "EmptySD3LatentImage.height": SIZE, "XDiTKSampler.steps": 2}
    outcome = comfy.run(example(comfy, "flux_checkpoint_xdit.json", FILES, **small))
    assert not outcome.error
    assert picture(comfy, outcome).size == (SIZE, SIZE)


def test_two_comfyuis_share_one_daemon(
    comfy: Comfy, start: Callable[[Service], Comfy], service: Service
) -> None:
    other = start(service)
    first, second = comfy.ask(flux(comfy, seed=20, **{"XDiTKSampler.steps": 8})), None
    second = other.run(flux(other, seed=20, **{"XDiTKSampler.steps": 8}))
    outcome = Outcome(first)
    for event in comfy.hear():
        outcome.note(event)
        if outcome.over:
            break
    assert not outcome.error
    assert not second.error
    assert picture(comfy, outcome).tobytes() == picture(other, second).tobytes()
    with service.client() as client:
        kinds = [group.model.kind for group in client.status().groups]
        assert kinds.count("diffusion_models") == 1
    other.stop()


# ------------------------------------------------------------------------------------------------------- what may happen


def test_cancel_returns_within_the_step_and_the_next_picture_comes(
    start: Callable[[Service], Comfy], serve: Serve
) -> None:
    step = 1.0
    comfy = start(serve(**{"debug.rank_options": {"turn_seconds": str(step)}}))
    pressed: list[float] = []

    def press(event: Event) -> None:
        if event.type == "progress" and not pressed:  # of a step that is done: the next one is under way
            pressed.append(time.monotonic())
            comfy.post("interrupt", {})

    outcome = comfy.run(flux(comfy), press)
    took = time.monotonic() - pressed[0]
    print(f"cancelled after {took:.3f} s of a step of {step:g} s")
    assert outcome.interrupted
    assert took < step + 0.2
    again = comfy.run(flux(comfy, seed=2, **{"XDiTKSampler.steps": 1}))
    assert not again.error
    comfy.stop()


def test_a_comfyui_that_was_killed_finds_its_models_warm(
    start: Callable[[Service], Comfy], service: Service
) -> None:
    first = start(service)
    first.run(flux(first, seed=30))
    prompt = flux(first, seed=31, **{"XDiTKSampler.steps": 50})
    first.ask(prompt)
    next(event for event in first.hear() if event.type == "progress")
    first.kill()
    with service.client() as client:
        wait_for(lambda: not client.status().runs, "the run of the killed ComfyUI to end")
        pids = {rank.pid for group in client.status().groups for rank in group.ranks}
        second = start(service)
        prompt = flux(
            second, seed=32
        )  # asks ComfyUI for all that it has, which takes the better part of a second
        begin = time.monotonic()
        reached: list[float] = []

        def note(event: Event) -> None:
            if event.type == "progress" and not reached:
                reached.append(event.at)

        outcome = second.run(prompt, note)
        print(f"the first step was done {reached[0] - begin:.3f} s after ComfyUI was up")
        assert not outcome.error
        assert pids == {rank.pid for group in client.status().groups for rank in group.ranks}
        assert not [text for text in outcome.texts if "loaded in" in text], "a model was loaded anew"
    second.stop()


def test_free_memory_reaches_the_daemon_and_what_is_needed_again_comes_back(
    comfy: Comfy, service: Service
) -> None:
    assert not comfy.run(flux(comfy, seed=70)).error
    with service.client() as client:
        assert client.status().groups
        comfy.post("free", {"unload_models": True, "free_memory": True})
        wait_for(lambda: not client.status().groups, "the models to be unloaded")
    outcome = comfy.run(flux(comfy, seed=71))
    assert not outcome.error
    assert picture(comfy, outcome).size == (SIZE, SIZE)


def test_a_killed_rank_is_said_and_costs_no_picture(comfy: Comfy, service: Service) -> None:
    prompt = flux(comfy, seed=40, **{"XDiTKSampler.steps": 12})
    reference = picture(comfy, comfy.run(prompt))
    comfy.post("free", {"free_memory": True})  # what was computed is forgotten
    struck: list[bool] = []

    def strike(event: Event) -> None:
        if event.type == "progress" and not struck:
            struck.append(True)
            with service.client() as client:
                report = client.status()
            (run,) = report.runs
            (group,) = [group for group in report.groups if group.group == run.group]
            os.kill(group.ranks[1].pid, signal.SIGKILL)

    outcome = comfy.run(prompt, strike)
    assert struck
    assert not outcome.error
    assert any(text.startswith("⚠️") and "died" in text for text in outcome.texts), outcome.texts
    assert picture(comfy, outcome).tobytes() == reference.tobytes()


# -------------------------------------------------------------------------------------------------------- what it says


def test_a_choice_that_is_not_built_is_refused_in_one_sentence(comfy: Comfy) -> None:
    outcome = comfy.run(flux(comfy, seed=60, **{"XDiTUNETLoader.allow_approximate": True}))
    assert "does not have an approximate plan" in outcome.error["exception_message"]
    assert any(text.startswith("❌") for text in outcome.texts), outcome.texts


def test_a_device_that_is_not_there_is_said_on_the_node(comfy: Comfy) -> None:
    outcome = comfy.run(flux(comfy, seed=50, **{"XDiTUNETLoader.gpu_devices": "0,7"}))
    assert "7" in outcome.error["exception_message"]
    assert "bad_device" in outcome.error["exception_message"]


def test_a_dispatcher_of_another_loader_is_refused(comfy: Comfy) -> None:
    prompt = flux(comfy, seed=51)
    loader = next(number for number, node in prompt.items() if node["class_type"] == "XDiTUNETLoader")
    sampler = next(node for node in prompt.values() if node["class_type"] == "XDiTKSampler")
    prompt["other"] = {
        "class_type": "XDiTUNETLoader",
        "inputs": {**prompt[loader]["inputs"], "gpu_devices": "0"},
    }
    sampler["inputs"]["dispatcher"] = ["other", 1]
    outcome = comfy.run(prompt)
    assert "same loader" in outcome.error["exception_message"]


def test_stock_loaders_are_offered_ours_where_comfyui_has_such_offers(comfy: Comfy) -> None:
    try:
        offers = comfy.get("node_replacements")
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI has no node replacements")
    assert [offer["new_node_id"] for offer in offers["UNETLoader"]] == ["XDiTUNETLoader"]
    assert {"CheckpointLoaderSimple", "VAELoader", "DualCLIPLoader"} <= set(offers)


def test_the_status_node_shows_the_daemon(comfy: Comfy) -> None:
    outcome = comfy.run({"1": {"class_type": "XDiTDaemonStatus", "inputs": {"endpoint": ""}}})
    (text,) = outcome.outputs["1"]["text"]
    assert text.startswith("✅ xditd")
    assert "cpu:1" in text


def test_a_daemon_that_is_not_there_is_one_sentence(comfy: Comfy, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/nobody.sock"
    outcome = comfy.run({"1": {"class_type": "XDiTDaemonStatus", "inputs": {"endpoint": endpoint}}})
    assert "no such socket" in outcome.error["exception_message"]
