"""What a model card tells of the run that made the model: how to repeat it, on which machine it
was measured, and what the teacher and the student answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mis_mlx.models.opening import resolve
from mis_mlx.storage import run_folder
from mis_mlx.types import evenly

TALKS = 3  # prompts whose answers the card shows
TEACHER = "teacher"
FINAL_STAGE = "model"  # the folder of a run's last model
# What a search sets when it was asked for a loss or for bytes; a run that repeats it searches too.
SEARCHED = (
    "scenario",
    "layers",
    "ffn",
    "experts",
    "heads",
    "hidden",
    "vocab",
    "target_bpw",
    "q_group_size",
)
# What says where a person is or what else runs there, and a search's own forecast.
LEFT_OUT = ("altitude_m", "temperature_c", "expected_loss", "budget")


def recipe(run: Path) -> str:
    """YAML for `distill -c`: the settings of a run that differ from the defaults.

    "" where the run's log does not tell them. A path becomes its last name.
    """
    flags = _start(run).get("flags")
    if not isinstance(flags, dict):
        return ""
    told = {}
    by_search = "lose" in flags or "bytes" in flags
    for name, value in flags.items():
        if name in LEFT_OUT or (by_search and name in SEARCHED):
            continue
        told[name] = _public(value, run)
    if not told:
        return ""
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True).strip()


def machine(run: Path) -> str:
    """The device and the versions that a run's numbers are of; "" where they are not known."""
    rates = _start(run).get("rates")
    words = []
    if isinstance(rates, dict) and rates.get("device"):
        words.append(str(rates["device"]))
    versions = {}
    if (run / run_folder.ORIGIN).is_file():
        versions = run_folder.stored_settings(run, run_folder.ORIGIN)
    for name in ("mis_mlx", "mlx"):
        if name in versions:
            words.append(f"{name} {versions[name]}")
    return ", ".join(words)


def talks(run: Path, stage: str) -> list[dict[str, Any]]:
    """Held-out English prompts with the answers of the teacher and of a stage's model.

    [{"prompt", "answers": {model: text}}], the prompts evenly apart; a second turn says little
    without the first, so it is left out. [] where the run has no answers of that model.
    """
    asked = dict[str, dict[str, str]]()
    last_model = TEACHER
    for record in run_folder.records(run / run_folder.ANSWERS):
        if record.get("language") != "en" or not isinstance(record.get("text"), str):
            continue
        last_model = str(record.get("model"))
        if record.get("kind") != run_folder.LATER:
            answers = asked.setdefault(str(record.get("prompt")), {})
            answers[last_model] = _text(record)
    student = last_model if stage == FINAL_STAGE else stage
    conversations = []
    for prompt, answers in asked.items():
        if student != TEACHER and {TEACHER, student} <= answers.keys():
            both = {TEACHER: answers[TEACHER], student: answers[student]}
            conversations.append({"prompt": prompt, "answers": both})
    return list(evenly(conversations, TALKS))


def _text(record: Mapping[str, Any]) -> str:
    """An answer; an ellipsis follows where the model was cut off."""
    text = str(record["text"]).strip()
    if record.get("ended"):
        return text
    return f"{text} …"


def _start(run: Path) -> Mapping[str, Any]:
    """The first line of a run's phases."""
    return next(iter(run_folder.records(run / run_folder.PHASES)), {})


def is_hub_id(run: Path, name: str) -> bool:
    """Whether a run took this teacher or text from the hub. A folder may look like an owner/model.

    Only `distill` writes down which they are; of others the cache knows.
    """
    known = _start(run).get("hub_ids")
    if isinstance(known, list):
        return name in known
    return resolve.came_from_hub(name)


def _public(value: Any, run: Path) -> Any:
    """A setting as others may see it: of a path the last name, wherever it begins."""
    if isinstance(value, list):
        return [_public(each, run) for each in value]
    if not isinstance(value, str) or is_hub_id(run, value):
        return value
    return Path(value).name or value
