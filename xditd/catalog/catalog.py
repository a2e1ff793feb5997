"""The catalog: from a model's name to its file and what it is, and the list of all there are.

Reads headers alone and keeps what they said for as long as the file stays the same. Touches the file system, so
an event loop calls it in a thread; it may be called from several. Knows no device, run or group.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from xditd.catalog import lora_fit, pipelines
from xditd.catalog.detection import Recognised, recognise, role
from xditd.catalog.families import TRANSFORMERS
from xditd.catalog.header import Header
from xditd.catalog.roots import ModelFile, Roots, canonical
from xditd.catalog.sentences import shown
from xditd.catalog.weights import read_weights
from xditd.protocol import folders
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import LoraMatch, LoraRef, ModelInfo, ModelRef, SkippedFile
from xditd.protocol.tensors import FLOATS

PARTS: dict[str, tuple[str, ...]] = {
    "diffusion_models": ("transformer",),
    "checkpoints": ("transformer", "vae", "clip_l", "clip_g", "t5xxl", "hydit_clip", "mt5xl"),
    "vae": ("vae",),
    "text_encoders": ("text_encoder",),
    "loras": ("lora",),
}
"""By kind: the parts that its files may have; the first is what an empty part means."""

LORAS = "loras"
"""The kind whose files change models, and are none."""

ECHO = "echo"
"""Kind, name and family of the model without a file that tests and benchmarks use."""

MAX_REMEMBERED = 8192  # files


@dataclass(frozen=True, slots=True)
class Found:
    """A model, ready to be loaded.

    Attributes:
        path: of its file or folder, with links resolved; "" of the echo.
        info: what the file is.
        prefix: what the file puts before the keys of the part.
    """

    path: str
    info: ModelInfo
    prefix: str


@dataclass(frozen=True, slots=True)
class FoundLora:
    """A LoRA for a model, ready to be merged.

    Attributes:
        path: of its file, with links resolved.
        stamp: what changes when the file does: its size, time and inode.
        match: what it changes of the model, and how much of it is wanted.
        bytes, adding: as `lora_fit.Fit` has them.
    """

    path: str
    stamp: tuple[int, ...]
    match: LoraMatch
    bytes: int
    adding: int


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What changes when a file does."""

    size: int
    mtime_ns: int
    inode: int
    device: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a file's header said, part by part: what it is, or why not."""

    stamp: _Stamp
    parts: dict[str, Recognised | XditError]


