"""Every command is given every bad model folder: one sentence, nothing written, nothing in the
folder changed.

The faults are made for real. Weights that are not numbers, and tokenizers, are met only by commands
that read them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import (
    bench,
    distill,
    dpo,
    evaluate,
    export,
    generate,
    grpo,
    plan,
    prune,
    quantize,
    search,
    sft,
)
from mis_mlx.models.opening import tokenizer_check
from mis_mlx.types import MisError
from tests.conftest import mostly_thorough
from tests.faults import jobs, liars
from tests.faults.conftest import Note

WEIGHTS = "model.safetensors"
Change = Callable[[Path], object]


def header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of the weights, and nothing else."""
    whole, data = liars.split((folder / WEIGHTS).read_bytes())
    change(whole)
    (folder / WEIGHTS).write_bytes(liars.made(whole, data))


def poke(folder: Path, number: float) -> None:
    """Put one number into the weights."""
    data = (folder / WEIGHTS).read_bytes()
    whole, _ = liars.split(data)
    at = len(data) - max(e["data_offsets"][1] for n, e in whole.items() if n != "__metadata__")
    at += whole["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    (folder / WEIGHTS).write_bytes(data[:at] + struct.pack("<f", number) + data[at + 4 :])


def settings(folder: Path, name: str, **changes: Any) -> None:
    """Change keys of a JSON file."""
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**content, **changes}))


def twice(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + size].rstrip()
    name = b'"model.norm.weight":'
    entry = text[text.index(name) : text.index(b"}", text.index(name)) + 1]
    text = text[:-1] + b"," + entry + b"}"
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def instead(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Another thing under the name of a file."""
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


def outside(folder: Path) -> None:
    other = folder.parent / "elsewhere.safetensors"
    shutil.move(folder / WEIGHTS, other)
    (folder / WEIGHTS).symlink_to(other)


def shard_missing(folder: Path) -> None:
    """An index of two shards, of which the second never came."""
    whole, _ = liars.split((folder / WEIGHTS).read_bytes())
    names = sorted(name for name in whole if name != "__metadata__")
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    where = {name: first for name in names[:-1]} | {names[-1]: second}
    shutil.move(folder / WEIGHTS, folder / first)
    (folder / liars.INDEX).write_text(json.dumps({"weight_map": where}))


def span(h: dict[str, Any], name: str, begin: int, end: int) -> None:
    h[name]["data_offsets"] = [begin, end]


NORM = "model.norm.weight"
AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.T", None],
}
# What the fault matrix calls it, what is done to the folder, what the sentence must say: a regular
# expression.
FAULTS: dict[str, tuple[Change, str]] = {
    "C1 truncated": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 999),
        "it is incomplete",
    ),
    "C2 a header of 2^63 bytes": (
        lambda f: (f / WEIGHTS).write_bytes(
            struct.pack("<Q", 2**63) + (f / WEIGHTS).read_bytes()[8:]
        ),
        "claims a header",
    ),
    "C3 dimension -1, its bytes agree modulo 2^64": (
        lambda f: header(f, lambda h: h[NORM].update(shape=[-1], data_offsets=[0, 2**64 - 4])),
        "impossible shape",
    ),
    "C4 two tensors on the same bytes": (
        lambda f: header(f, lambda h: span(h, NORM, 0, 256)),
        "overlaps another",
    ),
    "C4 bytes that no tensor has": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"PK"),
        "belong to no tensor",
    ),
    "C5 a name twice": (twice, "twice"),
    "C8 the index leads out of the folder": (
        lambda f: (f / liars.INDEX).write_text(
            json.dumps({"weight_map": {NORM: "../x.safetensors"}})
        ),
        "points outside",
    ),
    "C8 a link leads out of the folder": (outside, "link out of the model folder"),
    "C9 a stray shard": (
        lambda f: shutil.copy(f / WEIGHTS, f / "model-zz.safetensors"),
        "no index lists",
    ),
    "C9 a missing shard": (shard_missing, "model-00002-of-00002.safetensors is missing"),
    "C10 ten million layers": (
        lambda f: settings(f, "config.json", num_hidden_layers=10**7),
        "should be 1 to 1000",
    ),
    "C10 a hidden size of 2^40": (
        lambda f: settings(f, "config.json", hidden_size=2**40),
        "but should be",
    ),
    "C10 NaN in the config": (
        lambda f: settings(f, "config.json", rms_norm_eps=float("nan")),
        "NaN",
    ),
    "C10 a config of another model": (
        lambda f: settings(f, "config.json", hidden_size=128),
        "different models",
    ),
    "C11 model_file": (
        lambda f: settings(f, "config.json", model_file="evil.py"),
        "own program code",
    ),
    "C11 auto_map": (
        lambda f: settings(f, "config.json", model_type="evil", auto_map=AUTO_MAP),
        "own program code",
    ),
    "C14 a named pipe": (lambda f: instead(f, WEIGHTS, os.mkfifo), "not a regular file"),
    "C14 a named pipe for a config": (
        lambda f: instead(f, "config.json", os.mkfifo),
        "no readable config",
    ),
    "C14 /dev/zero": (
        lambda f: instead(f, WEIGHTS, lambda p: p.symlink_to("/dev/zero")),
        "link out of",
    ),
    "C14 a folder": (lambda f: instead(f, WEIGHTS, Path.mkdir), "Is a directory"),
    "C14 no bytes": (lambda f: (f / WEIGHTS).write_bytes(b""), "0 bytes long"),
    "C16 GGUF": (lambda f: shutil.move(f / WEIGHTS, f / "model.gguf"), "GGUF is not read"),
    "C17 pickle": (lambda f: shutil.move(f / WEIGHTS, f / "pytorch_model.bin"), "unsafe format"),
}
NOT_NUMBERS = "(1 values that are not numbers|NaN or infinity)"
NUMBERS: dict[str, tuple[Change, str]] = {
    "C6 NaN in the weights": (
        lambda f: poke(f, float("nan")),
        f"up_proj.weight holds {NOT_NUMBERS}",
    ),
    "C6 infinity in the weights": (
        lambda f: poke(f, float("inf")),
        f"up_proj.weight holds {NOT_NUMBERS}",
    ),
}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def another_template(folder: Path) -> None:
    """A template beside the usual one, which transformers takes where there are tools."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(ENDLESS)


SPEECH: dict[str, tuple[Change, str]] = {
    "C11 auto_map of the tokenizer": (
        lambda f: settings(
            f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}
        ),
        "own program code",
    ),
    "C12 an endless chat template": (
        lambda f: (f / "chat_template.jinja").write_text(ENDLESS),
        "no answer in 2 s",
    ),
    "C12 an endless chat template where there are tools": (
        lambda f: (f / "chat_template.jinja").write_text(f"{{% if tools %}}{ENDLESS}{{% endif %}}"),
        "no answer in 2 s",
    ),
    "C12 an endless chat template for tools alone": (another_template, "no answer in 2 s"),
    "C12 a chat template that wants out": (
        lambda f: (f / "chat_template.jinja").write_text(ESCAPE),
        "SecurityError",
    ),
    "C13 half a tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 999), "does not open"),
    "C14 a named pipe for a tokenizer": (
        lambda f: instead(f, "tokenizer.json", os.mkfifo),
        "not a regular file",
    ),
}

