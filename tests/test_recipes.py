"""docs/recipes.md: every block of commands is run as it is written, on a tiny model; what it
promises is there then.

The tables below say all that is changed: hub ids, the text where none is named, and numbers that
would take hours. What `mlx.launch` starts on two machines are two processes here. What needs a
network is not run, only looked at.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest

from mis_mlx.compute import precision
from mis_mlx.models.opening import load
from mis_mlx.storage import run_folder
from tests import tiny
from tests.conftest import mostly_slow
from tests.machines import ROOT, ended, started

PAGE = ROOT / "docs" / "recipes.md"
# What stands in the model cache under this name is the tiny model; mlx_lm, whose cache is
# another, gets its folder.
TEACHER = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Values in place of the page's, where it gives one.
OTHER = {
    "--vocab": "512", "--grad-accumulation-steps": "2", "--budget": "1GiB",
}  # fmt: skip
BRIEF = "--max-seq-length 32 --num-samples 2"
SHORT = f"{BRIEF} --reconstruct-samples 2 --eval-windows 2"
# Flags behind the page's, the last of which counts.
MORE = {
    "distill": f"{SHORT} --iters 2 --q-iters 1",
    "search": SHORT,
    "prune": BRIEF,
    "quantize": BRIEF,
    "generate": "--max-tokens 4",
    "mlx_lm.generate": "--max-tokens 4",
}
TEXTED = ("distill", "search", "prune", "quantize", "evaluate")  # read --data
STEPS = 12  # of a run that is to be stopped in the middle
WORDS = """
def available_languages():
    return ["pl", "en"]
def get_frequency_dict(language, size):
    return {"if": 0.5, "loop": 0.5} if language == "en" else {"owca": 0.5, "ser": 0.5}
"""


class Recipe(NamedTuple):
    """A question of the page: its commands, one a line of the block; the files and folders that it
    promises.
    """

    title: str
    commands: list[str]
    promised: list[str]


def recipes(text: str) -> Iterator[Recipe]:
    """Those of a page. Comments are left out, lines that end in a backslash are joined."""
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title = part.partition("\n")[0]
        blocks = re.findall(r"^```sh\n(.*?)^```", part, re.M | re.S)
        assert len(blocks) == 1, f"{title}: {len(blocks)} blocks of sh, a recipe has one"
        result = re.search(r"^\*\*Result:\*\* (.*?)(?:\n\n|\Z)", part, re.M | re.S)
        assert result, f"{title}: no line begins with **Result:**"
        lines = blocks[0].replace("\\\n", " ").splitlines()
        yield Recipe(
            title, [x for x in lines if x.strip()], re.findall(r"`([^`\s]*/[^`\s]*)`", result[1])
        )


RECIPES = list(recipes(PAGE.read_text("utf-8")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two blocks and 1,024 tokens, which are an eighth of it and more."""
    folder = tiny.make(
        tmp_path_factory.mktemp("recipes") / "tiny", vocab_size=1024, num_hidden_layers=2
    )
    tiny.write_tokenizer(folder, 1024)
    return folder


