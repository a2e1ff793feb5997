"""PipeFusion (Fang et al. 2024): a pipeline of stages through which an image goes in patches, step after step.

In the first steps, the *warm-up*, the whole image goes through all stages, exactly. From then on a stage computes one
patch while the next stage computes the one before: what the patch attends to outside itself is remembered from the step
before. So steps overlap, and the first stage begins a step when the last one has done the step's first patch.

A turn is one step of one rank's stage. The first stage, rank 0, reports it as done when it has passed the step on; the
last step's when the result is back. The sequence of orders is the same everywhere, so a cancelled run ends at the same
step on all stages, and runs interleave. Exact where every step is warm-up; else approximate.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed

from xditd.models.families import Transformer
from xditd.models.stages import Span, Stages, Stream
from xditd.protocol import orders
from xditd.protocol.errors import Code, XditError
from xditd.rank.answers import Answer, Handlers
from xditd.rank.device import Device
from xditd.rank.inputs import Inputs
from xditd.rank.links import Arriving, Links
from xditd.rank.noising import noising
from xditd.rank.places import Frames
from xditd.rank.rest import resting, turning
from xditd.rank.sampling import Denoise, Sampling
from xditd.rank.shards import Shares
from xditd.rank.transfer import Transfer


@dataclass(slots=True)
class Job:
    """A sampling under way, as one stage knows it.

    Attributes:
        begun: as it was asked for.
        calls: conditionings of a step's calls, with where this rank's pipeline stands among those that compute them.
        spans: the patches.
        warmup: steps that the whole image takes.
        shape: of the latent.
        tokens: on the first stage, the image as it was last received; on the last, as it was last sent.
        parts: on the last stage, the loop of each patch.
        back: on the first stage, what is on its way back from the last.
        denoised: on the first stage, x0 of the step before, where it is shown.
        kept: of each call, what attention remembers.
    """

    begun: orders.BeginSample
    calls: list[Any]
    spans: list[Span]
    warmup: int
    shape: tuple[int, ...]
    tokens: torch.Tensor
    parts: list[Sampling] = field(default_factory=list)
    back: list[tuple[Span, Arriving]] = field(default_factory=list)
    denoised: torch.Tensor | None = None
    kept: list[dict[Hashable, torch.Tensor]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.begun.sigmas) - 1

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    @property
    def shown(self) -> bool:
        return bool(self.begun.previews) or self.begun.preview_frames

    def spans_of(self, step: int) -> list[Span]:
        return [Span(0, self.count)] if step < self.warmup else self.spans


class PipeFusion:
    """The worker of one stage of a transformer.

    Args:
        network: on the device, of which this rank holds its stage.
        stages: the same in stages.
        links: to the stages before and after.
        transfer: of this rank's tensors.
        device: this rank's.
        attention: the kernel's name.
    """

    def __init__(
        self,
        network: Transformer,
        stages: Stages,
        links: Links,
        transfer: Transfer,
        device: Device,
        attention: str,
    ) -> None:
        self.attention = attention
        self.weights, self.host_weights = network.weights.counted(network.backbone)
        self.device_memory = device.memory
        self.usable = device.usable
        self._network = network
        self._stages = stages
        self._links = links
        self._transfer = transfer
        self._noising = noising(network.noise, transfer.device)
        self._inputs = Inputs(network, transfer)
        self._jobs: dict[int, Job] = {}
        handlers: Handlers = {
            orders.SetLoras: self._inputs.set_loras,
            orders.SetConditioning: self._inputs.set_conditioning,
            orders.BeginSample: self.begin_sample,
            orders.TurnSample: self.sample,
            orders.ForgetRun: self.forget,
            orders.DropSegments: lambda order, frames: transfer.drop(order.segments),
            **resting(network, device),
        }
        self.handlers = turning(handlers, network)

    def begin_sample(self, order: orders.BeginSample, frames: Frames) -> None:
        calls, noise, latent = self._inputs.start(order, frames)
        whole = Sampling(order.sampler, order.sigmas, noise, latent, _nothing, self._noising)
        tokens = self._stages.pack(whole.x)
        count = min(order.patches or self._links.stages, tokens.shape[1])
        shares = Shares.of(tokens.shape[1], count)
        job = Job(
            begun=order,
            calls=calls,
            spans=[Span(*shares.span(i)) for i in range(count)],
            warmup=order.warmup,
            shape=tuple(noise.shape),
            tokens=tokens,
        )
        if job.warmup < job.steps:
            job.kept = [{} for _ in calls]
        if self._links.is_last:
            unit = self._stages.pack(noise)
            start = None if latent is None else self._stages.pack(latent)
            for begin, end in job.spans:
                begun = None if start is None else start[:, begin:end]
                part = Sampling(
                    order.sampler, order.sigmas, unit[:, begin:end], begun, _nothing, self._noising
                )
                job.parts.append(part)
        self._jobs[order.run] = job

    def sample(self, order: orders.TurnSample, frames: Frames) -> Answer:
        job = self._jobs.get(order.run)
        if job is None:
            raise XditError(Code.NO_SUCH_RUN, f"Run {order.run} has no sampling under way here.")
        self._links.begin_turn()
        self._inputs.hold_loras(order.run)
        sigma = torch.tensor(job.begun.sigmas[order.step], dtype=torch.float32, device=self._transfer.device)
        _, time = self._noising.shown(sigma, sigma)
        t = time.expand(job.shape[0])
        mine = [i for i in range(len(job.calls)) if i % self._links.pipelines == self._links.pipeline]
        given = {i: self._stages.give(job.shape, t, job.calls[i]) for i in mine}
        spans = job.spans_of(order.step)
        arriving = [] if self._links.is_first else self._expect(job, spans, mine)
        for span in spans:
            predictions = {i: self._compute(job, i, given[i], span, sigma, arriving) for i in mine}
            if self._links.is_last:
                self._advance(job, order.step, span, predictions, sigma)
        if self._links.is_first:
            self._await_back(job, spans)
        self._stages.recall.set(None, Span(0, 0), 0)  # or the job's keys and values outlived it, asleep too
        if order.step + 1 == job.steps:
            del self._jobs[order.run]
            if self._links.is_first:
                self._received(job, Span(0, job.count))
        return self._answer(job, order.step, frames) if self._transfer.rank == 0 else Answer()

    def forget(self, order: orders.ForgetRun, frames: Frames) -> None:
        self._inputs.forget(order.run)
        job = self._jobs.pop(order.run, None)
        if job is not None:  # what the last stage has sent of it must not be taken for another run's
            for _, arriving in job.back:
                arriving.wait()

    # ------------------------------------------------------------------------------------------- one span, one call

    def _expect(self, job: Job, spans: Sequence[Span], mine: Sequence[int]) -> list[Arriving]:
        """Asks for all that the stage before sends in a turn."""
        batch = job.shape[0]
        each = 1 + self._stages.skips
        lengths = [
            self._stages.text(job.calls[i]) + each * (span.end - span.begin) for span in spans for i in mine
        ]
        return [
            self._links.arriving((batch, length, self._stages.width), self._network.dtype)
            for length in lengths
        ]

    def _compute(
        self, job: Job, call: int, given: Any, span: Span, sigma: torch.Tensor, arriving: list[Arriving]
    ) -> torch.Tensor | None:
        """This stage's part of a call on a span; on the last stage what the network predicts."""
        if self._links.is_first:
            shown, _ = self._noising.shown(self._received(job, span), sigma)
            stream = self._stages.enter(shown.to(self._network.dtype), given, span)
        else:
            stream = Stream(self._stages.text(job.calls[call]), arriving.pop(0).wait())
        self._stages.recall.set(job.kept[call] if job.kept else None, span, job.count)
        stream = self._stages.through(stream, given, span)
        if self._links.is_last:
            return self._stages.leave(stream, given)
        self._links.send(stream.tokens)
        return None

    # -------------------------------------------------------------------------------------------------- the last stage

    def _advance(
        self,
        job: Job,
        step: int,
        span: Span,
        predictions: dict[int, torch.Tensor | None],
        sigma: torch.Tensor,
    ) -> None:
        """Advances the loop of a span's patches, and sends the first stage what they have become."""
        outputs = self._exchange(job, span, predictions)
        x = torch.cat([part.x for part in self._parts(job, span)], 1)
        denoised, *without = (self._noising.denoised(x, output.float(), sigma) for output in outputs)
        if without:
            denoised = without[0] + (denoised - without[0]) * job.begun.cfg
        begin = 0
        for part in self._parts(job, span):
            length = part.x.shape[1]
            part.denoise = _known(denoised[:, begin : begin + length])
            part.step(step)
            begin += length
        self._pad(job)
        parts = self._parts(job, span)
        done = [part.result() if part.done else part.x for part in parts]
        self._links.send(torch.cat(done + ([denoised] if job.shown else []), 1))

    def _exchange(
        self, job: Job, span: Span, predictions: dict[int, torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """The predictions of all calls, those of other pipelines from their last stages."""
        shape = (job.shape[0], span.end - span.begin, *job.tokens.shape[2:])
        results = []
        for i in range(len(job.calls)):
            result = predictions.get(i)
            if result is None:
                result = torch.empty(shape, dtype=self._network.dtype, device=self._transfer.device)
            if self._links.lasts is not None:
                result = result.contiguous()
                source = (i % self._links.pipelines + 1) * self._links.stages - 1
                torch.distributed.broadcast(result, src=source, group=self._links.lasts)
            results.append(result)
        return results

    def _parts(self, job: Job, span: Span) -> list[Sampling]:
        return [
            part
            for part, patch in zip(job.parts, job.spans, strict=True)
            if span.begin <= patch.begin and patch.end <= span.end
        ]

    def _pad(self, job: Job) -> None:
        """What an odd size was padded with is what the opposite side has become."""
        whole = torch.cat([part.x for part in job.parts], 1)
        padded = self._stages.pack(self._stages.unpack(whole, *job.shape[2:]))
        for part, patch in zip(job.parts, job.spans, strict=True):
            part.x = padded[:, patch.begin : patch.end]

    # ------------------------------------------------------------------------------------------------- the first stage

    def _await_back(self, job: Job, spans: Sequence[Span]) -> None:
        """Asks for what the last stage will send of this step. At once, so that it is asked for in the order of turns."""
        for span in spans:
            count = (span.end - span.begin) * (2 if job.shown else 1)
            shape = (job.shape[0], count, *job.tokens.shape[2:])
            job.back.append((span, self._links.arriving(shape, torch.float32)))

    def _received(self, job: Job, span: Span) -> torch.Tensor:
        """The image's tokens of a span, as the step before left them."""
        while job.back and job.back[0][0].begin < span.end:
            came, arriving = job.back.pop(0)
            tokens = arriving.wait()
            count = came.end - came.begin
            job.tokens[:, came.begin : came.end] = tokens[:, :count]
            if job.shown:
                if job.denoised is None:
                    job.denoised = torch.zeros_like(job.tokens)
                job.denoised[:, came.begin : came.end] = tokens[:, count:]
        return job.tokens[:, span.begin : span.end]

    def _answer(self, job: Job, step: int, frames: Frames) -> Answer:
        """Rank 0's: nothing yet, or the result; and x0 of the step before, where that is shown."""
        begun = job.begun
        results: list[Any] = []
        last = step + 1 == job.steps
        if last:
            result = self._stages.unpack(job.tokens, *job.shape[2:])
            results.append((result, begun.out, begun.noise.dtype))
        if job.denoised is not None:
            slot = begun.previews[step % len(begun.previews)] if begun.previews else None
            shown = self._stages.unpack(job.denoised, *job.shape[2:])
            results.append((shown, slot, begun.noise.dtype))
        outputs, inline = self._transfer.deliver(results, frames)
        if job.denoised is not None:
            return Answer(outputs[:-1], inline, preview=outputs[-1])
        return Answer(outputs, inline)


def _known(denoised: torch.Tensor) -> Denoise:
    """The model of a loop for whose next step x0 has been computed."""
    return lambda x, sigma: denoised


def _nothing(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the pipeline computes x0 before it advances a loop")