COMMANDS = (
    "prune",
    "quantize",
    "export",
    "distill",
    "distill --student",
    "sft",
    "dpo",
    "grpo",
    "generate",
    "evaluate",
    "search",
    "plan",
    "bench",
)
# Those that come to the weights, or the tokenizer, before anything else can stop them.
READERS = tuple(command for command in COMMANDS if command != "plan")
SPEAKERS = ("prune", "export", "distill", "sft", "generate", "bench")


@pytest.fixture(scope="module")
def made(all_jobs: dict[str, jobs.Job]) -> tuple[Path, Path]:
    """(model, text)"""
    return all_jobs["prune"].made


def run(command: str, folder: Path, good: Path, text: Path, out: Path) -> object:
    """One command with `folder` for a model."""
    few: dict[str, Any] = {"data": str(text), "num_samples": 2, "max_seq_length": 32}
    brief: dict[str, Any] = {**few, "out": str(out), "iters": 1}
    lessons: dict[str, Any] = {"max_seq_length": 256, "iters": 1, "out": str(out)}
    run_of: dict[str, Callable[[], object]] = {
        "prune": lambda: prune.run(
            prune.Settings(model=str(folder), mlx_path=str(out), ffn=256, **few)
        ),
        "quantize": lambda: quantize.run(
            quantize.Settings(model=str(folder), mlx_path=str(out), **few)
        ),
        "export": lambda: export.run(export.Settings(model=str(folder), out=str(out))),
        "distill": lambda: distill.run(distill.Settings(teacher=str(folder), ffn=256, **brief)),
        "distill --student": lambda: distill.run(
            distill.Settings(teacher=str(good), student=str(folder), **brief)
        ),
        "sft": lambda: sft.run(sft.Settings(model=str(folder), **lessons)),
        "dpo": lambda: dpo.run(dpo.Settings(model=str(folder), **lessons)),
        "grpo": lambda: grpo.run(
            grpo.Settings(
                model=str(folder), max_completion_length=16, **{**lessons, "max_seq_length": 512}
            )
        ),
        "generate": lambda: generate.run(generate.Settings(model=str(folder), max_tokens=2)),
        "evaluate": lambda: evaluate.run(
            evaluate.Settings(
                str(good), (str(folder),), str(text), eval_windows=2, max_seq_length=32
            )
        ),
        "search": lambda: search.run(
            search.Settings(lose=0.1, teacher=str(folder), out=str(out), data=str(text))
        ),
        "plan": lambda: plan.run(plan.Settings(teacher=str(folder))),
        "bench": lambda: bench.run(
            bench.Settings(model=(str(folder),), generation_tokens=2, num_trials=1)
        ),
    }
    return run_of[command]()


