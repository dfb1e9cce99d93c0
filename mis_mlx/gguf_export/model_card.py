"""The model card of an exported model, README.md on the Hugging Face hub."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mis_mlx.models import arch, config, model_writer, resolve
from mis_mlx.reporting import html
from mis_mlx.storage import hub, run_folder
from mis_mlx.types import Checkpoint

STAGES = ("model", "distilled", "pruned")  # the folders of a run
# settings of a run that the card shows
TOLD = (
    "scenario",
    "vocab",
    "languages",
    "importance",
    "iters",
    "learning_rate",
    "max_seq_length",
    "reconstruct_samples",
    "quantize",
)


def run_of(folder: Path) -> Path | None:
    """The run folder that a model folder lies in, if it does."""
    run = folder.resolve().parent
    if folder.name in STAGES and (run / run_folder.CONFIG).is_file():
        return run
    return None


def name_of(folder: Path) -> str:
    """What to call the model: its folder's name, or its run's.

    A run's stage is added, unless it is the last one.
    """
    run = run_of(folder)
    if run is None:
        return folder.resolve().name
    return run.name if folder.name == "model" else f"{run.name}-{folder.name}"


def base_of(folder: Path) -> str | None:
    """The hub id of the model that a run began with, or of the cached model itself.

    None if it is unknown.
    """
    if folder.parent == hub.cache_root():
        if "--" not in folder.name:
            return resolve.DEFAULT
        return folder.name.replace("--", "/", 1)
    run = run_of(folder)
    if run is None:
        return None
    stored = run_folder.stored_settings(run)
    base = stored.get("teacher")
    if "model" in stored:  # an aligned model's run begins at a model
        base = stored["model"]
    if base is None:
        return resolve.DEFAULT
    if Path(base).is_dir():
        return base_of(Path(base))
    return base if resolve.REPO_ID.fullmatch(base) else None


def readme(
    checkpoint: Checkpoint,
    base: str | None,
    file: str,
    facts: Sequence[str],
    *,
    licence: str = "",
) -> str:
    """README.md: base, recipe, the run's table, use, licence.

    file: the GGUF's name; "" for a Hugging Face folder.
    """
    if not licence and base == resolve.DEFAULT:
        licence = "apache-2.0"
    front = {
        "base_model": base,
        "license": licence,
        "library_name": "gguf" if file else "transformers",
        "tags": ["mis_mlx"],
        "pipeline_tag": "text-generation",
    }
    stated = {key: value for key, value in front.items() if value}
    data = checkpoint.path / run_folder.DATA
    size = f"{arch.params(checkpoint.config) / 1e6:.1f} million parameters"
    values = {
        "front": yaml.safe_dump(stated, sort_keys=False).strip(),
        "name": name_of(checkpoint.path),
        "base": base,
        "size": f"{size}: {config.shape_of(checkpoint.config)}",
        "facts": facts,
        "data": json.loads(data.read_text("utf-8")) if data.is_file() else None,
        **_of_run(checkpoint.path),
        "file": file,
    }
    return html.document("model_card.md", values) + "\n"


def _of_run(folder: Path) -> dict[str, Any]:
    """What the card says of pruning, settings and results of the run that the model is of."""
    run = run_of(folder)
    folders = [folder]
    settings = None
    table = ""
    if run:
        stored = run_folder.stored_settings(run)
        settings = {key: stored[key] for key in TOLD if stored.get(key) not in (None, [])}
        folders += [run / stage for stage in STAGES]
        path = run / "table.md"
        if path.is_file():
            table = path.read_text("utf-8").strip()
    keep = next(filter(None, map(model_writer.read_keep, folders)), None)
    return {"keep": keep, "settings": settings, "table": table}
