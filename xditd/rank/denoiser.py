"""A transformer's orders: conditioning, denoising, and sampling a step at a time. Every rank of a world runs this alike.

What belongs to a run is kept until `forget_run`; nothing of a run outlives it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from xditd.models.families import Transformer
from xditd.models.reading import held
from xditd.protocol import orders
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import DenoiseItem
from xditd.rank.answers import Answer, Handlers
from xditd.rank.cfg import Call, CfgParallel
from xditd.rank.device import Device
from xditd.rank.noising import Noising, noising
from xditd.rank.places import Frames
from xditd.rank.rest import resting
from xditd.rank.sampling import Sampling
from xditd.rank.transfer import Transfer


class Denoiser:
    """The worker of a transformer.

    Args:
        network: on the device, split among the world already.
        transfer: of this rank's tensors.
        device: this rank's.
        attention: the kernel's name.
        cfg: who computes which call of a turn; None computes all here.
    """

    def __init__(
        self,
        network: Transformer,
        transfer: Transfer,
        device: Device,
        attention: str,
        cfg: CfgParallel | None = None,
    ) -> None:
        self.attention = attention
        self.weights = held(network.backbone)
        self.device_memory = device.memory
        self.usable = device.usable
        self._network = network
        self._transfer = transfer
        self._cfg = cfg or CfgParallel(1, 0, 1, transfer.device)
        self._conditionings: dict[int, dict[str, Any]] = {}
        self._samplings: dict[int, tuple[orders.BeginSample, Sampling]] = {}
        self._loras: dict[int, tuple[orders.Merge, ...]] = {}
        self.handlers: Handlers = {
            orders.SetLoras: self.set_loras,
            orders.SetConditioning: self.set_conditioning,
            orders.TurnDenoise: self.denoise,
            orders.BeginSample: self.begin_sample,
            orders.TurnSample: self.sample,
            orders.ForgetRun: self.forget,
            orders.DropSegments: lambda order, frames: transfer.drop(order.segments),
            **resting(network, device),
        }

    def set_loras(self, order: orders.SetLoras, frames: Frames) -> None:
        self._loras[order.run] = order.loras
        self._hold(order.run)

    def set_conditioning(self, order: orders.SetConditioning, frames: Frames) -> None:
        tensors = {
            name: self._transfer.receive(tensor, frames, keep=True) for name, tensor in order.tensors.items()
        }
        conditioning = self._network.condition(tensors, order.values)
        self._conditionings.setdefault(order.run, {})[order.key] = conditioning

    def denoise(self, order: orders.TurnDenoise, frames: Frames) -> Answer:
        self._hold(order.run)
        predictions = self._cfg.run([self._item(order.run, item, frames) for item in order.items])
        results = [
            (prediction, item.out, item.x.dtype)
            for prediction, item in zip(predictions, order.items, strict=True)
        ]
        return Answer(*self._transfer.deliver(results, frames))

    def begin_sample(self, order: orders.BeginSample, frames: Frames) -> None:
        positive = self._conditioning(order.run, order.conditioning)
        negative = None
        if order.negative is not None and not math.isclose(order.cfg, 1.0):
            negative = self._conditioning(order.run, order.negative)
        noise = self._transfer.receive(order.noise, frames, keep=True).float()
        latent = None
        if order.latent is not None:
            latent = self._transfer.receive(order.latent, frames, keep=True).float()
        kind = noising(self._network.noise, noise.device)
        guided = partial(self._guided, positive, negative, order.cfg, kind)
        self._samplings[order.run] = order, Sampling(order.sampler, order.sigmas, noise, latent, guided, kind)

    def sample(self, order: orders.TurnSample, frames: Frames) -> Answer:
        if order.run not in self._samplings:
            raise XditError(Code.NO_SUCH_RUN, f"Run {order.run} has no sampling under way here.")
        begun, sampling = self._samplings[order.run]
        self._hold(order.run)
        denoised = sampling.step(order.step)
        results: list[Any] = []
        if sampling.done:
            del self._samplings[order.run]
            results.append((sampling.result(), begun.out, begun.noise.dtype))
        shown = bool(begun.previews) or begun.preview_frames
        if shown:
            slot = begun.previews[order.step % len(begun.previews)] if begun.previews else None
            results.append((denoised, slot, begun.noise.dtype))
        outputs, inline = self._transfer.deliver(results, frames)
        if shown and outputs:
            return Answer(outputs[:-1], inline, preview=outputs[-1])
        return Answer(outputs, inline)

    def forget(self, order: orders.ForgetRun, frames: Frames) -> None:
        self._loras.pop(order.run, None)
        self._conditionings.pop(order.run, None)
        self._samplings.pop(order.run, None)

    def _hold(self, run: int) -> None:
        """Before every turn: the weights are those of its run. The daemon sees to it that they seldom have to change."""
        self._network.loras.hold(self._loras.get(run, ()))

    def _item(self, run: int, item: DenoiseItem, frames: Frames) -> Call:
        conditioning = self._conditioning(run, item.conditioning)
        x = self._transfer.receive(item.x, frames)
        batch = x.shape[0]
        if len(item.t) == 1:
            t = torch.full((batch,), item.t[0], dtype=torch.float32, device=x.device)
        else:
            t = torch.tensor(item.t, dtype=torch.float32).to(x.device)
        return self._call(x, t, conditioning)

    def _call(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> Call:
        return Call(partial(self._network.predict, x, t, conditioning), tuple(x.shape), self._network.dtype)

    def _guided(
        self,
        positive: Any,
        negative: Any,
        cfg: float,
        kind: Noising,
        x: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """x0 with classifier-free guidance, in which a cfg of 1 needs no negative."""
        conditionings = [positive] if negative is None else [positive, negative]
        shown, t = kind.shown(x, sigma)
        calls = [self._call(shown, t.expand(x.shape[0]), each) for each in conditionings]
        denoised, *without = (kind.denoised(x, output.float(), sigma) for output in self._cfg.run(calls))
        return without[0] + (denoised - without[0]) * cfg if without else denoised

    def _conditioning(self, run: int, key: str) -> Any:
        conditioning = self._conditionings.get(run, {}).get(key)
        if conditioning is None:
            raise XditError(
                Code.NO_SUCH_CONDITIONING, f"Run {run} was given no conditioning {key!r}; put it first."
            )
        return conditioning
