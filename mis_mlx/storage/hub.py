"""Where a teacher's files come from: the cache folder and the Hugging Face hub."""

import contextlib
import datetime
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mis_mlx.storage.checkpoint import commit_folder, lock, sweep
from mis_mlx.storage.files import DISK
from mis_mlx.types import MisError

# Weights that mlx-lm would read, what describes them, the tokenizer. Nothing that can hold code.
WANTED = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "*.py", "*.bin", "*.pt", "*.onnx", "*.gguf"]
ANSWER_S = 5.0  # the hub client has no time limit of its own for its first question
PROVENANCE = "source.json"


def cache_root() -> Path:
    """The folder for downloaded models: $MIS_MLX_CACHE, else mis_mlx in the user's cache folder."""
    own = os.environ.get("MIS_MLX_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mis_mlx"
    )
    return Path(own).expanduser().absolute()


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache alone, after other processes; what an earlier holder left half-made is swept
    away.
    """
    with lock(
        root, "the model cache", "set MIS_MLX_CACHE to a folder that can be written", wait=True
    ):
        sweep(root)
        yield


@contextlib.contextmanager
def install(folder: Path, nbytes: int, origin: dict[str, Any]) -> Iterator[Path]:
    """`commit_folder`, with `origin` and the time in its source.json."""
    with commit_folder(folder, DISK, nbytes) as temp:
        yield temp
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        (temp / PROVENANCE).write_text(json.dumps({**origin, "date": now}, indent=2) + "\n")


def provenance(folder: Path) -> dict[str, Any]:
    """The folder's source.json; empty when someone else put the folder there."""
    try:
        return dict(json.loads((folder / PROVENANCE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def snapshot(repo_id: str) -> Path:
    """The newest commit of a model: a folder of links, named by the commit, in the Hugging Face
    cache.

    Without the hub (or with HF_HUB_OFFLINE) what that cache holds will do. MisError, within
    seconds, when there is neither, and when the model has no safetensors weights.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    # bars, retries and warnings are not for the user's screen; errors still come
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = None
        try:
            HfApi().model_info(repo_id, timeout=ANSWER_S)  # is the hub there, within a time limit?
        # which HTTP client, and so which exceptions, depends on the version
        except Exception as error:
            refusal = error
        local = refusal is not None
        try:
            name = snapshot_download(
                repo_id, local_files_only=local, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        except Exception as error:
            refusal = refusal or error
            reason = " ".join(str(refusal).split())[:160] or "no reason given"
            why = (
                f"{repo_id} did not come from the Hugging Face hub ({type(refusal).__name__}: "
                f"{reason})"
            )
            raise MisError(
                f"{why}: check the name and the network, or give the path of a model folder"
            ) from None
    path = Path(name)
    if not (path / "config.json").exists() or not any(path.glob("model*.safetensors")):
        why = (
            f"{repo_id} on the Hugging Face hub has no config.json with model*.safetensors "
            f"beside it"
        )
        raise MisError(f"{why}: choose a model published as safetensors")
    return path


def upload(folder: Path, repo_id: str) -> str:
    """The address of a folder's files on the hub, where they are sent to. MisError where it
    refuses: they stay here.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        return str(
            HfApi().upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload with mis_mlx"
            )
        )
    except Exception as error:  # as above
        why = (
            f"{repo_id} was not uploaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]})"
        )
        raise MisError(
            f"{why}: {folder} is whole: `hf auth login`, then `hf upload {repo_id} {folder}`"
        ) from None


def adopt(snapshot: Path, folder: Path, origin: dict[str, Any]) -> None:
    """`install` a snapshot's files, which stay when the Hugging Face cache is emptied: hard links,
    or copies.
    """
    blobs = {file.name: file.resolve() for file in snapshot.iterdir()}
    apart = [s for s in map(Path.stat, blobs.values()) if s.st_dev != folder.parent.stat().st_dev]
    with install(folder, sum(s.st_size for s in apart), origin) as into:
        for name, blob in blobs.items():
            try:
                os.link(blob, into / name)
            except OSError:  # another disk, or one that has no hard links
                shutil.copyfile(blob, into / name)
