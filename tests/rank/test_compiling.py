"""Compiling layers of every family, without a GPU: what torch traces is run as it is, so that no compiler is needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.rank.families import CASES, Case, Tensors, normal
from tests.rank.ranks import running
from tests.rank.reference import error
from xditd.catalog.detection import recognise
from xditd.models.families import FAMILIES, load
from xditd.models.making import flux_facts, make_flux
from xditd.models.making_loras import make_lora
from xditd.models.reading import WeightFile
from xditd.models.splits import in_layers
from xditd.protocol import orders
from xditd.protocol.orders import Merge
from xditd.rank import compiling, xfuser_seam
from xditd.rank.compiling import ATTEMPTS, Settled, compile_layers
from xditd.rank.failures import explain

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flux() -> Case:
    facts = flux_facts(context_width=64, pooled_width=32)

    def conditioning(text: int, batch: int = 1) -> Tensors:
        return {"context": normal(batch, text, 64), "pooled": normal(batch, 32)}

    def make(path: Path) -> Path:
        return make_flux(path, **{name: facts[name] for name in ("context_width", "pooled_width")})

    return Case("flux", make, conditioning, lambda path: None, t=0.7, sizes=((16, 16), (10, 18)))  # type: ignore[arg-type,return-value]


SLOW = ("flux", "hunyuandit_1.1")
"""Torch takes a quarter of a minute to trace them."""


@pytest.mark.parametrize(
    "name",
    ["sd3.5_medium", "pixart_alpha", "sdxl", *(pytest.param(name, marks=pytest.mark.soak) for name in SLOW)],
)
def test_the_layers_of_every_family_compile_whole_and_compute_the_same(tmp_path: Path, name: str) -> None:
    """Pictures of two sizes with texts of two lengths, and two pictures at once: more variants of SD3.5 medium than torch allows."""
    case = flux() if name == "flux" else CASES[name]
    path = case.make(tmp_path / "model.safetensors")
    plain, compiled = (load(case.family, path, "transformer", CPU, torch.float32) for _ in range(2))
    layers = list(in_layers(compiled.backbone, FAMILIES[case.family].layers))
    before = compiling.compiled()
    compile_layers(compiled, layers, alone=True, backend="eager")
    for text, size, batch in ((20, case.sizes[0], 1), (12, case.sizes[1], 1), (12, case.sizes[1], 2)):
        x, tensors = normal(batch, case.channels, *size), case.conditioning(text, batch)
        with torch.no_grad():
            expected, out = (
                network.predict(x, torch.tensor([case.t] * batch), network.condition(tensors, {}))
                for network in (plain, compiled)
            )
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert compiling.compiled() > before


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class Layers(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_call_that_compiled_is_made_again_and_later_ones_are_not() -> None:
    module = Layers()
    for layer in module.layers:
        layer.compile(fullgraph=True, backend="eager")
    call = Settled(module, alone=True)
    with torch.no_grad():
        call(torch.zeros(3, 4))
        assert module.calls == 2
        call(torch.zeros(3, 4))
        assert module.calls == 3


def test_what_compiles_at_every_call_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(100))
    monkeypatch.setattr(compiling, "compiled", lambda: next(counts))
    calls: list[int] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x

    assert Settled(call, alone=True)(torch.ones(1)) == 1
    assert len(calls) == ATTEMPTS


def test_what_cannot_be_compiled_says_why_and_what_would_do() -> None:
    def backend(graph: object, inputs: object) -> Any:
        raise OSError("No working C++ compiler found in /usr/bin.")

    layer = Layer()
    layer.compile(fullgraph=True, backend=backend)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        layer(torch.zeros(3, 4))
    code, message = explain(caught.value)
    assert code == "rank_failed"
    assert message.startswith("The model's layers could not be compiled: OSError: No working C++ compiler")
    assert "compute.compile = false" in message


def test_memory_that_lacks_while_layers_are_compiled_is_told_as_that() -> None:
    """So that a plan that takes less is tried (`fallback`)."""

    def backend(graph: object, inputs: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    layer = Layer()
    layer.compile(fullgraph=True, backend=backend)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        layer(torch.zeros(3, 4))
    code, message = explain(caught.value)
    assert code == "out_of_memory"
    assert "Tried to allocate 2.00 GiB." in message


def test_layers_that_are_compiled_too_often_say_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    layer = Layer()
    layer.compile(fullgraph=True, dynamic=False, backend="eager")
    layer(torch.zeros(3, 4))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit) as caught:
        layer(torch.zeros(5, 4))
    code, message = explain(caught.value)
    assert code == "rank_failed"
    assert message.startswith("The model's layers could not be compiled")


def test_ranks_that_meet_in_a_call_make_the_first_one_twice_whoever_of_them_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that called again by itself would wait for the others for ever."""
    made: list[int] = []
    for counts in (iter(range(100)), iter([7] * 100)):  # one compiles at every call, the other never
        monkeypatch.setattr(compiling, "compiled", lambda counts=counts: next(counts))
        calls: list[int] = []
        call = Settled(lambda calls=calls: calls.append(1) or torch.ones(1), alone=False)
        for _ in range(3):
            call()
        made.append(len(calls))
    assert made == [4, 4]


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("pixart_alpha", {"ulysses": 2}),
        ("pixart_alpha", {"tensor": 2}),
        *(
            pytest.param(name, degrees, marks=pytest.mark.soak)
            for name in ("flux", "sd3.5_medium", "hunyuandit_1.1")
            for degrees in ({"ulysses": 2}, {"ring": 2}, {"tensor": 2})
        ),
    ],
    ids=str,
)
def test_a_world_with_compiled_layers_computes_what_one_process_does(
    tmp_path: Path, name: str, degrees: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks meet in attention and in layers that they share: code is compiled up to there, and goes on behind it."""
    case = flux() if name == "flux" else CASES[name]
    path = case.make(tmp_path / "model.safetensors")
    plain = load(case.family, path, "transformer", CPU, torch.float32)
    figures = []
    with running(
        tmp_path / "r",
        path=path,
        family=case.family,
        **degrees,
        compiled=True,
        options={"compiler": "eager"},
    ) as ranks:
        for text, size in ((15, case.sizes[0]), (31, case.sizes[1])):
            given, x = case.conditioning(text), normal(1, case.channels, *size)
            ranks.condition(1, "c", given)
            (out,) = ranks.denoise([x], (case.t,), timeout=300)
            with torch.no_grad():
                expected = plain.predict(x, torch.tensor([case.t]), plain.condition(given, {}))
            figures.append(error(out, expected))
        assert "Layers are compiled" in ranks.words()
    with capsys.disabled():
        print(f"\n  {name}, {degrees}, compiled: {', '.join(f'{figure:.1e}' for figure in figures)}", end="")
    assert max(figures) < 1e-5


@pytest.mark.parametrize(
    "degrees",
    [
        {"ulysses": 2},
        *(
            pytest.param(degrees, marks=pytest.mark.soak)
            for degrees in ({"tensor": 2}, {"tensor": 2, "ulysses": 2}, {"cfg": 2, "ulysses": 2})
        ),
    ],
    ids=str,
)
def test_a_world_with_compiled_layers_takes_whatever_comes(tmp_path: Path, degrees: dict[str, Any]) -> None:
    """One call and two, which groups of cfg share, LoRAs, a batch, and a sleep in between: nobody waits for a call that another
    does not make."""
    case = CASES["pixart_alpha"]
    path = case.make(tmp_path / "model.safetensors")
    plain = load(case.family, path, "transformer", CPU, torch.float32)
    lora = make_lora(
        tmp_path / "lora.safetensors", case.family, recognise(WeightFile(path).header, "transformer").facts
    )
    given = case.conditioning(15)
    with running(
        tmp_path / "r",
        path=path,
        family=case.family,
        **degrees,
        compiled=True,
        options={"compiler": "eager"},
    ) as ranks:
        for number, (calls, batch, strength) in enumerate(
            ((1, 1, 0.0), (2, 1, 0.8), (2, 2, 0.8), (1, 1, 0.0)), 1
        ):
            merges = (Merge(path=str(lora), strength=strength),)
            ranks.condition(number, "c", given)
            ranks.send(orders.SetLoras(run=number, loras=merges))
            plain.loras.hold(merges)
            xs = [normal(batch, case.channels, *case.sizes[0]) for _ in range(calls)]
            outs = ranks.denoise(xs, (case.t,), run=number, timeout=300)
            for x, out in zip(xs, outs, strict=True):
                with torch.no_grad():
                    expected = plain.predict(x, torch.tensor([case.t] * batch), plain.condition(given, {}))
                assert error(out, expected) < 1e-5
            for rest in (orders.Sleep(), orders.Wake()):
                ranks.send(rest)
                for _ in ranks.processes:
                    ranks.wait(orders.RankRested, 60)


def test_all_of_xfusers_attention_is_kept_out_of_compiling() -> None:
    """A module that has it under a name of its own would have torch look into it, sizes and all."""
    names = [f"{xfuser_seam.BARE[2]}.{module}" for module in xfuser_seam.WRAPPERS.values()]
    root = Path(importlib.util.find_spec("xfuser").origin).parents[1]  # type: ignore[union-attr,arg-type]
    for name in (*names, "xfuser.model_executor.layers.attention_processor"):
        text = (root / (name.replace(".", "/") + ".py")).read_text()
        has = "import USP" in text
        assert has == ("USP" in xfuser_seam.PATCHED.get(name, ())), name
