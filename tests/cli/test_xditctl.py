"""What xditctl's commands ask a daemon and say to a person, without a daemon."""

from __future__ import annotations

import io
import json

import click
import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.cli import reports
from tests.cli.stand_in import Scripted, ScriptedRun
from xditd.cli import commands
from xditd.cli.status_view import status_view
from xditd.cli.xditctl import main
from xditd.client import Degraded
from xditd.protocol.errors import Code, XditError
from xditd.protocol.figures import PreloadStatus
from xditd.protocol.messages import Loaded, ModelList, ModelRef, PlanRequest, StatusReport


@pytest.fixture
def ask(monkeypatch):
    """Runs a command line against a scripted client; the result has `.client` beside click's own."""

    def run(line: str, **answers):
        client = Scripted(**answers)
        monkeypatch.setattr(commands, "Client", lambda endpoint, name, **o: client.connect(endpoint, **o))
        result = CliRunner().invoke(main, line.split(), catch_exceptions=False)
        result.client = client
        return result

    return run


def test_status_shows_everything_a_person_looks_for(ask):
    result = ask("status")
    assert result.exit_code == 0
    for word in [
        "serving", "4242", "cuda:0", "NVIDIA H200", "41.0 of 140 GiB", "54 °C", "612 of 700 W", "97 %", "power cap",
        "flux/flux1-dev.safetensors", "ulysses 2 on cuda:0, cuda:1", "24 heads divide by 2", "284 turns",
        "generation 2", "5000", "5001", "24.0 GiB", "flash", "Rank 0 ran out of memory",
        "12 of 28", "a [red] fox", "moved 1 time", "queued (1.)", "ComfyUI 0.3.64", "128 MiB of 16.0 GiB",
    ]:  # fmt: skip
        assert word in result.stdout
    assert "\x1b" not in result.stdout, "no colours in a pipe"
    assert result.client.asked[0] == ("connect", (None,), {"shared_memory": False, "timeout": 5.0})


def test_a_daemon_that_has_just_begun_says_what_there_is_not(ask):
    result = ask("status --endpoint ipc:///tmp/x.sock", status=reports.empty_report())
    assert result.stdout.count("none") == 2
    assert result.client.asked[0][1] == ("ipc:///tmp/x.sock",)


