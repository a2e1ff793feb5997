"""A VAE's picture spread over the ranks of a world, exactly. Knows diffusers' AutoencoderKL; the daemon knows nothing of it.

Each rank has a band of the latent's rows, or of its columns where it is wider than high, and the image pixels of that
band; nobody has the whole before the end. A band alone is enough for all layers but three, which meet the others here:

- a convolution sees one row beyond its band on either side: the neighbours send it;
- a normalisation of groups takes mean and variance of the whole picture: those of all bands, merged (Chan, Golub and
  LeVeque 1979, https://doi.org/10.1080/00031305.1983.10483115, the pairwise formula for any number of parts);
- attention, in the middle block, has a band's queries and the keys and values of all.

DistVAE, which xfuser takes, computes the middle block whole on every rank: its attention is what large pictures run out
of memory at. It rounds statistics to the network's dtype, too. (docs/decisions/0014.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from xditd.models.vae.network import Autoencoder
from xditd.protocol.errors import Code, XditError
from xditd.rank.shards import Shares

HIGH, WIDE = 2, 3
"""Dimensions of what the network has, [B, C, H, W]."""


class SpatialParallel:
    """A VAE whose pictures are shared by the ranks of a world; all of them return the whole one.

    Args:
        network: on this rank's device. Its layers keep their parameters, and get another `forward`.
        rank, world: of this process; torch.distributed is joined.

    Raises:
        XditError: `not_built` for a network with another kind of convolution.
    """

    def __init__(self, network: Autoencoder, rank: int, world: int) -> None:
        self.backbone = network.backbone
        self.weights = network.weights
        self._network = network
        self._rank = rank
        self._world = world
        self._along = 0  # the dimension that is dealt out; 0 while none is
        self._counts: tuple[int, ...] = ()  # latent rows of every rank
        for module in network.backbone.modules():
            layer: Any = module
            if isinstance(module, Attention):
                layer.forward = partial(self._attend, module)
            elif isinstance(module, nn.GroupNorm):
                layer.forward = partial(self._normalise, module)
            elif isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                _check(module)
                layer.forward = partial(self._convolve, module)

    def decode(self, latent: torch.Tensor, clamp: bool = True, tile: int = 0) -> torch.Tensor:
        """As `Autoencoder.decode`; `tile` is 0. A collective."""
        along = HIGH if latent.shape[HIGH] >= latent.shape[WIDE] else WIDE
        shares = Shares.of(latent.shape[along], self._world)
        if not shares.counts[-1]:  # fewer rows than ranks: each computes all of them
            return self._network.decode(latent, clamp)
        begin, end = shares.span(self._rank)
        with _Band(self, along, shares.counts):
            image = self._network.decode(latent.narrow(along, begin, end - begin), clamp)
            return self._gather(image, along - 1)

    def encode(self, image: torch.Tensor, tile: int = 0) -> torch.Tensor:
        """As `Autoencoder.encode`; `tile` is 0. A collective."""
        height, width = image.shape[1:3]
        along, scale = (HIGH if height >= width else WIDE), self._network.scale
        shares = Shares.of(image.shape[along - 1] // scale, self._world)
        if not shares.counts[-1]:
            return self._network.encode(image)
        begin, end = shares.span(self._rank)
        with _Band(self, along, shares.counts):
            band = image.narrow(along - 1, begin * scale, (end - begin) * scale)
            return self._gather(self._network.encode(band), along)

    # -------------------------------------------------------------------------------------------- layers

    def _convolve(self, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if not self._along:
            return nn.Conv2d.forward(conv, x)
        if conv.stride == (1, 1):
            before, after = self._edges(x)
            x = torch.cat((before, x, after), self._along)
        else:  # diffusers has added a row and a column of zeros at the end of what is halved, so of every band
            x = x.narrow(self._along, 0, x.shape[self._along] - 1)
            x = torch.cat((x, self._edges(x)[1]), self._along)
        width = 1 if conv.stride == (1, 1) else 0  # of the zeros; along the band they are there already
        padding = (0, width) if self._along == HIGH else (width, 0)
        return functional.conv2d(x, conv.weight, conv.bias, conv.stride, padding)

    def _normalise(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        if not self._along:
            return nn.GroupNorm.forward(norm, x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.stack(torch.var_mean(wide.reshape(x.shape[0], norm.num_groups, -1), dim=2, correction=0))
        of_all = torch.stack(self._all(own))
        share = torch.tensor(self._counts, dtype=wide.dtype, device=x.device).view(-1, 1, 1)
        share = share / share.sum()
        variances, means = of_all[:, 0], of_all[:, 1]
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        per_channel = x.shape[1] // norm.num_groups
        scale = torch.rsqrt(variance + norm.eps).repeat_interleave(per_channel, 1) * norm.weight.to(
            wide.dtype
        )
        shift = norm.bias.to(wide.dtype) - mean.repeat_interleave(per_channel, 1) * scale
        channels = (*scale.shape, *(1,) * (x.ndim - 2))
        return torch.addcmul(shift.view(channels), wide, scale.view(channels)).to(x.dtype)

    def _attend(self, attn: Any, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if not self._along:
            whole: torch.Tensor = type(attn).forward(attn, hidden_states, *rest, **named)
            return whole
        tokens = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        key, value = self._gather(torch.cat((key, value), 2), 1).chunk(2, dim=2)
        query, key, value = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output: torch.Tensor = attn.to_out[0](seen).transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor

    # ------------------------------------------------------------------------------------- the other ranks

    def _edges(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows beside this rank's band: the last of the band before it, the first of that after; zeros outside."""
        length = x.shape[self._along]
        first = x.narrow(self._along, 0, 1).contiguous()
        last = x.narrow(self._along, length - 1, 1).contiguous()
        before, after = torch.zeros_like(first), torch.zeros_like(last)
        ways = []
        for other, sent, received in ((self._rank - 1, first, before), (self._rank + 1, last, after)):
            if 0 <= other < self._world:
                ways.append(torch.distributed.P2POp(torch.distributed.isend, sent, other))
                ways.append(torch.distributed.P2POp(torch.distributed.irecv, received, other))
        for work in torch.distributed.batch_isend_irecv(ways):
            work.wait()
        return before, after

    def _gather(self, part: torch.Tensor, along: int) -> torch.Tensor:
        """All ranks' parts one after another; each is as long as its rank's band is wide."""
        of_row = part.shape[along] // self._counts[self._rank]
        largest = list(part.shape)
        largest[along] = of_row * self._counts[0]
        padded = part.new_zeros(largest)
        padded.narrow(along, 0, part.shape[along]).copy_(part)
        parts = zip(self._all(padded), self._counts, strict=True)
        return torch.cat([other.narrow(along, 0, of_row * count) for other, count in parts], along)

    def _all(self, own: torch.Tensor) -> list[torch.Tensor]:
        everybodys = [torch.empty_like(own) for _ in range(self._world)]
        torch.distributed.all_gather(everybodys, own)
        return everybodys


class _Band:
    """While it lasts, layers have a band; whatever happens, they have the whole again afterwards."""

    def __init__(self, owner: SpatialParallel, along: int, counts: tuple[int, ...]) -> None:
        self._owner, self._along, self._counts = owner, along, counts

    def __enter__(self) -> None:
        self._owner._along, self._owner._counts = self._along, self._counts

    def __exit__(self, *_: object) -> None:
        self._owner._along = 0


def _check(conv: nn.Conv2d) -> None:
    """Refuses a convolution that sees more than one row beyond its band, or that is halved otherwise than diffusers' are."""
    kind = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode
    if kind not in (
        ((3, 3), (1, 1), (1, 1), (1, 1), "zeros"),
        ((3, 3), (2, 2), (0, 0), (1, 1), "zeros"),
    ):
        raise XditError(
            Code.NOT_BUILT, f"A VAE with the convolution {conv} runs on one device in this version."
        )