@pytest.fixture(scope="module")
def env(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, own_home: dict[str, str]
) -> dict[str, str]:
    """A model cache that holds the teacher of the page, this machine's rates, lists of words."""
    cache = tmp_path_factory.mktemp("cache")
    extra = tmp_path_factory.mktemp("extra")  # of the package; what counts here is who asks for it
    (extra / "wordfreq.py").write_text(WORDS)
    shutil.copy(Path(own_home["MIS_MLX_CACHE"]) / "rates.json", cache)
    shutil.copytree(teacher, cache / TEACHER)
    return {
        **own_home,
        precision.POLICY: os.environ.get(precision.POLICY, ""),
        "MIS_MLX_CACHE": str(cache),
        "PYTHONPATH": str(extra),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def place(tmp_path: Path, teacher: Path, text_folder: Path) -> Path:
    """A checkout's surroundings, as a user of the page has them: notes and an earlier run."""
    (tmp_path / "notes").mkdir()
    for number, line in enumerate((text_folder / "train.jsonl").read_text().splitlines()):
        (tmp_path / "notes" / f"{number}.txt").write_text(
            json.loads(line)["text"], encoding="utf-8"
        )
    for name in ("pruned", "model"):
        shutil.copytree(teacher, tmp_path / "runs" / "NAME" / name)
    return tmp_path


def changed(name: str, words: list[str], teacher: Path, text: Path) -> list[str]:
    """The words of a command after the tables."""
    result = [str(teacher) if word == HUB_ID else word for word in words]
    for at, word in enumerate(words):
        if word in OTHER:
            result[at + 1] = OTHER[word]
    if "--resume" in words:  # goes on with the flags that it has
        return result
    data = ["--data", str(text)] if name in TEXTED and "--data" not in words else []
    return [*result, *data, *shlex.split(MORE.get(name, ""))]


def not_run(line: str, words: list[str]) -> bool:
    """Whether a command needs a network or a second machine. Of these is looked at what they
    name.
    """
    if "pip" in words:
        (extra,) = re.findall(r"\.\[(\w+)\]", line)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extra in project["optional-dependencies"]
        return True
    if words[0] != "mlx.distributed_config":
        return False
    there = (Path(mx.__file__).parent / "_distributed_utils" / "config.py").read_text()
    assert not [flag for flag in words if flag.startswith("--") and f'"{flag}"' not in there]
    return True


def run(argv: list[str], n: int, place: Path, env: Mapping[str, str], out: str | None) -> None:
    """`python argv` on n machines, to its end; with `out`, the run in that folder until Ctrl-C
    after a few steps.
    """
    places = [place]
    for number in range(1, n):  # every machine works in a folder of its own
        places.append(place.with_name(f"{place.name}-{number}"))
        places[-1].mkdir(exist_ok=True)
    with started(n, argv, env, places) as made:
        while out and not (place / out / run_folder.METRICS).exists():
            assert all(p.poll() is None for p in made)
            time.sleep(0.01)
        if out:
            made[0].send_signal(signal.SIGINT)
        done = ended(made)
    codes = [d.returncode for d in done]
    wanted = 130 if out else 0
    assert codes[0] == wanted and (out or set(codes) == {0}), (
        f"{shlex.join(argv)}: {codes}\n{done[0].stderr}"
    )


def follow(recipe: Recipe, place: Path, env: Mapping[str, str], teacher: Path, text: Path) -> None:
    """All commands of a recipe, one after the other, in the folder `place`."""
    for at, line in enumerate(recipe.commands):
        words = shlex.split(line, comments=True)
        if not_run(line, words):
            continue
        n = 1
        rest = words
        if words[0] == "mlx.launch":
            n = 2
            rest = words[words.index("python") :]
        if rest[0] == "mis_mlx":
            name = rest[1]
            argv = ["-m", f"mis_mlx.{name}"]
            flags = rest[2:]
        elif rest[:2] == ["python", "-m"]:
            name = rest[2].removeprefix("mis_mlx.")
            argv = rest[1:3]
            flags = rest[3:]
        elif rest[0].startswith("mlx_lm."):
            name = rest[0]
            argv = ["-c", f"from {name} import main; main()"]
            flags = rest[1:]
        else:
            subprocess.run(["sh", "-ec", line], cwd=place, env=env, check=True)
            continue
        out = flags[flags.index("--out") + 1] if "--out" in flags else ""
        later = [shlex.split(c, comments=True) for c in recipe.commands[at + 1 :]]
        stopped = any(out in c and "--resume" in c for c in later) if out else False
        more = ["--iters", str(STEPS)] if stopped else []
        given = changed(name, flags, teacher, text)
        run([*argv, *given, *more], n, place, env, out if stopped else None)


LONG = r"mlx\.launch"  # on two machines: tests/test_several_machines.py
CASES = mostly_slow(
    RECIPES,
    *(r for r in RECIPES if "evaluate" in r.title),
    thorough=[r for r in RECIPES if not re.search(LONG, str(r.commands))],
)


@pytest.mark.parametrize(
    "recipe", CASES, ids=lambda r: re.sub(r"\W+", "-", r.title).strip("-").lower()
)
def test_a_recipe_works(
    recipe: Recipe, place: Path, env: dict[str, str], teacher: Path, text_folder: Path
) -> None:
    """Every command ends well, every file and folder that the page names is there, and a model
    folder opens.
    """
    follow(recipe, place, env=env, teacher=teacher, text=text_folder)
    for name in recipe.promised:
        assert (place / name).exists(), f"{name} was promised, and is not there"
        if name.endswith("/"):
            load.open_checkpoint(place / name)