class Catalog:
    """The models that the daemon can see."""

    def __init__(self, roots: Roots, *, echo: bool = False) -> None:
        """
        Args:
            roots: the folders, whether links may leave them, and the user that looks.
            echo: whether the model without a file is there.
        """
        self.roots = roots
        self.echo = echo
        self._seen: dict[tuple[str, str], _Seen] = {}

    def find(self, ref: ModelRef) -> Found:
        """The file that a name means, and what it is.

        Raises:
            XditError: `model_not_visible`, `bad_value`, `file_invalid`, `file_refused`, `unknown_family` or
                `not_built`, with one sentence that says what would work.
        """
        if ref.dtype and ref.dtype not in FLOATS:
            raise XditError(
                Code.BAD_VALUE,
                f"Nothing computes in dtype {shown(ref.dtype)!r}; {', '.join(FLOATS)} would work.",
            )
        if ref.kind == ECHO and self.echo:
            return Found(path="", info=_ECHO_INFO, prefix="")
        kind = canonical(ref.kind)
        if kind == LORAS:
            raise XditError(
                Code.BAD_VALUE,
                f"{kind}/{shown(ref.name)} is no model of its own: ask for a model with it, in the run's lora.",
            )
        part = _part(kind, ref)
        path, stamp = self._choose(kind, ref)
        recognised = self._recognise(kind, ref.name, path, stamp)[part]
        if isinstance(recognised, XditError):
            raise _anew(recognised)
        info = _info(kind, ref.name, part, stamp.size, recognised)
        below = os.path.join(path, recognised.below) if recognised.below else path
        return Found(path=below, info=info, prefix=recognised.prefix)

    def find_lora(self, ref: LoraRef, model: Found) -> FoundLora:
        """The file of a LoRA, and what it changes of a model.

        Raises:
            XditError: `bad_value` for a strength that is no number; what `Roots.candidates` and `read_weights` raise;
                `lora_mismatch` and what else `lora_fit.fit` finds wrong with it; `not_built` for a model that is no
                transformer.
        """
        if not math.isfinite(ref.strength):
            raise XditError(
                Code.BAD_VALUE, f"The strength of {shown(ref.name)} is {ref.strength}; it must be finite."
            )
        info = model.info
        if role(info.part) != "transformer":
            raise XditError(
                Code.NOT_BUILT,
                f"{info.name} is a {info.family}; in this version LoRAs change transformers and UNets, and no other models.",
            )
        path, stamp = self._choose(LORAS, ModelRef(kind=LORAS, name=ref.name, size=ref.size))
        found = lora_fit.fit(read_weights(path, f"{LORAS}/{ref.name}"), info.family, info.facts, info.name)
        match = LoraMatch(
            name=ref.name,
            strength=ref.strength,
            matched=found.matched,
            modules=found.pairs,
            text=found.text,
            unmatched=tuple(shown(name) for name in found.unmatched),
        )
        return FoundLora(path, (stamp.size, stamp.mtime_ns, stamp.inode), match, found.bytes, found.adding)

    def list(self, kind: str = "") -> tuple[tuple[ModelInfo, ...], tuple[SkippedFile, ...]]:
        """Every model of a kind, or of all kinds that can be loaded, and every file that is none, with the reason.

        A checkpoint is listed once for each of its parts.

        Raises:
            XditError: `bad_value` for a kind that ComfyUI has not.
        """
        models: tuple[ModelInfo, ...] = (_ECHO_INFO,) if self.echo and kind in ("", ECHO) else ()
        skipped: tuple[SkippedFile, ...] = ()
        if models and kind:
            return models, skipped
        for each in [canonical(kind)] if kind else PARTS:
            for file in self.roots.files(each):
                infos, problems = self._look(each, file)
                models += infos
                skipped += problems
        return models, skipped

    # ------------------------------------------------------------------------------------------------ one file

    def _look(self, kind: str, file: ModelFile) -> tuple[tuple[ModelInfo, ...], tuple[SkippedFile, ...]]:
        name = file.name
        try:
            if not _encodable(name):
                raise XditError(
                    Code.FILE_REFUSED, "Its name is not UTF-8, so no client can name it; rename it."
                )
            if file.problem is not None:
                raise file.problem
            if kind not in PARTS:
                raise _kind_not_built(kind)
            stamp = _stamp(kind, file.path)
            parts = self._recognise(kind, name, file.path, stamp)
        except OSError as error:
            problem = XditError(Code.MODEL_NOT_VISIBLE, f"It cannot be opened: {error.strerror}.")
            return (), (_skipped(kind, name, problem),)
        except XditError as error:
            return (), (_skipped(kind, name, error),)
        infos = tuple(
            _info(kind, name, part, stamp.size, recognised)
            for part, recognised in parts.items()
            if isinstance(recognised, Recognised)
        )
        return infos, tuple(_skipped(kind, name, error) for error in _worth_saying(parts))

    def _choose(self, kind: str, ref: ModelRef) -> tuple[str, _Stamp]:
        """The first file of that name, and of that size where one is given."""
        sizes = []
        for path in self.roots.candidates(kind, ref.name):
            try:
                stamp = _stamp(kind, path)
            except OSError:  # gone since it was found
                continue
            if ref.size is None or ref.size == stamp.size:
                return path, stamp
            sizes.append(stamp.size)
        if not sizes:
            raise self.roots.not_visible(kind, ref.name)
        raise XditError(
            Code.MODEL_NOT_VISIBLE,
            f"{kind}/{shown(ref.name)} has {ref.size} bytes where you are, but {sizes[0]} in the daemon's model "
            "folders: it is another file of that name. Give both the same file.",
            sizes=sizes,
        )

    def _recognise(self, kind: str, name: str, path: str, stamp: _Stamp) -> dict[str, Recognised | XditError]:
        """By part. What a file said once is kept until the file changes, refusals too."""
        key = (kind, path)
        seen = self._seen.get(key)
        if seen is None or seen.stamp != stamp:
            seen = _Seen(stamp, _read(kind, name, path))
            if len(self._seen) >= MAX_REMEMBERED:
                self._seen.clear()
            self._seen[key] = seen
        return seen.parts


def _read(kind: str, name: str, path: str) -> dict[str, Recognised | XditError]:
    try:
        if os.path.isdir(path) and folders.is_pipeline(os.listdir(path), kind):
            return _read_pipeline(kind, name, path)
        header = read_weights(path, f"{kind}/{name}")
    except OSError as error:
        problem = XditError(Code.MODEL_NOT_VISIBLE, f"{kind}/{shown(name)} cannot be read: {error.strerror}.")
        return dict.fromkeys(PARTS[kind], problem)
    except XditError as error:
        return dict.fromkeys(PARTS[kind], _anew(error))
    return _recognised(kind, header)


