"""What every command promises, by being one: its help, words that it does not know, a model that is
not there, a dry run, a budget that is too small.

A command is asked because its file is there, a promise because its settings have the field. Numbers
and places are in test_flags.py; what one command alone says is with its own tests.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import __main__, flag_help
from mis_mlx.models.opening import load, model_size
from mis_mlx.storage import safetensors
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line, mostly_thorough, sentence

TOKENS = 40_000
COMMANDS = tuple(__main__.commands())


def kind_of(name: str) -> Any:
    """The settings of a command."""
    module: Any = importlib.import_module(f"mis_mlx.{name}")
    return module.Settings


def names_of(name: str) -> set[str]:
    """The fields of a command's settings."""
    return {field.name for field in fields(kind_of(name))}


Run = Callable[..., Done]
OPENS = [name for name in COMMANDS if names_of(name) & {"model", "teacher"}]
DRY = [name for name in COMMANDS if "dry_run" in names_of(name)]
# What a command needs beside a model, to have something to do.
MORE: dict[str, dict[str, Any]] = {
    "evaluate": {"tasks": ("logic",), "num_questions": 4},
    "grpo": {"max_completion_length": 32, "max_seq_length": 128},
}
ROWS = {
    "sft": {"prompt": "2 and 3 are", "completion": "5"},
    "dpo": {"prompt": "2 and 3 are", "chosen": "5", "rejected": "6"},
    "grpo": {"prompt": "2 and 3 are", "answer": "5"},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder


def made(folder: Path) -> list[str]:
    """What a command has left there."""
    return [path.name for path in sorted(folder.rglob("*"))]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag(name: str, command: Run) -> None:
    """--help-all has all of them, and by name those of the YAML file; --help the usual ones."""
    shown = {}
    for asked in ("--help", "--help-all"):
        done = command(name, asked)
        shown[asked] = done.stdout
        assert (done.returncode, done.stderr) == (0, "")
        assert shown[asked].startswith("usage: ")
    kind = kind_of(name)
    quiet = flag_help.quiet(kind)
    rare = flag_help.rare_of(kind)
    assert getattr(kind, "BASIC", frozenset()) <= names_of(name) - quiet
    # a word of its own, no flag; doctor's run may be left out, so it is a flag
    by_place = names_of(name) & ({"run"} if name != "doctor" else set())
    for word in by_place:
        assert re.search(rf"^usage: .* {word.upper()} \[flags\]\n", shown["--help"])
    for field in names_of(name) - by_place:
        # further in than two blanks, a flag is named only
        line = re.compile(rf"(?m)^  --(no-)?{field.replace('_', '-')}(?![-\w])")
        if field in quiet:
            assert (field in shown["--help-all"]) == (field not in flag_help.internal(kind)), field
        else:
            assert line.search(shown["--help-all"]), field
        assert bool(line.search(shown["--help"])) == (field not in quiet | rare), field


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_a_usage_error(name: str, here: Path, command: Run) -> None:
    """Exit code 2, with nothing on stdout and nothing made."""
    done = command(name, "--no-such-flag", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no-such-flag" in done.stderr
    assert made(here) == []


def at(name: str) -> str:
    """The setting that names the model."""
    return "teacher" if "teacher" in names_of(name) and "model" not in names_of(name) else "model"


@pytest.mark.parametrize("name", OPENS)
def test_a_model_that_is_not_there_is_one_sentence(name: str, here: Path, command: Run) -> None:
    """Which names it; exit code 1, no result, nothing made."""
    done = command(name, f"--{at(name)}", "./no-such-folder")
    assert "no-such-folder" in sentence(done)
    assert "{" not in done.stdout
    assert made(here) == []


def dry(name: str, model: Path, text: Path, place: Path) -> Any:
    """Settings of a command's dry run; rows that it learns from are written into `place`."""
    known = names_of(name)
    given: dict[str, Any] = {at(name): str(model), **MORE.get(name, {})}
    if "dry_run" in known:
        given["dry_run"] = True
    if name in ROWS:
        given["data"] = str(place / "rows")
        (place / "rows").mkdir()
        for split in ("train", "valid"):
            rows = [{**ROWS[name], "prompt": f"{split} {number}"} for number in range(5)]
            lines = "\n".join(map(json.dumps, rows)) + "\n"
            (place / "rows" / f"{split}.jsonl").write_text(lines)
    elif "data" in known:
        given["data"] = str(text)
    return kind_of(name)(**given)


# (command, setting) of all models that are opened
MODELS = [*((name, at(name)) for name in OPENS), ("distill", "student"), ("evaluate", "students")]
FEW = {"num_samples": 2, "iters": 1, "max_tokens": 2, "generation_tokens": 2, "num_trials": 1}
FEW["prompt_tokens"] = 8


def refused_with(settings: Any, name: str, setting: str, model: Path) -> str:
    """What a command says to a bad model; nothing in its folder is changed."""
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    several = isinstance(getattr(kind_of(name)(), setting), tuple)
    given = {**FEW, "dry_run": False, setting: (str(model),) if several else str(model)}
    known = {key: value for key, value in given.items() if key in names_of(name)}
    module: Any = importlib.import_module(f"mis_mlx.{name}")
    with pytest.raises(MisError) as caught:
        module.run(settings.with_values(**known))
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def bad(llama: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a good model, to be damaged."""
    return Path(shutil.copytree(llama.path, tmp_path / "bad"))


@pytest.mark.usefixtures("brief_look")
@pytest.mark.parametrize(("name", "setting"), MODELS)
def test_a_model_is_opened_before_anything_is_written(
    name: str, setting: str, bad: Path, here: Path, asked: Callable[[str], Any]
) -> None:
    """By the one way that checks it: tests/faults/test_folders.py has all that can be wrong."""
    os.truncate(bad / "model.safetensors", 99_999)
    assert "99999 of " in refused_with(asked(name), name, setting, bad)
    assert not set(made(here)) - {"runs"}


@pytest.mark.usefixtures("brief_look")
@pytest.mark.parametrize(
    ("name", "setting"),
    mostly_thorough(
        [pair for pair in MODELS if pair[0] != "plan"],
        *(("prune", "model"), ("quantize", "model"), ("export", "model")),
        of_several=True,
    ),
)
def test_weights_that_are_not_numbers_are_named(
    name: str, setting: str, bad: Path, here: Path, asked: Callable[[str], Any]
) -> None:
    """The tensor, how many, and no model out of them."""
    at = safetensors.index(bad)["model.layers.1.mlp.up_proj.weight"]
    with at.file.open("r+b") as file:
        file.seek(at.offset)
        file.write(struct.pack("<f", math.nan))
    said = refused_with(asked(name), name, setting, bad)
    assert re.search("up_proj.weight holds (1 values that are not numbers|NaN or infinity)", said)
    assert not list(here.rglob("model/*.safetensors"))


@pytest.fixture
def asked(llama: Checkpoint, text_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`asked(name)`: settings of a command's dry run; `asked(name, folder)`: with that model."""
    return lambda name, model=llama.path: dry(name, model, text_folder, tmp_path)


@pytest.mark.usefixtures("cache")  # kept answers would take nothing
@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_counts_and_writes_nothing(
    name: str, here: Path, asked: Callable[..., Any]
) -> None:
    """Bytes and seconds, as JSON holds them."""
    module: Any = importlib.import_module(f"mis_mlx.{name}")
    found = module.run(asked(name))
    assert found["peak_bytes"] > 0
    assert found.get("seconds", 0) >= 0
    assert not found.get("check_failed")
    json.dumps(found, allow_nan=False)
    assert made(here) == []


def flags(settings: Any, **others: Any) -> list[object]:
    """The command line that gives these settings, with `others` in place of their own."""
    words = list[object]()
    for field, value in {**settings.given, **others}.items():
        flag = f"--{field.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        else:
            words += [flag, *(value if isinstance(value, tuple) else (value,))]
    return words


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", DRY)
def test_what_does_not_fit_is_said_with_the_budget(
    name: str, dry: bool, here: Path, command: Run, asked: Callable[..., Any]
) -> None:
    """A dry run has exit code 3 and the numbers, or is refused as the command itself is: by one
    sentence with the budget and its flag. Nothing is made.
    """
    done = command(name, *flags(asked(name), budget="1MiB", dry_run=dry))
    if dry and done.returncode == 3:
        assert last_line(done)["check_failed"]
        assert last_line(done)["peak_bytes"] > 2**20
    else:
        said = sentence(done)
        assert "the budget is 1 MiB" in said and "--budget" in said
        assert "{" not in done.stdout
    assert made(here) == []


# `evaluate` reads text where it is asked for losses
@pytest.mark.parametrize("name", [n for n in DRY if "data" in names_of(n) and n != "evaluate"])
def test_text_that_is_not_there_leaves_nothing(
    name: str, here: Path, asked: Callable[..., Any]
) -> None:
    """No run that --resume would find, and no folder."""
    module: Any = importlib.import_module(f"mis_mlx.{name}")
    with pytest.raises(MisError, match="no-such-text"):
        module.run(asked(name).with_values(data="no-such-text", dry_run=False))
    assert not set(made(here)) - {"runs"}


MORE_THAN_HERE = r"900000\.00 GiB is more than the \d"
# (command, what is changed, what the sentence must hold)
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    *((n, {"budget": "900000GiB"}, MORE_THAN_HERE) for n in DRY if "budget" in names_of(n)),
    ("sft", {"iters": 0}, "--iters is 0.* 1 "),
    ("sft", {"max_seq_length": 10_000}, " 512"),
    ("sft", {"fine_tune_type": "lora", "num_layers": 9}, "--num-layers is 9.* 3"),
    ("sft", {"fine_tune_type": "lora", "rank": 0}, "--rank is 0"),
    ("dpo", {"beta": 0.0}, "--beta is 0.* 0"),
    ("grpo", {"group_size": 1}, "--group-size is 1"),
    ("grpo", {"max_completion_length": 128}, "--max-seq-length"),
    ("grpo", {"max_completion_length": 127}, "128 .* 1 .*127"),
    ("grpo", {"data": None, "tasks": "chess"}, "chess"),
    ("prune", {"heads": 3}, "--heads 3 "),
    ("prune", {"scenario": "none", "heads": 1}, "--heads 1 .* 2 "),
    ("prune", {"scenario": "none", "hidden": 17}, " 17 .* 4 "),
    ("prune", {"temperature_c": 8.0, "altitude_m": -10.0}, " -10 m"),
    ("prune", {"target": "conditions"}, "--temperature-c and --altitude-m"),
    ("prune", {"target": "conditions", "importance": "rms", "altitude_m": 832.0}, "aais.* rms "),
    ("quantize", {"target_bpw": 2.2}, "--target-bpw 2.2 .* 2.428"),
    ("quantize", {"target_bpw": 8.9}, "--target-bpw 8.9 .* 64 "),
    ("quantize", {"q_group_size": 128, "target_bpw": None}, " 64 .* 128.*--q-group-size 64"),
    ("export", {"format": "hf", "upload_repo": "small", "license": "mit"}, "small"),
    ("export", {"format": "hf", "upload_repo": "me/small"}, "--license"),
    ("plan", {"machine": "m1-air", "measure": True}, "--measure"),
    ("evaluate", {"tasks": (), "out": "none"}, "--tasks"),
    ("evaluate", {"tasks": (), "dry_run": True}, "--tasks"),
    ("evaluate", {"tasks": ("answer",)}, "answers"),
    ("evaluate", {"tasks": ("logik",)}, "logic"),
    ("evaluate", {"num_questions": 1}, "--num-questions is 1.* 2 "),
    ("generate", {"max_tokens": 0}, "--max-tokens is 0.* 1 "),
    ("evaluate", {"tasks": ("answers",)}, "chat template"),
)


@pytest.mark.parametrize(("name", "changes", "holds"), REFUSED)
def test_numbers_that_cannot_be_are_refused_before_work(
    name: str, changes: dict[str, Any], holds: str, here: Path, asked: Callable[..., Any]
) -> None:
    """One sentence with what was given and what can be; nothing is made."""
    module: Any = importlib.import_module(f"mis_mlx.{name}")
    settings = asked(name)
    if settings.given.get("dry_run"):
        settings = settings.with_values(dry_run=False)
    with pytest.raises(MisError, match=holds) as caught:
        module.run(settings.with_values(**changes))
    assert "\n" not in str(caught.value)
    assert made(here) == []


@pytest.mark.parametrize("name", [n for n in DRY if n != "export"])  # which opens none here
def test_no_tokenizer_opens_that_alone_exceeds_the_budget(
    name: str,
    here: Path,
    command: Run,
    asked: Callable[..., Any],
    many_tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence says what it takes; nothing is made."""
    opened = list[Any]()
    monkeypatch.setattr(load, "opened_tokenizer", opened.append)
    budget = model_size.OPENING_BYTES * TOKENS * 3 // 4
    done = command(name, *flags(asked(name, many_tokens), budget=budget, dry_run=False))
    assert f"a tokenizer of {TOKENS:,} tokens" in sentence(done)
    assert opened == []
    assert made(here) == []


@pytest.fixture(scope="module")
def many_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with TOKENS rows."""
    folder = tmp_path_factory.mktemp("many") / "model"
    return tiny.make(folder, vocab_size=TOKENS, dtype="BF16")
