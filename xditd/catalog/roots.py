"""Model roots: the folders that models of each kind lie in, named and searched as ComfyUI does.

Knows paths and links, and not what is in a file. Whether a link may lead out of the roots is decided here, once:
docs/decisions/0002-symlinks-in-model-roots.md says why.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xditd.catalog.extra_paths import read_extra_paths
from xditd.catalog.sentences import shown
from xditd.protocol import folders
from xditd.protocol.errors import Code, XditError

ALIASES = {
    "unet": "diffusion_models",
    "clip": "text_encoders",
    "unet_gguf": "diffusion_models",  # of the node pack ComfyUI-GGUF
    "clip_gguf": "text_encoders",
}
"""Other names of kinds: ComfyUI's older ones, and those of a node pack."""

COMFYUI_FOLDERS: dict[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("unet", "diffusion_models"),
    "vae": ("vae",),
    "text_encoders": ("text_encoders", "clip"),
    "loras": ("loras",),
}
"""By kind: folders below a ComfyUI's models/, in its order of search."""

KINDS = tuple(COMFYUI_FOLDERS)

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".bin", ".pth", ".pkl", ".gguf")
"""What ComfyUI lists as model files (and .gguf, which a node pack of it does)."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file below a root, a folder that is one model, or a folder or link that is not looked into.

    Attributes:
        name: as ComfyUI lists it: relative to its root, with "/"; of a model in a folder, the folder's.
        path: with all links resolved; "" where there is a problem.
        problem: why it is not looked into.
    """

    name: str
    path: str = ""
    problem: XditError | None = None


@dataclass(frozen=True, slots=True)
class Roots:
    """Folders by kind, in the order of search.

    Attributes:
        by_kind: they need not exist yet.
        follow_symlinks: whether a link below a root may lead out of all of them.
        user: the name of the user that the daemon runs as, for sentences.
    """

    by_kind: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    follow_symlinks: bool = False
    user: str = ""

    def folders(self, kind: str = "") -> tuple[Path, ...]:
        """The folders of a kind, under any of its names; of "" all there are, each once."""
        if kind:
            return self.by_kind.get(ALIASES.get(kind, kind), ())
        return tuple(dict.fromkeys(folder for folders in self.by_kind.values() for folder in folders))

    def candidates(self, kind: str, name: str) -> list[str]:
        """Every file that the name may mean, best first, with links resolved.

        Raises:
            XditError: `bad_value` for a kind or a name that cannot be, `file_refused` for a link that leads out of
                the roots, `model_not_visible` where there is no such file or it is out of the user's reach.
        """
        kind = canonical(kind)
        parts = _parts(name)
        found: list[str] = []
        problem: XditError | None = None
        for folder in self.folders(kind):
            path = folder.joinpath(*parts)
            try:
                status = os.stat(path)
            except OSError as error:
                if isinstance(error, PermissionError):
                    problem = self._out_of_reach(kind, name, path, error)
                continue
            if stat.S_ISDIR(status.st_mode):
                problem = self._folder_problem(kind, name, path)
                if problem is None:
                    found.append(os.path.realpath(path))
            elif self.allows(path):
                found.append(os.path.realpath(path))
            else:
                problem = self.leads_out(kind, name)
        if found:
            return found
        raise problem or self.not_visible(kind, name)

    def resolve(self, kind: str, name: str) -> str:
        """The path of a model file, with links resolved.

        Raises:
            XditError: as `candidates`.
        """
        return self.candidates(kind, name)[0]

    def files(self, kind: str) -> Iterator[ModelFile]:
        """Every model file of a kind, sorted by name within its root; of equal names the first root's alone."""
        seen: set[str] = set()
        for folder in self.folders(kind):
            for file in sorted(self._walk(kind, folder), key=lambda file: file.name):
                if file.name not in seen:
                    seen.add(file.name)
                    yield file

    def _walk(self, kind: str, root: Path) -> Iterator[ModelFile]:
        """Every folder is walked once, by its own name rather than a link's: links may form cycles."""
        seen: set[tuple[int, int]] = set()
        waiting = deque([""])
        while waiting:
            below = waiting.popleft()
            try:
                status = os.stat(root / below)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(root / below) as scanned:
                    entries = list(scanned)
                names = [entry.name for entry in entries]
                whole = bool(below) and folders.is_model(names, kind)
                if whole:
                    problem = self._folder_problem(kind, below, root / below)
                    path = "" if problem else os.path.realpath(root / below)
                    yield ModelFile(below, path, problem)
                if not whole or not folders.is_pipeline(names, kind):
                    for entry in entries:
                        name = f"{below}/{entry.name}" if below else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            if entry.name != ".git":
                                waiting.appendleft(name)
                        elif entry.is_dir():
                            if self.allows(root / name):
                                waiting.append(name)
                            else:
                                yield ModelFile(name, problem=self.leads_out(kind, name))
                        elif not whole and entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                            yield self._file(kind, name, root / name)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it need not be there yet, or was removed just now
            except OSError as error:
                yield ModelFile(below or ".", problem=self._out_of_reach(kind, below, root / below, error))

    def _folder_problem(self, kind: str, name: str, path: Path) -> XditError | None:
        """Why a folder is not one model, or is not to be read; None where it is."""
        try:
            if not folders.is_model(os.listdir(path), kind):
                return XditError(
                    Code.FILE_INVALID,
                    f"{kind}/{shown(name)} is a folder, but no model: it needs a model_index.json, or a config.json beside "
                    "one safetensors file or an index of several.",
                )
            inside = [path, *map(Path, folders.contents(os.fspath(path), kind))]
        except OSError as error:
            return self._out_of_reach(kind, name, path, error)
        return None if all(self.allows(each) for each in inside) else self.leads_out(kind, name)

    def _file(self, kind: str, name: str, path: Path) -> ModelFile:
        if self.allows(path):
            return ModelFile(name, os.path.realpath(path))
        return ModelFile(name, problem=self.leads_out(kind, name))

    def allows(self, path: Path) -> bool:
        """Whether links on the way to a path stay within the roots, or may leave them."""
        if self.follow_symlinks:
            return True
        real = os.path.realpath(path)
        return any(_within(real, os.path.realpath(root)) for root in self.folders())

    def leads_out(self, kind: str, name: str) -> XditError:
        """What to raise for a link that is not allowed."""
        return XditError(
            Code.FILE_REFUSED,
            f"{kind}/{shown(name)} is, or lies below, a link that leads out of the model folders; add the folder that "
            "it leads to, or set models.follow_symlinks = true.",
        )

    def not_visible(self, kind: str, name: str) -> XditError:
        """No such file: which folders were searched, and as whom."""
        searched = (
            ", ".join(str(folder) for folder in self.folders(kind)) or "none is configured for this kind"
        )
        return XditError(
            Code.MODEL_NOT_VISIBLE,
            f"There is no {kind}/{shown(name)} in the daemon's model folders ({searched}), as user {self.user} sees "
            "them; put it there, or add its folder to the daemon's configuration.",
            roots=[str(folder) for folder in self.folders(kind)],
            user=self.user,
        )

    def _out_of_reach(self, kind: str, name: str, path: Path, error: OSError) -> XditError:
        return XditError(
            Code.MODEL_NOT_VISIBLE,
            f"{kind}/{shown(name)} cannot be seen: user {self.user}, whom the daemon runs as, cannot look at {path}: "
            f"{error.strerror}; give that user access.",
            roots=[str(folder) for folder in self.folders(kind)],
            user=self.user,
        )


