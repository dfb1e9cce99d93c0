"""Logs of searches, kept for the next one: what each of a teacher's axes costs.

A search for another loss or other bytes asks for the same measurements. So its run folder begins
with the logs of earlier searches, of the same teacher and text, whatever their seed was. For the
default teacher and the built-in text the logs come with the package (benchmarks/known_losses.py).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.judge import answers, keep
from mis_mlx.pruning.vocabulary import VocabularyConfig
from mis_mlx.quantization.packed_format import SENSITIVITY
from mis_mlx.size_search.candidates import CANDIDATES, PROBES, journal_of
from mis_mlx.storage import hub, run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import Checkpoint, MisError

SHIPPED = Path(__file__).parent / "known"
ABOUT = "about.json"
# Of how losses are measured: logs of another version are not used. Since 3 other answers count as
# loops, and chat templates are told other things. The shipped logs were measured with 2: answers
# that judge the default teacher's students are the same, but 7 of its 632 conversations to learn
# from have fallen out. Since 4 no loss is that of a teacher which a probe of bits left unrounded.
VERSION = 4
LOGS = (PROBES, CANDIDATES)
FILES = (*LOGS, SENSITIVITY, ABOUT)  # all that is kept of a teacher
Identity = Mapping[str, Any]  # what a measurement depends on: `identity`


def identity(
    teacher: Checkpoint, text: str, chosen: VocabularyConfig, *, streams: bool = False
) -> dict[str, Any]:
    """What a measurement depends on. text: a fingerprint of --data, or "built-in".

    chosen: how tokens are chosen. streams: the teacher is read from disk in every pass: then bits
    alone are measured coarsely, and answers are another model's unless they came with the package.
    The number of windows changes a loss by noise alone, so a measurement with some windows is not
    repeated with others.
    """
    return {
        "version": VERSION,
        "teacher": run_folder.origin(teacher, "")["teacher"],
        "speech": keep.speech_sha256(teacher.path),
        "text": text,
        "vocab_text": chosen.vocab_text,
        "languages": list(chosen.languages),
        "own_answers": not streams or answers.shipped_for(teacher),
        "coarse": streams,
    }


def kept_folder(about: Identity) -> Path:
    """Where the logs of this identity are kept on this machine."""
    digest = json_sha256(dict(about))
    return hub.cache_root() / "searches" / digest[:32]


def all_known(about: Identity, probes: Iterable[tuple[str, float]]) -> bool:
    """Whether the losses of all these (axis, size) are known."""
    measured = set[tuple[Any, ...]]()
    for source in _sources(about):
        measured |= journal_of(source, PROBES).read().keys()
    return measured.issuperset(probes)


def _sources(about: Identity) -> list[Path]:
    """The folders with logs of this identity, the more exact ones first."""
    exact = {**about, "coarse": False}
    folders = [SHIPPED, kept_folder(exact), kept_folder(about)]
    return [folder for folder in dict.fromkeys(folders) if _about(folder) in (exact, about)]


def copy_into_run(run: Path, about: Identity) -> int:
    """Put known measurements into a run's folder; return how many lines its logs then have.

    Lines that the run has already stay.
    """
    sensitivity = run / SENSITIVITY
    for source in _sources(about):
        for name in LOGS:
            journal_of(run, name).add_missing(journal_of(source, name))
        known_sensitivity = source / SENSITIVITY
        if known_sensitivity.is_file() and not sensitivity.exists():
            DISK.replace_text(sensitivity, known_sensitivity.read_text("utf-8"))
    return sum(len(journal_of(run, name).read()) for name in LOGS)


def keep_logs(run: Path, about: Identity) -> None:
    """Add the logs of a run to those kept on this machine.

    A cache that cannot be written costs the next search its time, and this one nothing.
    """
    folder = kept_folder(about)
    try:
        DISK.make_folder(folder)
        for name in LOGS:
            journal_of(folder, name).add_missing(journal_of(run, name))
        sensitivity = run / SENSITIVITY
        if sensitivity.is_file():
            DISK.replace_text(folder / SENSITIVITY, sensitivity.read_text("utf-8"))
        # Last: a folder without it is not read.
        DISK.replace_text(folder / ABOUT, json.dumps(dict(about)))
    except (OSError, MisError) as error:
        cli.say(f"what was measured is not kept for other searches: {error}")


def _about(folder: Path) -> dict[str, Any]:
    """The identity of the logs in a folder; {} where it has none that can be read."""
    try:
        stored = (folder / ABOUT).read_text("utf-8")
        return dict(json.loads(stored))
    except (OSError, ValueError, TypeError):
        return {}
