"""What a teacher's axes cost, measured once: the logs of searches with --lose, kept for the next
one.

A search for another loss asks for the same measurements. So its run folder begins with what earlier
ones logged, of the same teacher and text, whatever their seed was. For the default teacher and the
built-in text the logs come with the package (benchmarks/known_losses.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mis_mlx.distillation.candidates import CANDIDATES, PROBES
from mis_mlx.quantization.packed_format import SENSITIVITY
from mis_mlx.storage import hub, run_folder
from mis_mlx.storage.files import DISK, Files, json_sha256
from mis_mlx.types import Checkpoint

SHIPPED = Path(__file__).parent / "known"
ABOUT = "about.json"
VERSION = 1  # of how losses are measured: logs of another version are not used
LOGS = (PROBES, CANDIDATES)
# Settings that change what is lost. How many windows look at the text changes it by its noise
# alone, so what was measured with some is not measured again with others.
MEASURED_BY = ("vocab_text", "languages")


def identity(teacher: Checkpoint, text: str, settings: Any) -> dict[str, Any]:
    """What a measurement depends on. text: a fingerprint of --data, or "built-in"."""
    given = asdict(settings)
    measured_by = {name: given[name] for name in MEASURED_BY}
    whose = run_folder.origin(teacher, "")["teacher"]
    # As JSON has it, so that a stored one compares.
    return dict(
        json.loads(json.dumps({"version": VERSION, "teacher": whose, "text": text, **measured_by}))
    )


def kept_folder(about: Mapping[str, Any]) -> Path:
    """Where the logs of this identity are kept on this machine."""
    return hub.cache_root() / "searches" / json_sha256(dict(about))[:32]


def known(about: Mapping[str, Any], log: str) -> list[dict[str, Any]]:
    """The records of one log that came with the package or are kept on this machine."""
    found = list[dict[str, Any]]()
    for source in (SHIPPED, kept_folder(about)):
        if _about(source) == about:
            found += run_folder.records(source / log)
    return found


def lay_out(run: Path, about: Mapping[str, Any], files: Files) -> int:
    """Put what is known into a run's folder: the number of lines of its logs then. What stands
    there already stays.
    """
    for source in (SHIPPED, kept_folder(about)):
        if _about(source) != about:
            continue
        for name in LOGS:
            _add_lines(source / name, run / name, files)
        if (source / SENSITIVITY).is_file() and not (run / SENSITIVITY).exists():
            files.replace_text(run / SENSITIVITY, (source / SENSITIVITY).read_text("utf-8"))
    return sum(len(run_folder.records(run / name)) for name in LOGS)


def keep(run: Path, about: Mapping[str, Any]) -> None:
    """Add the logs of a run to what is kept on this machine."""
    folder = kept_folder(about)
    DISK.make_folder(folder)
    for name in LOGS:
        _add_lines(run / name, folder / name, DISK)
    if (run / SENSITIVITY).is_file():
        DISK.replace_text(folder / SENSITIVITY, (run / SENSITIVITY).read_text("utf-8"))
    # Last: a folder without it is not read.
    DISK.replace_text(folder / ABOUT, json.dumps(dict(about)))


def _about(folder: Path) -> dict[str, Any]:
    """The identity of the logs in a folder; {} where it has none that reads."""
    try:
        return dict(json.loads((folder / ABOUT).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _add_lines(source: Path, target: Path, files: Files) -> None:
    """Append the records of one log that the other one lacks."""
    there = {json.dumps(record, sort_keys=True) for record in run_folder.records(target)}
    for record in run_folder.records(source):
        if json.dumps(record, sort_keys=True) not in there:
            files.append(target, json.dumps(record))
