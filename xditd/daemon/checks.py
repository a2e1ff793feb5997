"""What a run is asked, held against its model's rules and its plan: refused here, before the ranks are asked. Pure."""

from __future__ import annotations

from typing import Any

from xditd.catalog import families
from xditd.catalog.families import transformer
from xditd.daemon.runs import Run, Work
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError


def check_work(run: Run, work: Work) -> None:
    """Refuses what does not fit the run's model, or its plan.

    Raises:
        XditError: `no_such_conditioning`, and what the family's checks and the plan's have to say.
    """
    info = run.found.info
    plan = run.key.plan
    if isinstance(work, m.Denoise):
        transformer.check_pipelined_step(plan)
        rules = families.transformer_of(info, "denoise")
        for item in work.items:
            given = _conditioning(run, item.conditioning)
            rules.check_denoise(info, item.x, item.t, given, item.out)
            transformer.check_tokens("x", plan, rules.attention(info.facts), item.x, given)
    elif isinstance(work, m.Sample):
        transformer.check_pipelined_loop(plan, work)
        rules = families.transformer_of(info, "sample")
        given = _conditioning(run, work.conditioning)
        negative = _conditioning(run, work.negative) if work.negative is not None else None
        rules.check_sample(info, work, given, negative)
        for one in (given, negative):
            if one is not None:
                transformer.check_tokens("noise", plan, rules.attention(info.facts), work.noise, one)
    elif isinstance(work, m.Decode):
        _check_tile(run, work.tile)
        families.autoencoder_of(info, "decode").check_decode(info, work.latent, work.out, work.tile or 0)
    elif isinstance(work, m.Encode):
        _check_tile(run, work.tile)
        families.autoencoder_of(info, "encode images").check_encode(
            info, work.image, work.out, work.tile or 0
        )
    else:
        families.text_encoder_of(info, "encode text").check_encode_text(info, work)


def _check_tile(run: Run, tile: int | None) -> None:
    """Refuses tiles where devices share a picture: each would hold a band of every tile, too thin to be worth it."""
    if tile and run.key.plan.patch > 1:
        raise XditError(
            Code.BAD_VALUE,
            f"Tiles are computed by one device, but patch {run.key.plan.patch} shares a picture among several; leave out "
            "tile, or name one device.",
        )


def _conditioning(run: Run, key: str) -> dict[str, Any]:
    if key not in run.conditioning:
        known = ", ".join(map(repr, run.conditioning)) or "none"
        raise XditError(
            Code.NO_SUCH_CONDITIONING,
            f"Run {run.id} has no conditioning {key!r}; it has {known}. Put it first.",
        )
    return run.conditioning[key][0].tensors