def _recognised(kind: str, header: Header) -> dict[str, Recognised | XditError]:
    parts: dict[str, Recognised | XditError] = {}
    for part in PARTS[kind]:
        try:
            parts[part] = lora_fit.recognise(header) if kind == LORAS else recognise(header, part)
        except XditError as error:
            parts[part] = _anew(error)
    return parts


def _read_pipeline(kind: str, name: str, path: str) -> dict[str, Recognised | XditError]:
    """Each part from the folder that the pipeline has for it.

    Which text encoder a folder has is told by its keys. Where those cannot be read, it may be any that is missing: each of
    these then says why.
    """
    listed = pipelines.parts(path, f"{kind}/{name}")
    missing = XditError(
        Code.UNKNOWN_FAMILY,
        f"{kind}/{shown(name)} is a pipeline without this part; it has {', '.join(listed)}.",
    )
    parts: dict[str, Recognised | XditError] = dict.fromkeys(PARTS[kind], missing)
    with_bert = "BertModel" in listed.values()
    unread: list[XditError] = []
    for below in listed:
        part = pipelines.PARTS.get(below, "text_encoder")
        try:
            header = read_weights(os.path.join(path, below), f"{kind}/{name}/{below}")
            found: Recognised | XditError = replace(recognise(header, part), below=below)
        except XditError as error:
            found = _anew(error)
        if part == "text_encoder" and isinstance(found, Recognised):
            part = pipelines.text_part(found.family, found.variant, with_bert)
        if part in parts:
            parts[part] = found
        elif isinstance(found, XditError):
            unread.append(found)
    if unread:
        texts = [part for part, found in parts.items() if role(part) == "text_encoder" and found is missing]
        parts |= dict.fromkeys(texts, unread[0])
    return parts


def _anew(error: XditError) -> XditError:
    """The same without its traceback, which holds headers and would grow with every raise of a kept error."""
    return XditError(error.code, error.message, **error.details)


def _worth_saying(parts: dict[str, Recognised | XditError]) -> Iterator[XditError]:
    """What to list of a file's problems: one where nothing loads, else those that are more than a missing part."""
    errors = [found for found in parts.values() if isinstance(found, XditError)]
    if len(errors) == len(parts):
        yield errors[0]
    else:
        said = {error.message: error for error in errors if error.code != Code.UNKNOWN_FAMILY}
        yield from said.values()  # each once, though several parts may have it


def _part(kind: str, ref: ModelRef) -> str:
    parts = PARTS.get(kind)
    if parts is None:
        raise _kind_not_built(kind)
    part = ref.part or parts[0]
    if part not in parts:
        raise XditError(
            Code.BAD_VALUE,
            f"A file of {kind} has no part {shown(part)!r}; it may have {', '.join(parts)}.",
        )
    return part


def _kind_not_built(kind: str) -> XditError:
    return XditError(Code.NOT_BUILT, f"This version does not load {kind}; it loads {', '.join(PARTS)}.")


def _info(kind: str, name: str, part: str, size: int, recognised: Recognised) -> ModelInfo:
    transformer = TRANSFORMERS.get(recognised.family)
    return ModelInfo(
        kind=kind,
        name=name,
        part=part,
        family=recognised.family,
        variant=recognised.variant,
        dtype=recognised.dtype,
        bytes=size,
        parameters=recognised.parameters,
        facts=dict(recognised.facts),
        noise=transformer.noise(recognised.facts) if transformer is not None else None,
    )


def _skipped(kind: str, name: str, error: XditError) -> SkippedFile:
    code = error.code.value if isinstance(error.code, Code) else error.code
    readable = name if _encodable(name) else shown(name)
    return SkippedFile(kind=kind, name=readable, code=code, message=error.message)


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stamp(kind: str, path: str) -> _Stamp:
    """Of a folder: of all that it is read from; its size is that of its safetensors files."""
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        return _Stamp(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
    seen = folders.stats(path, kind)
    last = hash(tuple((inside, each.st_size, each.st_mtime_ns, each.st_ino) for inside, each in seen))
    return _Stamp(folders.size(seen), last, status.st_ino, status.st_dev)


_ECHO_INFO = ModelInfo(
    kind=ECHO, name=ECHO, part="", family=ECHO, variant="", dtype="float32", bytes=0, parameters=0
)
