"""Searches that were made before, known by everything that their result depends on."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mis_mlx.storage import run_folder
from mis_mlx.storage.files import Files
from mis_mlx.types import MisError

Identity = Mapping[str, Any]  # settings, and parts of origin.json, by name


def identity(
    settings: Mapping[str, Any],
    origin: Mapping[str, str],
    free: frozenset[str],
) -> Identity:
    """What the result of a search depends on. free: the settings that it does not depend on.

    The flags alone do not say that: another text, or another teacher, may lie under the same path.
    """
    known = dict[str, Any]()
    for name, value in settings.items():
        if name not in free:
            known[name] = value
    for name in run_folder.WORDS:
        known[name] = origin.get(name)
    # As JSON has it, so that it equals a stored one.
    return dict(json.loads(json.dumps(known)))


def of_folder(folder: Path, free: frozenset[str]) -> Identity:
    """The identity of the search in a folder; {} where it has none that can be read."""
    with suppress(MisError):
        settings = run_folder.stored_settings(folder)
        origin = run_folder.stored_settings(folder, run_folder.ORIGIN)
        return identity(settings, origin, free)
    return {}


def beside(run: Path) -> list[Path]:
    """The folders of other searches: of runs beside this one and under runs/, and runs/search/*."""
    found = set[Path]()
    for parent in (run.parent, Path("runs")):
        found.update(parent.glob(f"*/{run_folder.SEARCH}*"))
        found.update(parent.glob(f"{run_folder.SEARCH}/*"))
    found.discard(run / run_folder.SEARCH)
    return sorted(folder for folder in found if folder.is_dir())


def result_of(folder: Path) -> dict[str, Any]:
    """The result of the search in a folder; {} where it has not ended."""
    if not (folder / run_folder.RESULT).is_file():
        return {}
    with suppress(MisError):
        return run_folder.stored_settings(folder, run_folder.RESULT)
    return {}


def ended(
    wanted: Identity,
    folders: Iterable[Path],
    free: frozenset[str],
) -> Path | None:
    """The first of these folders with a search of this identity that has ended."""
    for folder in folders:
        found = bool(result_of(folder).get("best"))
        if found and of_folder(folder, free) == wanted:
            return folder
    return None


def changed(
    wanted: Identity,
    folders: Iterable[Path],
    free: frozenset[str],
) -> str:
    """A sentence, where one of these searches differs in its teacher or text alone; else empty."""
    for folder in folders:
        before = of_folder(folder, free)
        differing = _differing(before, wanted)
        if differing and differing <= set(run_folder.WORDS):
            words = [run_folder.WORDS[name] for name in sorted(differing)]
            what = " and the ".join(words)
            return f"the {what} changed since the search in {folder}: a new search begins"
    return ""


def _differing(before: Identity, wanted: Identity) -> set[str]:
    """The names of what differs."""
    return {name for name, value in wanted.items() if before.get(name) != value}


def set_aside(folder: Path, files: Files) -> Path:
    """Give a search that is not to go on another name, beside its place; that name."""
    number = 1
    while True:
        aside = folder.with_name(f"{folder.name}-before-{number}")
        if not aside.exists():
            files.rename(folder, aside)
            return aside
        number += 1
