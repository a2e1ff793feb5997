"""What is in a pipeline's folder: which parts, where, and what it says of their noise.

Reads the small JSON that tells it; which folders are models and pipelines is `protocol.folders`', weights are `weights`'.
"""

from __future__ import annotations

import json
import os
from typing import Any

from xditd.catalog.header import MAX_HEADER, opened
from xditd.catalog.sentences import shown
from xditd.protocol.errors import Code, XditError
from xditd.protocol.folders import PIPELINE

SCHEDULER = os.path.join("scheduler", "scheduler_config.json")

PARTS = {"transformer": "transformer", "unet": "transformer", "vae": "vae"}
"""What a pipeline calls its folders, and which part each is; text encoders are told by their keys."""

TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def parts(folder: str, name: str) -> dict[str, str]:
    """By name of a pipeline's folder: the class of what is in it, for those with models.

    Raises:
        XditError: `file_invalid` for a `model_index.json` that is none.
    """
    table = read_json(os.path.join(folder, PIPELINE), f"{name}/{PIPELINE}")
    return {
        sub: str(value[1])
        for sub, value in table.items()
        if sub in (*PARTS, *TEXTS) and isinstance(value, list) and len(value) == 2 and value[1]
    }


def text_part(family: str, variant: str, with_bert: bool) -> str:
    """Which part of a checkpoint a pipeline's text encoder is.

    Args:
        with_bert: whether the pipeline has a BERT, as HunyuanDiT's have: its T5 is the one for many languages.
    """
    if family == "t5":
        return "mt5xl" if with_bert else "t5xxl"
    return {"clip": variant, "bert": "hydit_clip"}.get(family, "")


def marks(folder: str, name: str) -> dict[str, str]:
    """What a model's pipeline says of its noise and its keys do not, by the makers' marks for it: "v_pred", "ztsnr".

    Args:
        folder: of the model, beside which the pipeline has that of its scheduler.
    """
    above = os.path.dirname(os.path.abspath(folder))
    path = os.path.join(above, SCHEDULER)
    if not os.path.isfile(os.path.join(above, PIPELINE)) or not os.path.isfile(path):
        return {}
    table = read_json(path, f"{name}'s {SCHEDULER}")
    if table.get("prediction_type") != "v_prediction":
        return {}
    return {"v_pred": "1"} | ({"ztsnr": "1"} if table.get("rescale_betas_zero_snr") is True else {})


def read_json(path: str, name: str) -> dict[str, Any]:
    """A small JSON file that holds an object.

    Raises:
        XditError: what `opened` raises, and `file_invalid`.
    """
    with opened(path, name) as (file, _):
        text = file.read(MAX_HEADER)
    try:
        table: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise XditError(Code.FILE_INVALID, f"{shown(name)} is no JSON; fetch it again.") from error
    if not isinstance(table, dict):
        raise XditError(Code.FILE_INVALID, f"{shown(name)} holds no object; fetch it again.")
    return table
