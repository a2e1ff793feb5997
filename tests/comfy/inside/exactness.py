"""Samples the same on a local model and through a daemon, and prints how far apart the latents are: a line of JSON each.

python -m tests.comfy.inside.exactness MODEL ENDPOINT [--samplers N] [--amplify]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from tests.comfy.inside import own

own.enter()

import comfy.samplers  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402

from comfy_nodes import daemon  # noqa: E402
from comfy_nodes.dispatcher import Dispatcher  # noqa: E402
from comfy_nodes.patcher import make_model  # noqa: E402
from tests.comfy.inside.cases import Case, cases  # noqa: E402
from xditd.protocol.messages import ModelRef, PlanRequest  # noqa: E402

STEPS = 6
LEFT_OUT = ("dpmpp_sde_gpu", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde_gpu")
"""The same as those without _gpu where there is no GPU."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("endpoint")
    parser.add_argument("--devices", default="")
    parser.add_argument("--samplers", type=int, default=1000)
    parser.add_argument(
        "--amplify", action="store_true", help="also what a relative error of 1e-6 a step becomes"
    )
    arguments = parser.parse_args()
    ref = ModelRef(kind="diffusion_models", name=arguments.model.rpartition("/")[2])
    plan = PlanRequest(devices=tuple(arguments.devices.split(",")) if arguments.devices else ())
    loaded = daemon.client(arguments.endpoint).load(ref, plan)
    remote = make_model(Dispatcher(arguments.endpoint, ref, plan), loaded)
    leaf = own.flux(arguments.model)
    local = own.model(arguments.model, leaf)
    shaken = own.model(arguments.model, Shaken(leaf)) if arguments.amplify else None
    samplers = [name for name in comfy.samplers.KSampler.SAMPLERS if name not in LEFT_OUT]
    texts = Texts(leaf)
    for case in cases(samplers[: arguments.samplers]):
        begin = time.perf_counter()
        reference = sample(local, case, texts)
        ours = sample(remote, case, texts)
        line = {"case": str(case), "sampler": case.sampler, "abs": float((ours - reference).abs().max())}
        line["relative"] = line["abs"] / float(reference.std())
        line["finite"] = bool(reference.isfinite().all())
        if shaken is not None:
            moved = sample(shaken, case, texts)
            line["amplified"] = float((moved - reference).abs().max()) / float(reference.std())
        line["seconds"] = round(time.perf_counter() - begin, 3)
        print(json.dumps(line), flush=True)


class Texts:
    """Conditionings as CLIPTextEncode and the nodes after it make them."""

    def __init__(self, leaf: Any) -> None:
        self.width, self.pooled = leaf.params.context_in_dim, leaf.params.vec_in_dim

    def of(self, case: Case) -> tuple[list[Any], list[Any]]:
        positive = self.text(1, 24, guidance=3.0)
        negative = self.text(2, 24 if case.texts != "unequal" else 17)
        if case.texts == "area":
            height, width = case.size
            area = {"area": (height // 2, width // 2, 2, 4), "strength": 0.8, "set_area_to_bounds": False}
            return [*positive, [*self.text(3, 24)[0][:1], {**self.text(3, 24)[0][1], **area}]], negative
        if case.texts == "timestep range":
            late = self.text(4, 19)
            positive[0][1].update(start_percent=0.0, end_percent=0.5)
            late[0][1].update(start_percent=0.5, end_percent=1.0)
            return [*positive, *late], negative
        return positive, negative

    def text(self, seed: int, length: int, **options: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, length, self.width, generator=generator)
        pooled = torch.randn(1, self.pooled, generator=generator)
        return [[context, {"pooled_output": pooled, **options}]]


class Shaken(torch.nn.Module):
    """A leaf whose output is wrong by a relative 1e-6: what a sampler makes of it is its own amplification."""

    def __init__(self, leaf: Any) -> None:
        super().__init__()
        self.leaf, self.params = leaf, leaf.params
        self.in_channels, self.out_channels, self.patch_size, self.dtype = (
            leaf.in_channels,
            leaf.out_channels,
            leaf.patch_size,
            leaf.dtype,
        )
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        output = self.leaf(*arguments, **named)
        noise = torch.randn(output.shape, generator=self.generator)
        return output + 1e-6 * output.std() * noise


def sample(model: Any, case: Case, texts: Texts) -> torch.Tensor:
    height, width = case.size
    generator = torch.Generator().manual_seed(11)
    positive, negative = texts.of(case)
    latent: dict[str, Any] = {"samples": torch.zeros(case.batch, 16, height, width)}
    if case.way != "plain":
        latent["samples"] = torch.randn(case.batch, 16, height, width, generator=generator)
    if case.way == "partial mask":
        mask = torch.zeros(1, height * 8, width * 8)
        mask[:, : height * 4, width * 2 :] = 1.0
        latent["noise_mask"] = mask
    common = (case.sampler, case.scheduler, positive, negative)
    if case.way == "advanced in two":
        first = nodes.KSamplerAdvanced().sample(
            model, "enable", 5, STEPS, case.cfg, *common, latent, 0, STEPS // 2, "enable"
        )[0]
        return nodes.KSamplerAdvanced().sample(
            model, "disable", 5, STEPS, case.cfg, *common, first, STEPS // 2, STEPS, "disable"
        )[0]["samples"]
    denoise = 0.5 if case.way == "denoise 0.5" else 1.0
    return nodes.common_ksampler(model, 5, STEPS, case.cfg, *common, latent, denoise=denoise)[0]["samples"]


if __name__ == "__main__":
    sys.exit(main())
