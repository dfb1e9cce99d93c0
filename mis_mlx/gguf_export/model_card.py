"""The model card of an exported model, README.md on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mis_mlx.gguf_export import run_facts
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import resolve
from mis_mlx.models.writing import model_writer
from mis_mlx.reporting import html
from mis_mlx.storage import hub, run_folder
from mis_mlx.types import Checkpoint, MisError

STAGES = ("model", "distilled", "pruned")  # the folders of a run
DENSE_TYPES = ("F32", "F16", "BF16")  # how the name of a GGUF ends whose numbers are not packed
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
    if folder.name in STAGES and (run / run_folder.ASKED).is_file() and run_folder.is_decided(run):
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
    if resolve.REPO_ID.fullmatch(base) and run_facts.is_hub_id(run, base):
        return str(base)
    return None


def readme(
    checkpoint: Checkpoint,
    base: str | None,
    file: str,
    facts: Sequence[str],
    *,
    license: str = "",
    repository: str = "",
) -> str:
    """README.md: base, recipe, the run's answers and table, use, license.

    file: the GGUF's name; "" for a Hugging Face folder. repository: the hub's, where the packed
    model goes there too; "" where nothing or only this folder is uploaded.
    """
    run_values = _of_run(checkpoint.path)
    if not license and base == resolve.DEFAULT:
        license = "apache-2.0"
    run = run_of(checkpoint.path)
    is_changed = run_values["keep"] is not None
    if run is not None:  # of `sft`, `dpo` or `grpo`
        is_changed |= "model" in run_folder.stored_settings(run)
    front = {
        "base_model": base,
        "base_model_relation": _relation(checkpoint, file, is_changed=is_changed) if base else None,
        "license": license,
        **_library(file, with_mlx=bool(repository)),
        "pipeline_tag": "text-generation",
    }
    stated = {key: value for key, value in front.items() if value}
    size = f"{arch.params(checkpoint.config) / 1e6:.1f} million parameters"
    values = {
        "front": yaml.safe_dump(stated, sort_keys=False).strip(),
        "name": name_of(checkpoint.path),
        "base": base,
        "size": f"{size}: {shape_of(checkpoint.config)}",
        "facts": facts,
        "data": _data(checkpoint.path),
        **run_values,
        "file": file,
        "repository": repository,
    }
    return html.document("model_card.md", values) + "\n"


def _data(folder: Path) -> dict[str, Any] | None:
    """What the data of an alignment were; None where data.json is missing, or not a run's."""
    try:
        data = run_folder.stored_settings(folder, run_folder.DATA)
    except MisError:
        return None
    ours = {"train_rows", "source", "licence", "pii_removed"} <= set(data)
    return data if ours and isinstance(data["pii_removed"], dict) else None


def _library(file: str, *, with_mlx: bool) -> dict[str, Any]:
    """The card's library and tags. file: the GGUF's name; "" for a Hugging Face folder."""
    tags = ["mis_mlx"]
    if file:
        tags.insert(0, "gguf")
    if with_mlx:
        tags.insert(0, "mlx")
    library = "transformers"
    if file:
        library = "mlx" if with_mlx else "gguf"
    return {"library_name": library, "tags": tags}


def _relation(checkpoint: Checkpoint, file: str, *, is_changed: bool) -> str | None:
    """How the hub files the model under its base.

    is_changed: pruned or trained. The hub has no word of its own for a pruned model, and files it
    under finetunes. None: the weights were only converted.
    """
    if is_changed:
        return "finetune"
    dense = any(file.endswith(f"-{kind}.gguf") for kind in DENSE_TYPES)
    is_rounded = bool(file) and not dense
    return "quantized" if is_rounded or arch.is_quantized(checkpoint.tensors) else None


def _of_run(folder: Path) -> dict[str, Any]:
    """What the card says of pruning, settings, answers and results of the run that the model is
    of.
    """
    run = run_of(folder)
    folders = [folder]
    values: dict[str, Any] = {
        "settings": None,
        "table": "",
        "talks": [],
        "recipe": "",
        "machine": "",
    }
    if run:
        stored = run_folder.stored_settings(run)
        folders += [run / stage for stage in STAGES]
        path = run / "table.md"
        if path.is_file():
            values["table"] = path.read_text("utf-8").strip()
        values |= {
            "settings": {key: stored[key] for key in TOLD if stored.get(key) not in (None, [])},
            "talks": run_facts.talks(run, folder.name),
            "recipe": run_facts.recipe(run),
            "machine": run_facts.machine(run),
        }
    values["keep"] = next(filter(None, map(model_writer.read_keep, folders)), None)
    return values