def canonical(kind: str) -> str:
    """The kind's name of today: "diffusion_models" for "unet".

    Raises:
        XditError: `bad_value`.
    """
    today = ALIASES.get(kind, kind)
    if today not in KINDS:
        raise XditError(
            Code.BAD_VALUE,
            f"There is no kind of model {shown(kind)!r}; there are {', '.join((*KINDS, *ALIASES))}.",
        )
    return today


def model_roots(
    *,
    folders: Mapping[str, Iterable[str | Path]] | None = None,
    comfyui: str | Path | None = None,
    extra_model_paths: Iterable[str | Path] = (),
    follow_symlinks: bool = False,
    user: str = "",
) -> Roots:
    """The roots that a configuration names.

    Args:
        folders: kind to folders, searched first.
        comfyui: a ComfyUI folder: its models/ and, where there is one, its extra_model_paths.yaml.
        extra_model_paths: further files in that format.
        follow_symlinks: whether links below a root may lead out of all of them.
        user: the name of the user that the daemon runs as.

    Raises:
        XditError: `bad_config` for a kind that ComfyUI has not, or a file that is not of its format.
    """
    ordered: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    extras = [Path(path) for path in extra_model_paths]
    if comfyui:
        base = Path(os.path.expanduser(comfyui)).absolute()
        for kind, names in COMFYUI_FOLDERS.items():
            ordered[kind] += [base / "models" / name for name in names]
        own = base / "extra_model_paths.yaml"
        try:
            os.stat(own)
            extras.insert(0, own)
        except (FileNotFoundError, NotADirectoryError):
            pass  # most have none
        except OSError as error:  # who must not look there would miss its folders without a word
            raise XditError(
                Code.BAD_CONFIG, f"models.comfyui: user {user} cannot look into {base}: {error.strerror}."
            ) from error
    for path in extras:
        for extra in read_extra_paths(path):
            kind = ALIASES.get(extra.kind, extra.kind)
            if kind in ordered:  # the file names kinds of ComfyUI that are no concern of ours, too
                _place(ordered[kind], extra.folder, first=extra.first)
    for kind, paths in (folders or {}).items():
        if ALIASES.get(kind, kind) not in KINDS:
            raise XditError(
                Code.BAD_CONFIG,
                f"models.folders: there is no kind of model {kind!r}; there are {', '.join((*KINDS, *ALIASES))}.",
            )
        for path in reversed([Path(os.path.expanduser(p)).absolute() for p in paths]):
            _place(ordered[ALIASES.get(kind, kind)], path, first=True)
    return Roots(
        by_kind={kind: tuple(paths) for kind, paths in ordered.items()},
        follow_symlinks=follow_symlinks,
        user=user,
    )


def _place(folders: list[Path], folder: Path, *, first: bool) -> None:
    """As ComfyUI adds one: a default goes to the front, another to the end, where it is not there yet."""
    if folder in folders:
        if not first:
            return
        folders.remove(folder)
    folders.insert(0 if first else len(folders), folder)


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a relative name; nothing else is one."""
    parts = tuple(name.split("/"))
    encodable = name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)
    if "\0" in name or not encodable or any(part in ("", ".", "..") for part in parts):
        raise XditError(
            Code.BAD_VALUE,
            f"The name {shown(name)!r} is not that of a file below a model folder, like "
            '"flux/dev.safetensors".',
        )
    return parts


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
