"""The pack's texts, pages and examples, held to its nodes. Needs no ComfyUI: what the nodes are is read off their source."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec.toml
import pytest

ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfy_nodes"

PLAN = ("gpu_devices", "replicas", "strategy", "allow_approximate", "scheduling", "fallback", "endpoint")
ONE = ("gpu_devices", "endpoint")
SAMPLING = ("steps", "cfg", "sampler_name", "scheduler")
CONTROL = ""
"""The value of a control_after_generate, which belongs to no input."""

WIDGETS: dict[str, tuple[str, ...]] = {
    "XDiTCheckpointLoader": ("ckpt_name", *PLAN),
    "XDiTUNETLoader": ("unet_name", "weight_dtype", *PLAN),
    "XDiTLoraLoader": ("lora_name", "strength_model"),
    "XDiTKSampler": ("seed", CONTROL, *SAMPLING, "denoise", "loop"),
    "XDiTKSamplerAdvanced": (
        "add_noise", "noise_seed", CONTROL, *SAMPLING, "start_at_step", "end_at_step", "return_with_leftover_noise", "loop"
    ),
    "XDiTVAELoader": ("vae_name", *ONE),
    "XDiTCLIPLoader": ("clip_name", "type", "device", *ONE),
    "XDiTDualCLIPLoader": ("clip_name1", "clip_name2", "type", "device", *ONE),
    "XDiTTripleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3", *ONE),
    "XDiTDaemonStatus": ("endpoint",),
}  # fmt: skip
"""By node: its widgets, in order. tests/comfy holds it to /object_info where there is a ComfyUI."""

LINKED = ("model", "positive", "negative", "latent_image", "dispatcher")
SOCKETS = {"XDiTLoraLoader": ("model", "dispatcher"), "XDiTKSampler": LINKED, "XDiTKSamplerAdvanced": LINKED}
"""By node: its inputs that are links."""

VALUES: dict[str, type | tuple[type, ...]] = {
    "replicas": int,
    "strength_model": (int, float),
    "seed": int,
    "steps": int,
    "cfg": (int, float),
    "denoise": (int, float),
    "allow_approximate": bool,
    "fallback": bool,
}
"""Types of widget values that are no text."""

STOCK = {
    "CLIPTextEncode": 1, "FluxGuidance": 1, "EmptySD3LatentImage": 3, "VAEDecode": 0, "SaveImage": 1, "MarkdownNote": 1
}  # fmt: skip
"""Stock nodes of the examples: how many widget values each has."""

LANGUAGES = ("en", "zh")
EXAMPLES = sorted((PACK / "example_workflows").glob("*.json"))


def sources() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACK.glob("*.py")))


def node_ids() -> set[str]:
    return set(re.findall(r"\"(XDiT[A-Za-z]+)\"", sources()))


def input_ids() -> set[str]:
    """Names of inputs that are written out; those of files of text encoders come from a loop."""
    found = set(re.findall(r"(?:(?:io\.\w+|DispatcherType)\.Input|_seed)\(\s*\"(\w+)\"", sources()))
    return found | set(re.findall(r"\"(clip_name\d?)\"", sources()))


def texts(language: str) -> dict[str, Any]:
    return json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_the_tables_here_name_every_node_and_every_input() -> None:
    assert node_ids() == set(WIDGETS)
    inputs = {name for names in (*WIDGETS.values(), *SOCKETS.values()) for name in names} - {CONTROL}
    assert inputs == input_ids()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_and_input_is_named_and_explained(language: str) -> None:
    found = texts(language)
    assert set(found) == set(WIDGETS)
    for node, text in found.items():
        assert set(text["inputs"]) == {*WIDGETS[node], *SOCKETS.get(node, ())} - {CONTROL}, node
        assert [*text["outputs"]] == [str(i) for i in range(len(text["outputs"]))], node
        for named in (*text["inputs"].values(), *text["outputs"].values()):
            assert named["name"]
            assert named["tooltip"].endswith((".", "。")), named
        assert text["display_name"]
        assert text["description"].endswith((".", "。"))


def test_the_languages_have_the_same_outputs() -> None:
    en, zh = (texts(language) for language in LANGUAGES)
    assert {node: [*text["outputs"]] for node, text in en.items()} == {
        node: [*text["outputs"]] for node, text in zh.items()
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_has_what_the_frontend_takes_for_syntax(language: str) -> None:
    """vue-i18n reads braces as a placeholder, | as a plural and @ as a link to another text."""

    def strings(value: Any) -> list[str]:
        return (
            [value] if isinstance(value, str) else [text for part in value.values() for text in strings(part)]
        )

    assert [text for text in strings(texts(language)) if set("{}|@") & set(text)] == []


def test_the_english_names_are_those_of_the_nodes() -> None:
    for node, text in texts("en").items():
        assert f'"{text["display_name"]}"' in sources(), node


@pytest.mark.parametrize("node", sorted(WIDGETS))
def test_every_node_has_its_help_pages(node: str) -> None:
    """ComfyUI asks for docs/NODE/LANGUAGE.md, then for docs/NODE.md."""
    docs = PACK / "web" / "docs"
    assert (docs / f"{node}.md").read_text(encoding="utf-8") == (docs / node / "en.md").read_text(
        encoding="utf-8"
    )
    for language in LANGUAGES:
        page = (docs / node / f"{language}.md").read_text(encoding="utf-8")
        text = texts(language)[node]
        assert page.startswith(f"# {text['display_name']}\n")
        rows = re.findall(r"^\| (?:[^`|]+ )?`(\w+)` \| [A-Z_]+ \|", page, re.MULTILINE)
        assert rows == [*text["inputs"]]
        for named in text["inputs"].values():
            assert named["tooltip"] in page


FAMILIES = {"flux": "FLUX.1", "sd3": "SD3", "pixart": "PixArt", "hunyuandit": "HunyuanDiT", "sdxl": "SDXL"}


@pytest.mark.parametrize("node", ["XDiTCheckpointLoader", "XDiTUNETLoader", "XDiTVAELoader"])
def test_a_loaders_pages_name_every_family(node: str) -> None:
    assert {path.stem for path in (PACK / "families").glob("*.py")} - {"__init__", "conditioning"} == {
        *FAMILIES
    }
    for language in LANGUAGES:
        page = (PACK / "web" / "docs" / node / f"{language}.md").read_text(encoding="utf-8")
        (known,) = re.findall(r"^(?:This version knows|当前版本支持) .*$", page, re.MULTILINE)
        assert [name for name in FAMILIES.values() if name not in known] == []


def test_no_page_is_of_a_node_that_is_not_there() -> None:
    docs = PACK / "web" / "docs"
    assert {path.stem for path in docs.iterdir()} == set(WIDGETS)


# ---------------------------------------------------------------------------------------------- examples


def test_there_are_examples() -> None:
    assert [path.name for path in EXAMPLES] == ["flux_checkpoint_xdit.json", "flux_dev_xdit.json"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_link_of_an_example_joins_what_fits(path: Path) -> None:
    flow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert len(nodes) == len(flow["nodes"])
    assert flow["last_node_id"] == max(nodes)
    assert flow["version"] == 0.4
    links = {link[0]: link for link in flow["links"]}
    assert flow["last_link_id"] == max(links)
    for number, source, output, target, slot, kind in flow["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert out["type"] == into["type"] == kind
        assert into["link"] == number
        assert number in out["links"]
    linked = [socket["link"] for node in nodes.values() for socket in node["inputs"]]
    assert sorted(linked) == sorted(links), "a socket without a link, or a link without a socket"
    given = [number for node in nodes.values() for out in node["outputs"] for number in out["links"]]
    assert sorted(given) == sorted(links)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_widget_values_of_an_example_are_those_of_the_schema(path: Path) -> None:
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        values = node["widgets_values"]
        if node["type"] in STOCK:
            assert len(values) == STOCK[node["type"]], node["type"]
            continue
        names = WIDGETS[node["type"]]
        assert [socket["name"] for socket in node["inputs"]] == [*SOCKETS.get(node["type"], ())]
        for name, value in zip(names, values, strict=True):
            expected = VALUES.get(name, str)
            assert isinstance(value, expected), (node["type"], name, value)
            assert isinstance(value, bool) == (expected is bool), (node["type"], name, value)
            if name.endswith("_name") or name.startswith("clip_name"):
                assert value.endswith(".safetensors") or name == "sampler_name"


# ------------------------------------------------------------------------------------------ installation


def test_the_requirements_are_the_light_clients() -> None:
    """Never torch: ComfyUI's own stays as it is. click, rich and psutil are for the command line and the daemon."""
    texts = [(folder / "requirements.txt").read_text(encoding="utf-8") for folder in (ROOT, PACK)]
    assert texts[0] == texts[1]
    wanted = [line for line in texts[0].splitlines() if line and not line.startswith("#")]
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    assert wanted == [
        line
        for line in project["dependencies"]
        if re.match(r"[\w-]+", line)[0] in ("pyzmq", "msgpack", "msgspec")
    ]


def test_comfyui_finds_the_pack_in_a_clone() -> None:
    """It looks for these at the top of what was cloned."""
    for name in ("locales", "example_workflows"):
        assert (ROOT / name).resolve() == PACK / name
        assert not (ROOT / name).readlink().is_absolute()
    top, inner = (ast.parse((folder / "__init__.py").read_text(encoding="utf-8")) for folder in (ROOT, PACK))
    assert _constant(top, "WEB_DIRECTORY") == "./comfy_nodes/web"
    assert _constant(inner, "WEB_DIRECTORY") == "./web"
    comfy = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["tool"]["comfy"]
    assert "web" not in comfy, "with WEB_DIRECTORY the scripts would be registered twice"
    assert (PACK / "web" / "icon.svg").is_file()
    assert comfy["Icon"].endswith("/comfy_nodes/web/icon.svg")


def test_the_top_can_be_imported_without_comfyui() -> None:
    script = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('a_clone', {str(ROOT / '__init__.py')!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "print(module.WEB_DIRECTORY, 'comfy' in sys.modules, 'xditd' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == ["./comfy_nodes/web", "False", "False"]


def _constant(tree: ast.Module, name: str) -> Any:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    return None