def refused(
    fault: str, what: tuple[Change, str], command: str, made: tuple[Path, Path], place: Path
) -> str:
    """The sentence; AssertionError when there is none, when something was written, or the folder
    was touched.
    """
    model, text = made
    folder = shutil.copytree(model, place / "model")
    out = place / "out"
    what[0](folder)
    before = {p.name: p.lstat() for p in folder.iterdir()}
    with pytest.raises(MisError) as caught:
        run(command, folder, good=model, text=text, out=out)
    said = str(caught.value)
    assert re.search(what[1], said) and "\n" not in said, (fault, command, said)
    models = (
        [p for p in out.rglob("*.safetensors") if not {"steps", "targets"} & set(p.parts)]
        if out.exists()
        else []
    )
    assert not models, models
    assert {p.name: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.iterdir()} == {
        name: (s.st_mtime_ns, s.st_size) for name, s in before.items()
    }
    return said.replace(str(folder), "MODEL").replace(str(place), "...")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_folder_is_one_sentence(
    command: str, made: tuple[Path, Path], tmp_path: Path, note: Note
) -> None:
    """Whatever is wrong with files, index or config, and whichever command meets it."""
    for number, (fault, what) in enumerate(FAULTS.items()):
        if command == "plan" and fault in ("C16 GGUF", "C17 pickle"):
            continue  # it plans from a config alone where there are no weights, and reads none
        said = refused(fault, what, command=command, made=made, place=tmp_path / str(number))
        note(fault, command, {"said so": 1}, bad=0, said=said)


@pytest.mark.parametrize("command", mostly_thorough(READERS, *READERS[:3]))
def test_weights_that_are_not_numbers_are_named(
    command: str, made: tuple[Path, Path], tmp_path: Path, note: Note
) -> None:
    """The tensor, how many, and no model out of them."""
    for number, (fault, what) in enumerate(NUMBERS.items()):
        said = refused(fault, what, command=command, made=made, place=tmp_path / str(number))
        note(fault, command, {"said so": 1}, bad=0, said=said)


@pytest.mark.parametrize("command", mostly_thorough(SPEAKERS, SPEAKERS[0]))
def test_a_stranger_s_tokenizer_is_tried_in_a_child(
    command: str,
    made: tuple[Path, Path],
    tmp_path: Path,
    note: Note,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It hangs, breaks, wants out or wants to run code: in a process of its own, and then it is a
    sentence.
    """
    for number, (fault, what) in enumerate(SPEECH.items()):
        if "endless" in fault and command != "generate":
            continue  # the same door for all, and two seconds each
        monkeypatch.setattr(tokenizer_check, "SECONDS", 2.0 if "endless" in fault else 60.0)
        said = refused(fault, what, command=command, made=made, place=tmp_path / str(number))
        note(fault, command, {"said so": 1}, bad=0, said=said)


def test_the_good_folder_passes(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing above is refused for another reason: the folder as it was made goes through."""
    for command in ("generate", "plan", "export"):
        run(command, made[0], good=made[0], text=made[1], out=tmp_path / command)


def test_no_mark_is_left_by_foreign_code(tmp_path: Path, made: tuple[Path, Path]) -> None:
    """A folder full of programs that would leave a mark: after every command there is none."""
    mark = tmp_path / "mark"
    for number, change in enumerate(
        (FAULTS["C11 model_file"][0], SPEECH["C11 auto_map of the tokenizer"][0])
    ):
        folder = shutil.copytree(made[0], tmp_path / f"evil-{number}")
        change(folder)
        for name in ("evil.py", "modeling_evil.py", "__init__.py"):
            (folder / name).write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\nModel = T\n")
        for command in ("generate", "prune", "bench"):
            with pytest.raises(MisError, match="program code"):
                run(
                    command,
                    folder,
                    good=made[0],
                    text=made[1],
                    out=tmp_path / f"out-{number}-{command}",
                )
    assert not mark.exists()


def test_code_for_a_known_type_is_named_not_run_and_not_copied(
    tmp_path: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto_map` of a type in the table: every command goes through without it, and a student has
    none of it.
    """
    folder = shutil.copytree(made[0], tmp_path / "evil")
    mark = tmp_path / "mark"
    settings(folder, "config.json", auto_map=AUTO_MAP)
    for name in ("evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\nModel = Config = T\n")
    for command in ("generate", "bench", "plan", "evaluate", "export", "prune", "quantize"):
        run(command, folder, good=made[0], text=made[1], out=tmp_path / command)
    assert (
        capsys.readouterr().err.count("names the model's own program code, which is never run") == 1
    )
    for command in ("prune", "quantize"):
        assert not list((tmp_path / command).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / command / "config.json").read_text())
    assert not mark.exists()