def drawn(report: StatusReport, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(status_view(report))
    return console.file.getvalue()


def test_figures_that_no_device_tells_have_no_column():
    devices = tuple(reports.report().devices[1:])
    assert "temp" not in drawn(reports.report(devices=devices), 100)


def test_status_tells_what_connects_the_gpus():
    text = drawn(reports.report(), 160)
    assert "cuda:0: NVLink 4, 17 of 18 links up, 26.6 GB/s each way on each, to switch (17)" in text
    assert "cuda:1: no NVLink" in text


def test_a_gpu_without_a_figure_has_a_dash_beside_one_that_tells_it():
    row = next(
        line for line in drawn(reports.report(), 160).splitlines() if line.strip().startswith("cuda:1")
    )
    assert row.count("–") == 4, "no temperature, power, load or reasons"


def test_old_figures_say_so():
    devices = tuple(replace(device, age=93.0) for device in reports.report().devices)
    assert "1 min 33 s old: the driver does not answer" in drawn(reports.report(devices=devices), 120)
    assert "old" not in drawn(reports.report(), 120)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_status_fits_its_terminal(width):
    text = drawn(reports.report(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "5001" in text


def test_status_as_json_is_the_report(ask):
    plain = json.loads(ask("status --json").stdout)
    assert plain["groups"][0]["ranks"][1]["pid"] == 5001
    assert plain["state"] == "serving"
    assert "re" not in plain
    assert "type" not in plain


def test_models_lists_what_loads_and_why_the_rest_does_not(ask):
    result = ask("models --kind vae")
    for word in [
        "flux/flux1-dev.safetensors",
        "flux dev",
        "bfloat16",
        "11.9 B",
        "22.2 GiB",
        "old.ckpt is a pickle",
    ]:
        assert word in result.stdout
    assert ("models", ("vae",), {}) in result.client.asked


def test_no_models_says_where_the_daemon_looks(ask):
    result = ask("models", models=ModelList(re=1, models=(), roots=("/data/vae",)))
    assert "/data/vae" in result.stdout


def test_load_asks_for_a_strategy_by_its_name_in_any_case(ask):
    result = ask("load diffusion_models/flux.safetensors --strategy cfg --devices 0,1")
    assert result.client.asked[1][1][1] == PlanRequest(strategy="CFG", devices=("0", "1"))


def test_load_asks_for_a_tensor_degree(ask):
    result = ask("load diffusion_models/flux.safetensors --strategy Hybrid --tensor 2 --devices 0,1,2,3")
    wished = PlanRequest(strategy="Hybrid", tensor=2, devices=("0", "1", "2", "3"))
    assert result.client.asked[1][1][1] == wished


def test_every_degree_can_be_asked_for(ask):
    words = "--cfg-degree 2 --ulysses 3 --ring 4 --pipefusion 5 --tensor 6 --fallback never"
    result = ask(f"load diffusion_models/flux.safetensors {words}")
    wished = PlanRequest(cfg=2, ulysses=3, ring=4, pipefusion=5, tensor=6, fallback="never")
    assert wished in result.client.asked[1][1]


def test_load_asks_for_the_plan_and_tells_the_phases(ask):
    result = ask("load diffusion_models/flux.safetensors --ulysses 2 --devices 0,1 --dtype bfloat16")
    assert result.exit_code == 0
    name, arguments, _ = result.client.asked[1]
    assert name == "load"
    assert arguments == (
        ModelRef(kind="diffusion_models", name="flux.safetensors", dtype="bfloat16"),
        PlanRequest(ulysses=2, devices=("0", "1")),
    )
    assert result.stderr.count("import torch") == 1, "each phase is told once"
    assert "ranks load the model" in result.stderr
    assert "is ready after 4.2 s: group g3, ulysses 2 on cuda:0, cuda:1" in result.stdout


def test_load_says_which_replicas_are_there_and_which_are_not(ask):
    loaded = Loaded(
        re=1,
        group="g1",
        plan=reports.PLAN,
        model=reports.models().models[0],
        dtype="bfloat16",
        seconds=1.0,
        warm=False,
        groups=("g1", "g2", "g4"),
        warnings=("No replica on cuda:4, cuda:5: the file is gone.",),
    )
    result = ask("load diffusion_models/flux.safetensors --devices 0-7 --replicas 4", load=loaded)
    assert result.client.asked[1][1][1] == PlanRequest(devices=("0-7",), replicas=4)
    assert "3 replicas: groups g1, g2 and g4" in result.stdout
    assert "No replica on cuda:4" in result.stdout


def test_free_tells_what_came_back_and_what_is_in_use(ask):
    result = ask("free --gib 10 --devices 0,1")
    assert ("free_memory", (10 << 30, ("0", "1")), {}) in result.client.asked
    assert "Ended g4." in result.stdout
    assert "cuda:0: 60.0 GiB in use before, 35.0 GiB after" in result.stdout
    assert "Runs use g3." in result.stdout


def test_sleep_wants_one_thing_named(ask):
    assert ask("sleep").exit_code == 2
    assert ask("sleep vae/x --group g3").exit_code == 2
    result = ask("sleep --group g3")
    assert result.client.asked[1] == ("sleep", (None,), {"group": "g3"})
    assert "g3 sleeps" in result.stdout


def test_unload_wants_one_thing_named(ask):
    assert ask("unload").exit_code == 2
    assert ask("unload vae/x --group g3").exit_code == 2
    result = ask("unload --group g3 --force")
    assert result.client.asked[1] == ("unload", (None,), {"group": "g3", "force": True})
    assert "Ended g3 and g4." in result.stdout


def test_runs_cancel_and_drain(ask):
    assert "12 of 28" in ask("runs").stdout
    assert [run["run"] for run in json.loads(ask("runs --json").stdout)] == [17, 18]
    assert ("cancel", (17,), {}) in ask("cancel 17").client.asked
    result = ask("drain --stop --timeout 9")
    assert ("drain", (), {"stop": True, "timeout": 9.0}) in result.client.asked
    assert "Waiting for 2 runs" in result.stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [(Code.DAEMON_NOT_FOUND, 3), (Code.BAD_PLAN, 4), (Code.RANK_LOST, 1), (Code.TIMEOUT, 5)],
)
def test_an_error_is_one_line_and_a_status(ask, code, status):
    result = ask(
        "load vae/x.safetensors", load=XditError(code, "It is [bold]so\nand so[/bold]. " + "Long. " * 60)
    )
    assert result.exit_code == status
    last = result.stderr.splitlines()[-1]
    assert last.startswith("❌ It is [bold]so and so[/bold]. Long.")
    assert last.endswith(f"[{code.value}]")
    assert result.stdout == ""


def test_ctrl_c_is_130(ask):
    def interrupt():
        raise KeyboardInterrupt

    assert ask("status", status=interrupt).exit_code == 130


def test_wait_ready_waits_for_the_daemon_and_then_for_the_model(ask):
    tries = []
    reports_in_turn = [reports.empty_report(state="starting"), reports.empty_report(), reports.report()]

    def connect():
        tries.append(1)
        if len(tries) < 3:
            raise XditError(Code.DAEMON_NOT_FOUND, "No xditd answers.")

    result = ask(
        "wait-ready --model diffusion_models/flux/flux1-dev.safetensors",
        connect=connect,
        status=lambda: reports_in_turn.pop(0),
    )
    assert result.exit_code == 0
    assert not reports_in_turn
    assert "0.1.0 is ready" in result.stdout


def test_wait_ready_gives_up_with_the_reason(ask):
    lost = XditError(Code.DAEMON_NOT_FOUND, "No xditd answers. Tried here.")
    result = ask("wait-ready --timeout 0", connect=lost)
    assert result.exit_code == 5
    assert "Tried here" in result.stderr
    result = ask("wait-ready --timeout 0 --model vae/ae.safetensors")
    assert "vae/ae.safetensors is failed" in result.stderr


def test_wait_ready_says_at_once_that_a_model_to_preload_will_not_come(ask):
    refused = PreloadStatus(
        model=reports.VAE, state="refused", code="file_invalid", message="It is truncated."
    )
    result = ask("wait-ready", status=reports.report(preloads=(refused,)))
    assert result.exit_code == 1
    assert "vae/ae.safetensors is not there: It is truncated." in result.stderr


def test_wait_ready_is_content_when_somebody_loaded_it_later(ask):
    refused = PreloadStatus(model=reports.FLUX, state="refused", code="out_of_memory", message="Full.")
    assert ask("wait-ready", status=reports.report(preloads=(refused,))).exit_code == 0


def test_wait_ready_is_content_with_a_model_that_sleeps(ask):
    awake = reports.report()
    asleep = tuple(replace(group, state="asleep") for group in awake.groups)
    status = replace(awake, groups=asleep)
    command = "wait-ready --timeout 0 --model diffusion_models/flux/flux1-dev.safetensors"
    assert ask(command, status=status).exit_code == 0
    assert "asleep" in ask("status", status=status).stdout


def test_wait_ready_names_the_models_that_still_load(ask):
    waiting = PreloadStatus(model=reports.FLUX, state="waiting")
    result = ask("wait-ready --timeout 0", status=reports.report(state="starting", preloads=(waiting,)))
    assert result.exit_code == 5
    assert "is starting, diffusion_models/flux/flux1-dev.safetensors not ready" in result.stderr


# ------------------------------------------------------------------------------------------------------ sample


def test_sample_goes_from_a_file_to_a_picture(ask, tmp_path):
    save_file({"context": torch.ones(1, 5, 64), "pooled": torch.ones(1, 32)}, tmp_path / "prompt.safetensors")
    run = ScriptedRun()
    result = ask(
        f"sample diffusion_models/small.safetensors --conditioning {tmp_path}/prompt.safetensors --vae vae/ae.safetensors "
        f"--size 64x32 --steps 4 --seed 7 --sampler heun -o {tmp_path}/x.png --save-latent {tmp_path}/x.latent --tile 512",
        open_run=run,
        decode=torch.rand(1, 32, 64, 3),
        events={"decode": [Degraded("ae.safetensors", "it was computed in tiles")]},
    )
    assert result.exit_code == 0, result.output
    tensors, values = run.conditioning["positive"]
    assert tensors["context"].shape == (1, 5, 64)
    assert values == {"guidance": 3.5}
    torch.manual_seed(7)
    assert torch.equal(run.sampled["noise"], torch.randn(1, 16, 4, 8))
    assert (len(run.sampled["sigmas"]), run.sampled["sampler"], run.sampled["negative"]) == (5, "heun", None)
    assert run.ended == ["close"]
    (tile,) = (named["tile"] for name, _, named in result.client.asked if name == "decode")
    assert tile == 512
    assert "degraded: it was computed in tiles" in result.stderr
    latent = load_file(tmp_path / "x.latent")["latent_tensor"]
    assert torch.allclose(latent, run.sampled["noise"] * 0.5 / 0.3611 + 0.1159), (
        "unscaled, as ComfyUI's LATENT"
    )
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (64, 32)
        assert picture.text["seed"] == "7"
    assert "4/4" in result.stderr, "each step is told, in a pipe too"
    assert "4 steps in" in result.stdout
    assert str(tmp_path / "x.png") in result.stdout


def test_a_latent_begins_the_loop_in_the_models_own_scale(ask, tmp_path):
    save_file({"latent_tensor": torch.full((1, 16, 4, 4), 0.1159)}, tmp_path / "in.latent")
    run = ScriptedRun("schnell")
    result = ask(
        f"sample diffusion_models/small.safetensors --random-conditioning --latent {tmp_path}/in.latent --denoise 0.5 "
        f"--sigmas 0.5,0.25,0 --save-latent {tmp_path}/out.latent",
        open_run=run,
    )
    assert result.exit_code == 0, result.output
    assert run.sampled["latent"].abs().max() < 1e-6
    assert run.sampled["noise"].shape == (1, 16, 4, 4)
    assert run.sampled["sigmas"] == (0.5, 0.25, 0.0)
    assert run.conditioning["positive"][1] == {}, "schnell takes no guidance"


def test_ctrl_c_cancels_the_run(ask, tmp_path):
    run = ScriptedRun(fails=KeyboardInterrupt())
    result = ask(
        f"sample diffusion_models/x.sft --random-conditioning --save-latent {tmp_path}/x", open_run=run
    )
    assert result.exit_code == 130
    assert run.ended == ["cancel", "close"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--save-latent x", "one of --conditioning"),
        ("--random-conditioning", "--vae for a picture"),
        ("--random-conditioning --save-latent x --tile 512", "give both"),
        ("--random-conditioning --save-latent x --size 100x100", "multiples of 8"),
        ("--random-conditioning --save-latent x --size big", "is not a size"),
        ("--random-conditioning --save-latent x --sigmas 1,a", "not a list of numbers"),
        ("--conditioning no-such-file --save-latent x", "does not exist"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_is_asked(ask, options, words):
    result = ask(f"sample diffusion_models/x.safetensors {options}")
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.client.asked == []


def test_every_command_has_help_with_an_example():
    for name, command in main.commands.items():
        text = CliRunner().invoke(main, [name, "--help"]).output
        assert f"xditctl {name}" in text.split("Options:")[0].split("Usage:")[1].split("\n", 1)[1], name
        assert isinstance(command, click.Command)
        assert "--endpoint" in text
