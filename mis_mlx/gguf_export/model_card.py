"""The model card of an exported model, README.md on the Hugging Face hub."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from mis_mlx.models import arch, config, model_writer, resolve
from mis_mlx.reporting import html
from mis_mlx.storage import hub, run_folder
from mis_mlx.types import Checkpoint

STAGES = ("model", "distilled", "pruned")  # the folders of a run
TOLD = (
    "scenario vocab languages importance iters learning_rate max_seq_length "
    "reconstruct_samples "
    "quantize"
)


def run_of(folder: Path) -> Path | None:
    """The run folder that a model folder lies in, if it does."""
    run = folder.resolve().parent
    return run if folder.name in STAGES and (run / run_folder.CONFIG).is_file() else None


def name_of(folder: Path) -> str:
    """What to call the model: its folder's name, or its run's (and the stage, unless it is the last
    one).
    """
    run = run_of(folder)
    if run is None:
        return folder.resolve().name
    return run.name if folder.name == "model" else f"{run.name}-{folder.name}"


def base_of(folder: Path) -> str | None:
    """The hub id of the teacher of the run that a model came from, or of the cached model itself;
    None if unknown.
    """
    if folder.parent == hub.cache_root():
        return folder.name.replace("--", "/", 1) if "--" in folder.name else resolve.DEFAULT
    if (run := run_of(folder)) is None:
        return None
    stored = run_folder.stored_settings(run)
    # an aligned model's begins at a model
    named = stored["model"] if "model" in stored else stored.get("teacher")
    if named is not None and Path(named).is_dir():
        return base_of(Path(named))
    return resolve.DEFAULT if named is None else named if resolve.REPO_ID.fullmatch(named) else None


def readme(
    checkpoint: Checkpoint, base: str | None, file: str, facts: Sequence[str], licence: str = ""
) -> str:
    """README.md: base, recipe, the run's table, use, licence. file: the GGUF's name, if there is
    one.
    """
    run = run_of(checkpoint.path)
    library = "gguf" if file else "transformers"
    known = licence or ("apache-2.0" if base == resolve.DEFAULT else "")
    front = {"base_model": base, "license": known, "library_name": library, "tags": ["mis_mlx"],
             "pipeline_tag": "text-generation"}  # fmt: skip
    data = checkpoint.path / run_folder.DATA
    table = run / "table.md" if run else None
    stored = run_folder.stored_settings(run) if run else {}
    folders = [checkpoint.path, *(run / stage for stage in STAGES if run)]
    values = {
        "front": yaml.safe_dump(
            {key: value for key, value in front.items() if value}, sort_keys=False
        ).strip(),
        "name": name_of(checkpoint.path),
        "base": base,
        "size": f"{arch.params(checkpoint.config) / 1e6:.1f} million parameters: "
        f"{config.shape_of(checkpoint.config)}",
        "facts": facts,
        "data": json.loads(data.read_text("utf-8")) if data.is_file() else None,
        "keep": next(filter(None, map(model_writer.read_keep, folders)), None),
        "settings": {k: stored[k] for k in TOLD.split() if stored.get(k) not in (None, [])}
        if run
        else None,
        "table": table.read_text("utf-8").strip() if table and table.is_file() else "",
        "file": file,
    }
    return html.document("model_card.md", values) + "\n"
