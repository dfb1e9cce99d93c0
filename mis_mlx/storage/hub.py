"""Where a teacher's files come from: the cache folder and the Hugging Face hub."""

import contextlib
import datetime
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mis_mlx.types import MisError

# Weights that mlx-lm would read, what describes them, the tokenizer. Nothing that can hold code.
WANTED = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "*.py", "*.bin", "*.pt", "*.onnx", "*.gguf"]
# Of these a model has at least one.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
ANSWER_S = 5.0  # the hub client has no time limit of its own for its first question
PROVENANCE = "source.json"


def cache_root() -> Path:
    """The folder for downloaded models: $MIS_MLX_CACHE, else mis_mlx in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("MIS_MLX_CACHE") or Path(user_cache, "mis_mlx")
    return Path(root).expanduser().absolute()


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache alone, after other processes. Half-made folders of earlier holders go."""
    # Not at the top: it brings MLX, and the page in the browser asks this module for a folder only.
    from mis_mlx.storage.checkpoint import lock, sweep

    remedy = "set MIS_MLX_CACHE to a folder that can be written"
    with lock(root, "the model cache", remedy, wait=True):
        sweep(root)
        yield


@contextlib.contextmanager
def install(folder: Path, nbytes: int, origin: dict[str, Any]) -> Iterator[Path]:
    """`commit_folder`, with `origin` and the time in its source.json."""
    from mis_mlx.storage.checkpoint import commit_folder  # as above

    with commit_folder(folder, nbytes) as temp:
        yield temp
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        text = json.dumps({**origin, "date": now}, indent=2)
        (temp / PROVENANCE).write_text(text + "\n")


def provenance(folder: Path) -> dict[str, Any]:
    """The folder's source.json; empty when someone else put the folder there."""
    try:
        return dict(json.loads((folder / PROVENANCE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def snapshot(repo_id: str) -> Path:
    """The newest commit of a model, in the Hugging Face cache: a folder of links, named by it.

    Without the hub (or with HF_HUB_OFFLINE) the content of that cache must do. MisError, within
    seconds, when there is neither, when the model has no safetensors weights, and when that cache
    has only a part of it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    # Bars, retries and warnings are not for the user's screen; errors still come.
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = None
        try:
            HfApi().model_info(repo_id, timeout=ANSWER_S)  # is the hub there, within a time limit?
        # Its exceptions depend on its HTTP client, and so on its version.
        except Exception as error:
            refusal = error
        local = refusal is not None
        try:
            name = snapshot_download(
                repo_id, local_files_only=local, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        except Exception as error:
            refusal = refusal or error
            reason = _short(refusal) or "no reason given"
            why = (
                f"{repo_id} could not be downloaded from the Hugging Face hub "
                f"({type(refusal).__name__}: {reason})"
            )
            raise MisError(
                f"{why}: check the name and the network, or give the path of a model folder"
            ) from None
    path = Path(name)
    if not (path / "config.json").exists() or not any(path.glob("model*.safetensors")):
        why = (
            f"{repo_id} on the Hugging Face hub has no config.json with model*.safetensors next to "
            f"it"
        )
        raise MisError(f"{why}: choose a model published as safetensors")
    _require_complete(repo_id, path)
    return path


def _require_complete(repo_id: str, path: Path) -> None:
    """MisError where a snapshot misses weights that its index lists, or a tokenizer.

    A download that was stopped, or one of the config alone, leaves a folder that looks like the
    model's; without the hub the client gives it as it is.
    """
    from mis_mlx.storage import safetensors  # as in `locked`

    missing = None
    try:
        safetensors.index(path)
    except MisError as error:
        missing = str(error)
    if not any((path / name).exists() for name in VOCABULARIES):
        missing = missing or f"it has none of {', '.join(VOCABULARIES)}"
    if missing:
        raise MisError(
            f"{repo_id} is not complete in the Hugging Face cache ({missing}): delete "
            f"{path.parents[1]}, and start again when the hub can be reached"
        )


def _short(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:160]


def upload(parts: Mapping[str, Path], repo_id: str) -> str:
    """Send files to the hub in one commit; returns its address. MisError where the hub refuses.

    parts: {path in the repository: file}.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = []
    for path, file in parts.items():
        operations.append(CommitOperationAdd(path_in_repo=path, path_or_fileobj=file))
    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        done = api.create_commit(
            repo_id=repo_id, operations=operations, commit_message="Upload with mis_mlx"
        )
        return str(done.commit_url)
    except Exception as error:  # as above
        why = f"{repo_id} was not uploaded ({type(error).__name__}: {_short(error)})"
        raise MisError(
            f"{why}, but its files are complete: `hf auth login`, then {_by_hand(parts, repo_id)}"
        ) from None


def _by_hand(parts: Mapping[str, Path], repo_id: str) -> str:
    """The commands that send the folders of these files."""
    commands = dict[str, None]()
    for path, file in parts.items():
        subfolder = Path(path).parent
        inside = "" if subfolder == Path() else f" {subfolder}"
        commands[f"`hf upload {repo_id} {file.parent}{inside}`"] = None
    return " and ".join(commands)


def adopt(snapshot: Path, folder: Path, origin: dict[str, Any]) -> None:
    """`install` a snapshot's files, as hard links or copies.

    They stay when the Hugging Face cache is emptied.
    """
    blobs = {file.name: file.resolve() for file in snapshot.iterdir()}
    disk = folder.parent.stat().st_dev
    copied_bytes = 0  # links take no space; files of another disk have to be copied
    for blob in blobs.values():
        facts = blob.stat()
        if facts.st_dev != disk:
            copied_bytes += facts.st_size
    with install(folder, copied_bytes, origin) as into:
        for name, blob in blobs.items():
            try:
                os.link(blob, into / name)
            except OSError:  # another disk, or one that has no hard links
                shutil.copyfile(blob, into / name)
