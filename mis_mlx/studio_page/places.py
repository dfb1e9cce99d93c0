"""What the page may touch: models, texts and settings that this program finds by itself.

The page names them by key. A path never comes from the browser.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mis_mlx.storage import hub
from mis_mlx.types import MisError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEEPEST = 3  # folders below this one in which texts are looked for
MOST = 300  # places of a kind
OWN_MODELS = ("mlx_model", "fused_model", "model")  # where mlx_lm's commands write
SKIPPED = ("node_modules", "site-packages", "__pycache__")


@dataclass(frozen=True)
class Place:
    """A folder or file that was found. key: how the page names it. nbytes: of weights."""

    key: str
    label: str
    path: Path
    nbytes: int = 0


def chosen(places: Iterable[Place], key: object, what: str) -> Place:
    """The place of this key. MisError where the page names one that was not found."""
    for place in places:
        if place.key == key:
            return place
    raise MisError(f"this {what} was not found here: choose one of the list")


def _key(path: Path) -> str:
    """The same for a path whatever else is found."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _weights(folder: Path) -> int:
    """Bytes of a model folder's safetensors; 0: it is none."""
    if not (folder / "config.json").is_file():
        return 0
    total = 0
    for file in folder.glob("*.safetensors"):
        if file.is_file():
            total += file.stat().st_size
    return total


def _folders(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(path for path in root.glob(pattern) if path.is_dir())
    except OSError:
        return []


def _candidates(more: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """(label, folder) of everything that may be a model."""
    for folder in _folders(Path("runs"), "[!.]*/model"):
        yield f"run {folder.parent.name}", folder
    for name in OWN_MODELS:
        yield f"{name} in this folder", Path(name)
    for folder in _folders(Path("exported"), "*"):
        yield f"exported/{folder.name}", folder
    for folder in _folders(hub.cache_root(), "*"):
        yield f"{folder.name.replace('--', '/')} (mis_mlx's cache)", folder
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub_cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    for folder in _folders(hub_cache, "models--*/snapshots/*"):
        repository_name = folder.parents[1].name.removeprefix("models--")
        name = repository_name.replace("--", "/")
        revision = folder.name[:7]
        yield f"{name} (Hugging Face cache, {revision})", folder
    # LM Studio's, the present place first.
    for name in ("~/.lmstudio/models", "~/.cache/lm-studio/models"):
        for folder in _folders(Path(name).expanduser(), "*/*"):
            yield f"{folder.parent.name}/{folder.name} (LM Studio)", folder
    for root in more:
        yield str(root), root
        for folder in _folders(root, "*"):
            yield str(folder), folder


def models(more: Sequence[Path] = ()) -> list[Place]:
    """Model folders with weights: our runs, mlx-lm's, caches, LM Studio's, and below `more`."""
    found = dict[Path, Place]()
    for label, folder in _candidates(more):
        path = folder.absolute()
        nbytes = _weights(path)
        if nbytes and path not in found:
            found[path] = Place(_key(path), label, path, nbytes)
        if len(found) == MOST:
            break
    return list(found.values())


def texts() -> list[Place]:
    """Folders with a train.jsonl, as mlx-lm has it, at most DEEPEST folders below this one."""
    found = list[Place]()
    here = Path.cwd()
    for name, inner, files in os.walk(here):
        folder = Path(name)
        depth = len(folder.relative_to(here).parts)
        inner[:] = _looked_into(inner) if depth < DEEPEST else []
        if "train.jsonl" in files and len(found) < MOST:
            found.append(Place(_key(folder), str(folder.relative_to(here)), folder))
    return found


def _looked_into(names: Sequence[str]) -> list[str]:
    """The folders of these names that may hold a user's text."""
    found = []
    for name in sorted(names):
        if not name.startswith(".") and name not in SKIPPED:
            found.append(name)
    return found


def settings_files() -> list[Place]:
    """YAML files right in this folder, which `-c` takes."""
    found = []
    for path in sorted(Path().glob("*.yaml"))[:MOST]:
        if path.is_file() and not path.is_symlink():
            found.append(Place(_key(path.absolute()), path.name, path.absolute()))
    return found


def hub_id(text: object) -> str:
    """An `owner/model` of the Hugging Face hub. MisError for anything else, such as a path here."""
    name = str(text or "").strip()
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise MisError(f"{name[:80]!r} is not a model of the Hugging Face hub: write owner/model")
    if os.path.lexists(name):
        raise MisError(f"{name} is a folder here: choose it in the list, or write another model")
    return name
