"""The daemon's configuration: what a file may say, and what it is told when it says something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from xditd.daemon.config import Compute, Config, Preload, load_config
from xditd.daemon.config_file import known_keys, parse_seconds, parse_size, resolve
from xditd.protocol.errors import Code, XditError
from xditd.protocol.kernels import KERNELS
from xditd.protocol.messages import ModelRef, PlanRequest
from xditd.protocol.plans import OFFLOADS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "systemd" / "xditd.toml.example"


def write(folder: Path, text: str) -> Path:
    path = folder / "xditd.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(XditError) as caught:
        load_config(write(folder, text))
    assert caught.value.code is Code.BAD_CONFIG
    return caught.value.message


def test_no_file_is_the_defaults():
    assert load_config(None) == Config()


def test_the_example_without_its_comment_signs_is_every_key_with_its_default(tmp_path):
    text = re.sub(r"^#(?=\w+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    plain = msgspec.toml.decode(text)
    tables = {k: v for k, v in plain.items() if isinstance(v, dict)}
    said = {k for k in plain if k not in tables} | {f"{t}.{k}" for t, keys in tables.items() for k in keys}
    assert said == set(known_keys(Config))
    assert load_config(write(tmp_path, text)) == Config()


def test_the_example_as_it_lies_there_changes_nothing():
    assert load_config(EXAMPLE) == Config()


def test_the_examples_preload_block_names_every_key_of_a_preload():
    block = EXAMPLE.read_text().split("#     [[models.preload]]\n")[1].split("#preload")[0]
    said = re.findall(r"^#     (\w+) = ", block, flags=re.MULTILINE)
    assert said == [entry.name for entry in msgspec.structs.fields(Preload)]


def test_a_preload_has_every_key_of_a_plan_and_asks_for_it():
    left_to_others = {"scheduling", "fallback"}  # of a run, and the daemon's own (`compute.fallback`)
    names = [name for name in PlanRequest.__struct_fields__ if name not in left_to_others]
    odd = {"strategy": "USP", "devices": ("0", "1"), "offload": "model", "shard": True}
    said = {name: odd.get(name, number) for number, name in enumerate(names, start=2)}
    assert Preload(model="vae/a", **said).plan == PlanRequest(**said)
    assert Preload(model="vae/a").plan == PlanRequest()


@pytest.mark.parametrize(
    ("table", "key", "words"), [(Preload, "offload", OFFLOADS), (Compute, "attention", ("", *KERNELS))]
)
def test_a_key_takes_the_words_that_there_are(table, key, words):
    assert get_args(get_type_hints(table)[key]) == words


def test_the_documentation_lists_every_key_with_its_default():
    rows = re.findall(
        r"^\| `([\w.]+)` \| `(.*?)` \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE
    )
    plain: dict = {}
    for dotted, default in rows:
        table, _, key = dotted.rpartition(".")
        plain.setdefault(table, {})[key] = msgspec.toml.decode(f"x = {default}")["x"]
    top = plain.pop("")
    assert {dotted for dotted, _ in rows} == set(known_keys(Config))
    assert msgspec.convert(resolve(top | plain, Config, "the documentation", ROOT), Config) == Config()


def test_the_units_stop_time_leaves_room_for_the_deadlines():
    for unit in ("systemd/xditd.service", "systemd/user/xditd.service"):
        seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", (ROOT / unit).read_text(), re.MULTILINE)[1])
        assert seconds >= Config().deadlines.drain + Config().deadlines.stop + 10


def test_sizes_durations_and_paths_are_resolved(tmp_path):
    config = load_config(
        write(
            tmp_path,
            """
            runtime_dir = "run"
            [devices]
            reserve_memory = "1.5GiB"
            [deadlines]
            turn = "2min"
            stop = 3
            [models]
            comfyui = "~/ComfyUI"
            [models.folders]
            vae = ["vae", "/data/vae"]
            """,
        )
    )
    assert config.runtime_dir == str(tmp_path / "run")
    assert config.devices.reserve_memory == 3 << 29
    assert (config.deadlines.turn, config.deadlines.stop) == (120.0, 3.0)
    assert config.models.comfyui == str(Path("~/ComfyUI").expanduser())
    assert config.models.folders == {"vae": (str(tmp_path / "vae"), "/data/vae")}


def test_a_preload_is_a_model_and_a_plan(tmp_path):
    text = '[[models.preload]]\nmodel = "diffusion_models/flux/dev.safetensors"\nulysses = 2\ndevices = ["0", "1"]'
    (preload,) = load_config(write(tmp_path, text)).models.preload
    assert preload.ref == ModelRef(kind="diffusion_models", name="flux/dev.safetensors")
    assert preload.plan == PlanRequest(ulysses=2, devices=("0", "1"))


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, '[devices]\nkind = "cpu"\ncpu_ranks = 4\n[log]\nlevel = "debug"')
    config = load_config(path, {"devices.cpu_ranks": 3, "log.format": "json", "models.folders.vae": ["/v"]})
    assert (config.devices.kind, config.devices.cpu_ranks) == ("cpu", 3)
    assert (config.log.level, config.log.format) == ("debug", "json")
    assert config.models.folders == {"vae": ("/v",)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[devices]\ncpu_rnks = 2", ["devices.cpu_rnks", "did you mean devices.cpu_ranks?"]),
        ("[devicse]\n", ["devicse", "did you mean devices?"]),
        ("[arena]\nturn = 3", ["arena.turn", "did you mean deadlines.turn?"]),
        ("[log]\nxyzzy = 3", ["log.xyzzy", "here may stand level, format"]),
        (
            '[[models.preload]]\nmodel = "vae/x"\nulyses = 2',
            ["models.preload[0].ulyses", "preload[0].ulysses?"],
        ),
        ('[[models.preload]]\nmodel = "vae"', ["models.preload[0].model"]),
        ("[devices]\ncpu_ranks = 0", ["devices.cpu_ranks", ">= 1"]),
        ('[devices]\nkind = "tpu"', ["devices.kind", "'tpu'", "'auto', 'cuda', 'cpu'"]),
        ("[devices]\nuse = [0]", ["devices.use[0]", "`str`"]),
        ("devices = 2", ["devices", "a table"]),
        ('[arena]\nfirst_bytes = "2 apples"', ["arena.first_bytes", "2 apples", "256MiB"]),
        ('[arena]\nfirst_bytes = "1TiB"', ["arena", "first_bytes <= per_client_bytes"]),
        ("[deadlines]\nturn = 0", ["deadlines.turn", "> 0"]),
        ('[deadlines]\nturn = "soon"', ["deadlines.turn", "soon", "5min"]),
        ("[deadlines]\nturn = nan", ["deadlines.turn"]),
        ("[deadlines]\nturn = inf", ["deadlines.turn"]),
        ('endpoint = "tcp://0.0.0.0:5555"', ["tcp", "allow_insecure_tcp"]),
        ('endpoint = "tcp://nonsense"\nallow_insecure_tcp = true', ["tcp://host:port"]),
        ('endpoint = "/run/x"', ["ipc:///"]),
        ("[metrics]\nport = 70000", ["metrics.port", "<= 65535"]),
        ('[metrics]\naddress = "localhost"', ["metrics", "'localhost' is no IP address", "127.0.0.1"]),
        (f'endpoint = "ipc:///{"x" * 120}"', ["shorter"]),
        ("endpoint = ", ["not TOML"]),
        ('endpoint = "\udcff"', ["not TOML"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence_that_names_it(tmp_path, text, words):
    (tmp_path / "xditd.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(XditError) as caught:
        load_config(tmp_path / "xditd.toml")
    said = caught.value.message
    assert caught.value.code is Code.BAD_CONFIG
    assert "\n" not in said
    for word in [str(tmp_path / "xditd.toml"), *words]:
        assert word in said


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(XditError, match=r"no configuration file .*xditd\.toml") as caught:
        load_config(tmp_path / "xditd.toml")
    assert caught.value.code is Code.BAD_CONFIG


def test_tcp_is_accepted_where_its_risk_is_accepted(tmp_path):
    text = 'endpoint = "tcp://10.0.0.1:5555"\nallow_insecure_tcp = true'
    assert load_config(write(tmp_path, text)).endpoint == "tcp://10.0.0.1:5555"


def test_the_configuration_cannot_be_changed_after_it_was_validated():
    with pytest.raises(AttributeError):
        Config().devices.cpu_ranks = 5


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("256MiB", 256 << 20),
        ("1.5 GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("7B", 7),
        ("1tib", 1 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1e9", "5 min", "1PiB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("250ms", 0.25), ("5min", 300), ("2 h", 7200)]
)
def test_durations(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 2, 4), (2, 4, 1), (1, 2, 1)])
def test_cpu_ranks_share_the_cores(cores, ranks, threads):
    assert load_config(None, {"devices.cpu_ranks": ranks}).devices.threads_per_rank(cores) == threads
