"""A transformer's orders: denoising, and sampling a step at a time. Every rank of a world runs this alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from xditd.models.families import Transformer
from xditd.protocol import orders
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import DenoiseItem
from xditd.rank.answers import Answer, Handlers
from xditd.rank.batches import predicted_singly
from xditd.rank.cfg import Call, CfgParallel
from xditd.rank.device import Device
from xditd.rank.inputs import Inputs
from xditd.rank.noising import noising
from xditd.rank.places import Frames
from xditd.rank.rest import resting, turning
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
        self.weights, self.host_weights = network.weights.counted(network.backbone)
        self.device_memory = device.memory
        self.usable = device.usable
        self._network = network
        self._transfer = transfer
        self._cfg = cfg or CfgParallel(1, 0, 1, transfer.device)
        self._noising = noising(network.noise, transfer.device)
        self._inputs = Inputs(network, transfer)
        self._samplings: dict[int, tuple[orders.BeginSample, Sampling]] = {}
        handlers: Handlers = {
            orders.SetLoras: self._inputs.set_loras,
            orders.SetConditioning: self._inputs.set_conditioning,
            orders.TurnDenoise: self.denoise,
            orders.BeginSample: self.begin_sample,
            orders.TurnSample: self.sample,
            orders.ForgetRun: self.forget,
            orders.DropSegments: lambda order, frames: transfer.drop(order.segments),
            **resting(network, device),
        }
        self.handlers = turning(handlers, network)

    def denoise(self, order: orders.TurnDenoise, frames: Frames) -> Answer:
        self._inputs.hold_loras(order.run)
        predictions = self._cfg.run(
            [self._item(order.run, item, frames, order.singly) for item in order.items]
        )
        results = [
            (prediction, item.out, item.x.dtype)
            for prediction, item in zip(predictions, order.items, strict=True)
        ]
        return Answer(*self._transfer.deliver(results, frames))

    def begin_sample(self, order: orders.BeginSample, frames: Frames) -> None:
        conditionings, noise, latent = self._inputs.start(order, frames)
        guided = partial(self._guided, conditionings, order.cfg, order.singly)
        sampling = Sampling(order.sampler, order.sigmas, noise, latent, guided, self._noising)
        self._samplings[order.run] = order, sampling

    def sample(self, order: orders.TurnSample, frames: Frames) -> Answer:
        if order.run not in self._samplings:
            raise XditError(Code.NO_SUCH_RUN, f"Run {order.run} has no sampling under way here.")
        begun, sampling = self._samplings[order.run]
        self._inputs.hold_loras(order.run)
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
        self._inputs.forget(order.run)
        self._samplings.pop(order.run, None)

    def _item(self, run: int, item: DenoiseItem, frames: Frames, singly: bool) -> Call:
        conditioning = self._inputs.conditioning(run, item.conditioning)
        x = self._transfer.receive(item.x, frames)
        batch = x.shape[0]
        if len(item.t) == 1:
            t = torch.full((batch,), item.t[0], dtype=torch.float32, device=x.device)
        else:
            t = torch.tensor(item.t, dtype=torch.float32).to(x.device)
        return self._call(x, t, conditioning, singly)

    def _call(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any, singly: bool) -> Call:
        predict = partial(predicted_singly, self._network.predict) if singly else self._network.predict
        return Call(partial(predict, x, t, conditioning), tuple(x.shape), self._network.dtype)

    def _guided(
        self, conditionings: Sequence[Any], cfg: float, singly: bool, x: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """x0 with classifier-free guidance, in which a cfg of 1 needs no negative."""
        shown, t = self._noising.shown(x, sigma)
        calls = [self._call(shown, t.expand(x.shape[0]), each, singly) for each in conditionings]
        denoised, *without = (
            self._noising.denoised(x, output.float(), sigma) for output in self._cfg.run(calls)
        )
        return without[0] + (denoised - without[0]) * cfg if without else denoised
