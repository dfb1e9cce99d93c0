"""What a page may ask for: places that were found, numbers of sliders, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import cli, distill
from mis_mlx.studio_page import judge, places, wishes
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import MisError
from tests import tiny

PATHS = (
    *("..", "../x", "../../etc/passwd", "/etc/passwd", "runs/../..", "a/..", "a/../b", "~/x"),
    *("--out", "-c", "a/b/c", "a\0b/c", "a/b\nc", ""),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user, with a home of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "home" / "cache"))
    return tmp_path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["model", "text", "settings", "hub_id", "scenario"])
def test_no_field_takes_a_path(here: Path, field: str, path: str) -> None:
    """Whatever the browser sends as a key or a name."""
    (here / "a").mkdir()
    chosen = replace(Wishes(), decides="scenario", **{field: path})
    if field == "hub_id":
        chosen.model = wishes.HUB
    with pytest.raises(MisError) as error:
        wishes.base_flags(chosen, ())
        wishes.size_flags(chosen)
    assert "\n" not in str(error.value)


def test_a_hub_id_is_no_folder_here(here: Path) -> None:
    """A command would take the folder of that name."""
    (here / "owner" / "model").mkdir(parents=True)
    with pytest.raises(MisError, match="owner/model is a folder here"):
        places.hub_id("owner/model")
    assert places.hub_id(" owner/other ") == "owner/other"


@pytest.mark.parametrize("value", [None, "5", "--out", [], True, float("nan"), -1, 1e30])
@pytest.mark.parametrize("field", ["loss", "megabytes", "memory_mib"])
def test_sliders_send_numbers(field: str, value: Any) -> None:
    """Anything else is a sentence."""
    kind = {"loss": "loss", "megabytes": "bytes"}.get(field, "settings")
    chosen = replace(Wishes(), decides=kind, **{field: value})
    with pytest.raises(MisError, match="give a number from"):
        wishes.base_flags(chosen, ())
        wishes.size_flags(chosen)


@pytest.mark.parametrize("value", [None, "5", 0, -1, 1.5, 513, True, float("inf")])
def test_tokens_are_few_and_whole(value: Any) -> None:
    """Of an answer."""
    with pytest.raises(MisError, match="the number of tokens is"):
        judge.tokens_of(value)
    assert judge.tokens_of(96.0) == 96


def test_prompts_are_text() -> None:
    """Not empty, not endless, without the byte that no command line takes."""
    assert judge.prompt_of(" What\0 is it? ") == "What is it?"
    assert judge.prompt_of("half \ud83d") == "half ?"
    with pytest.raises(MisError, match="no prompt"):
        judge.prompt_of(" \n")
    with pytest.raises(MisError, match="8001 characters, 8000 are taken"):
        judge.prompt_of("x" * 8001)


def test_models_are_found_where_programs_keep_them(here: Path) -> None:
    """Our runs, mlx-lm's folder, our cache, Hugging Face's, LM Studio's, and those of --models.

    A folder without weights is none, and a model found twice is one.
    """
    tiny.make(here / "made")
    home = here / "home"
    snapshot = home / "hf" / "hub" / "models--owner--small" / "snapshots" / "0123456789"
    folders = [
        here / "runs" / "one-001" / "model",
        here / "mlx_model",
        home / "cache" / "Small",
        snapshot,
        home / ".lmstudio" / "models" / "publisher" / "small",
        here / "more" / "mine",
    ]
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(here / "made")
    (here / "more" / "empty").mkdir()
    (here / "runs" / "empty-001" / "model").mkdir(parents=True)
    found = places.models([here / "more"])
    assert {place.path for place in found} == set(folders)
    assert all(place.nbytes > 2e6 for place in found)
    assert len({place.key for place in found}) == len(folders)
    labels = " ".join(place.label for place in found)
    assert "owner/small" in labels
    assert "run one-001" in labels
    assert places.models() == [place for place in found if place.path.parent.name != "more"]


def test_texts_and_settings_are_found_here(here: Path, text_folder: Path) -> None:
    """Folders with a train.jsonl, not too deep, not hidden; YAML files, no links out of here."""
    for name in ("notes", "deep/er", ".hidden", "a/b/c/d"):
        (here / name).mkdir(parents=True)
        (here / name / "train.jsonl").write_text("{}\n")
    (here / "mine.yaml").write_text("iters: 3\n")
    (here / "link.yaml").symlink_to("/etc/hostname")
    assert [place.label for place in places.texts()] == ["deep/er", "notes"]
    assert [place.label for place in places.settings_files()] == ["mine.yaml"]


def test_flags_are_those_of_distill(here: Path, text_folder: Path) -> None:
    """The command takes them, and finds what was chosen."""
    model = tiny.make(here / "more" / "tiny")
    (here / "notes").symlink_to(text_folder)
    (here / "mine.yaml").write_text("iters: 3\n")
    chosen = Wishes(memory_mib=1024, loss=0.05)
    chosen.model = places.models([here / "more"])[0].key
    chosen.settings = places.settings_files()[0].key
    flags = wishes.base_flags(chosen, [here / "more"])
    for decides, name, value in (
        ("loss", "lose", 0.05),
        ("bytes", "bytes", "70MB"),
        ("scenario", "scenario", "balanced"),
        ("settings", "iters", 3),
    ):
        sized = replace(chosen, decides=decides, scenario="balanced")
        line = [*flags, *wishes.size_flags(sized)]
        settings = cli.parse(distill.Settings, line)
        assert getattr(settings, name) == value
        assert settings.teacher == str(model)
        assert settings.budget == "1024MiB"
