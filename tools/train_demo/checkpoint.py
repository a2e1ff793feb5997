"""All that is trained, in a file, so that the next piece goes on just so: weights, averages, what optimisers remember."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tools.train_demo.pace import Average

Optimisers = Sequence[torch.optim.Optimizer]


def keep(path: Path, trained: nn.Module, optimisers: Optimisers, average: Average) -> None:
    """Writes it."""
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in trained.named_parameters()}
    tensors["average/steps"] = torch.tensor(average.steps)
    tensors |= {f"average/{i}": kept for i, kept in enumerate(average.kept)}
    for number, optimiser in enumerate(optimisers):
        for i, remembered in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{number}/{i}/{name}": value for name, value in remembered.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


@torch.no_grad()
def resume(path: Path, trained: nn.Module, optimisers: Optimisers, average: Average) -> None:
    """Goes on where `keep` stopped."""
    tensors = load_file(path, str(next(trained.parameters()).device))
    for name, parameter in trained.named_parameters():
        parameter.copy_(tensors[f"weight/{name}"])
    average.steps = int(tensors["average/steps"])
    for i, kept in enumerate(average.kept):
        kept.copy_(tensors[f"average/{i}"])
    remembered: dict[int, dict[int, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, value in tensors.items():
        if key.startswith("optimiser/"):
            _, number, i, name = key.split("/")
            remembered[int(number)][int(i)][name] = value
    for number, optimiser in enumerate(optimisers):
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": dict(remembered[number]), "param_groups": groups})
