"""Compiling layers of every family, without a GPU: what torch traces is run as it is, so that no compiler is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.rank.families import CASES, Case, Tensors, normal
from xditd.models.families import FAMILIES, load
from xditd.models.making import flux_facts, make_flux
from xditd.models.splits import in_layers
from xditd.rank import compiling
from xditd.rank.compiling import ATTEMPTS, Settled, compile_layers

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
    compile_layers(compiled, layers, backend="eager")
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
    call = Settled(module)
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

    assert Settled(call)(torch.ones(1)) == 1
    assert len(calls) == ATTEMPTS
