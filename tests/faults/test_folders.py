"""Every bad model folder is refused in one sentence where it is opened; nothing in it is changed.

The faults are made for real. tests/storage/test_header_check.py and tests/models/test_config.py
have what headers and configs may not say; test_commands_contract.py, that every command opens its
model so, before it writes anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import bench, generate, quantize
from mis_mlx.models.opening import load, tokenizer_check
from mis_mlx.types import MisError
from tests.faults import jobs, liars
from tests.faults.conftest import Note

WEIGHTS = "model.safetensors"
Change = Callable[[Path], object]


def settings(folder: Path, name: str, **changes: Any) -> None:
    """Change keys of a JSON file."""
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**content, **changes}))


def instead(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Another thing under the name of a file."""
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


def outside(folder: Path) -> None:
    other = folder.parent / "elsewhere.safetensors"
    shutil.move(folder / WEIGHTS, other)
    (folder / WEIGHTS).symlink_to(other)


def told(folder: Path, **where: object) -> None:
    """An index that has all tensors in the one file, but for these."""
    whole, _ = liars.split((folder / WEIGHTS).read_bytes())
    names = {name: WEIGHTS for name in whole if name != "__metadata__"}
    (folder / liars.INDEX).write_text(json.dumps({"weight_map": {**names, **where}}))


def in_two(folder: Path) -> None:
    """The same tensors in two shards."""
    shutil.copy(folder / WEIGHTS, folder / "model-b.safetensors")
    told(folder, **{NORM: "model-b.safetensors"})


def index(text: str) -> Change:
    """Such an index."""
    return lambda folder: (folder / liars.INDEX).write_text(text)


def pointing(where: object) -> Change:
    """An index by which a tensor lies there."""
    return lambda folder: told(folder, **{NORM: where})


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
    **{
        f"C8 the index leads to {where!r}": (pointing(where), "points outside")
        for where in (
            *("../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "a\0.safetensors"),
            *("pytorch_model.bin", 3),
        )
    },
    **{
        f"C8 an index {text[:40]}": (index(text), "not a usable index")
        for text in ("{", "[]", '{"weight_map": {"a": "x", "a": "y"}}', '{"a":' * 10**5)
    },
    "C8 an index that is a folder": (
        lambda f: (f / liars.INDEX).mkdir(),
        "not a usable index",
    ),
    "C9 a tensor in the index alone": (lambda f: told(f, ghost=WEIGHTS), "disagree about ghost"),
    "C9 a tensor in two shards": (in_two, "in both"),
    "C8 a link leads out of the folder": (outside, "link out of the model folder"),
    "C9 a stray shard": (
        lambda f: shutil.copy(f / WEIGHTS, f / "model-zz.safetensors"),
        "no index lists",
    ),
    "C9 a missing shard": (
        pointing("model-2.safetensors"),
        "model-2.safetensors is missing",
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
    "C16 GGUF": (lambda f: shutil.move(f / WEIGHTS, f / "model.gguf"), "GGUF is not read"),
    "C17 pickle": (lambda f: shutil.move(f / WEIGHTS, f / "pytorch_model.bin"), "unsafe format"),
}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def another_template(folder: Path) -> None:
    """A template beside the usual one, which transformers takes where there are tools."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(ENDLESS)


def patterned(folder: Path, regex: str) -> None:
    """Let the tokenizer split by a regular expression of the stranger's."""
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    both = [split, content["pre_tokenizer"]]
    pre_tokenizer = {"type": "Sequence", "pretokenizers": both}
    settings(folder, "tokenizer.json", pre_tokenizer=pre_tokenizer)


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
    "C13 a tokenizer of gigabytes": (
        lambda f: os.truncate(f / "tokenizer.json", tokenizer_check.MOST_BYTES + 1),
        "are allowed",
    ),
    "C13 a regex bomb": (lambda f: patterned(f, "(a+)+$"), "does not open"),
    "C13 half a tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 999), "does not open"),
    "C14 a named pipe for a tokenizer": (
        lambda f: instead(f, "tokenizer.json", os.mkfifo),
        "not a regular file",
    ),
}


@pytest.fixture(scope="module")
def made(all_jobs: dict[str, jobs.Job]) -> Path:
    """A good model."""
    return all_jobs["prune"].made[0]


def refused(fault: tuple[Change, str], use: Callable[[Path], object], model: Path) -> str:
    """The sentence; AssertionError when there is none, or the folder was touched."""
    change, wanted = fault
    change(model)
    before = {p.name: p.lstat() for p in model.iterdir()}
    with pytest.raises(MisError) as caught:
        use(model)
    said = str(caught.value)
    assert re.search(wanted, said) and "\n" not in said, said
    assert {p.name: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in model.iterdir()} == {
        name: (s.st_mtime_ns, s.st_size) for name, s in before.items()
    }
    return said.replace(str(model), "MODEL").replace(str(model.parent), "...")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_one_sentence(fault: str, made: Path, tmp_path: Path, note: Note) -> None:
    """Whatever is wrong with files, index or config."""
    model = Path(shutil.copytree(made, tmp_path / "model"))
    said = refused(FAULTS[fault], load.open_checkpoint, model)
    note(fault, "every command", {"said so": 1}, said=said)


@pytest.mark.parametrize("fault", SPEECH)
def test_a_stranger_s_tokenizer_is_tried_in_a_child(
    fault: str, made: Path, tmp_path: Path, note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs, breaks, wants out or wants to run code: in a child, so it is a sentence."""
    monkeypatch.setattr(tokenizer_check, "SECONDS", 2.0 if "endless" in fault else 60.0)
    model = Path(shutil.copytree(made, tmp_path / "model"))
    said = refused(SPEECH[fault], load.tokenizer, model)
    note(fault, "every command", {"said so": 1}, said=said)


def test_code_is_named_not_run_and_not_copied(
    tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder full of programs that would leave a mark. `auto_map` of a type in the table: every
    command goes through without it, and a student has none of it; what else asks for code is
    refused.
    """
    model = Path(shutil.copytree(made, tmp_path / "model"))
    mark = tmp_path / "mark"
    for name in ("evil.py", "modeling_evil.py", "__init__.py"):
        code = f"open({str(mark)!r}, 'w')\nclass T: pass\nModel = Config = T\n"
        (model / name).write_text(code)
    settings(model, "config.json", auto_map=AUTO_MAP)
    generate.run(generate.Settings(model=str(model), max_tokens=2))
    bench.run(
        bench.Settings(model=(str(model),), prompt_tokens=8, generation_tokens=2, num_trials=1)
    )
    rough: dict[str, Any] = {"q_method": "round", "target_bpw": None}
    out = tmp_path / "out"
    quantize.run(quantize.Settings(model=str(model), mlx_path=str(out), **rough))
    said = capsys.readouterr().err
    assert said.count("names the model's own program code, which is never run") == 1
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    for fault, use in (
        (SPEECH["C11 auto_map of the tokenizer"], load.tokenizer),
        (FAULTS["C11 model_file"], load.open_checkpoint),
    ):
        refused(fault, use, model)
    assert not mark.exists()
