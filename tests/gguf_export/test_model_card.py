"""The papers of an export say where the model came from, and nothing that is not known; what they
say of a run can be repeated and is nobody's secret.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mis_mlx import cli, distill
from mis_mlx.distillation import run_plan
from mis_mlx.gguf_export import model_card, run_facts
from mis_mlx.models.opening import load
from mis_mlx.reporting import html
from mis_mlx.types import Checkpoint
from tests.conftest import ITERS, Done


def run_with(
    folder: Path, flags: dict[str, Any], answers: list[dict[str, Any]], **more: Any
) -> Path:
    """A run's folder with a first line of phases and some answers."""
    folder.mkdir()
    start = {"flags": flags, "rates": {"device": "CPU Some Chip"}, **more}
    (folder / "phases.jsonl").write_text(json.dumps(start) + "\n{torn")
    (folder / "origin.json").write_text('{"mis_mlx": "0.1.0", "mlx": "0.32.4", "teacher": "ab"}')
    (folder / "asked.yaml").write_text("{}\n")
    (folder / "config.yaml").write_text("teacher: owner/big\n")
    lines = [json.dumps(answer) + "\n" for answer in answers]
    (folder / "answers.jsonl").write_text("".join(lines))
    return folder


def answer(number: int, model: str, language: str = "en") -> dict[str, Any]:
    """A line of answers.jsonl."""
    text = f"{model} says {number}\nand goes on "
    prompt = f"Question {number}?"
    return {"prompt": prompt, "language": language, "model": model, "text": text, "ended": True}


def test_the_recipe_starts_the_same_run(tmp_path: Path) -> None:
    """`distill -c` reads it; what a search chose is left to the search, and so is its forecast."""
    flags = {"iters": 40, "lose": 0.05, "scenario": "none", "vocab": "36864", "expected_loss": 0.04}
    flags |= {"target_bpw": 4.26, "languages": ["pl", "de"]}
    run = run_with(tmp_path / "run", flags, [])
    file = tmp_path / "run.yaml"
    file.write_text(run_facts.recipe(run))
    settings = cli.parse(distill.Settings, ["-c", str(file)])
    defaults = asdict(distill.Settings())
    changed = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    assert changed.pop("config", None) in (None, str(file))
    assert changed == {"iters": 40, "lose": 0.05, "languages": ("pl", "de")}
    given = run_with(tmp_path / "given", {"scenario": "redyk", "vocab": "0.5x"}, [])
    assert yaml.safe_load(run_facts.recipe(given)) == {"scenario": "redyk", "vocab": "0.5x"}


def test_nothing_private_is_told(tmp_path: Path) -> None:
    """No folder of this machine, no altitude; a hub id stays."""
    (tmp_path / "texts").mkdir()
    flags = {"data": str(tmp_path / "texts"), "teacher": "owner/big", "altitude_m": 832.0}
    run = run_with(tmp_path / "run", flags, [], hub_ids=["owner/big"])
    assert yaml.safe_load(run_facts.recipe(run)) == {"data": "texts", "teacher": "owner/big"}
    assert run_facts.machine(run) == "CPU Some Chip, mis_mlx 0.1.0, mlx 0.32.4"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("clients/acme/emails-2024", "emails-2024"),
        ("clients/acme", "acme"),  # looks like a hub id
        ("../clients/acme", "acme"),
        ("~/clients/acme/", "acme"),
        ("~", "~"),
        ("mis", "mis"),
    ],
)
def test_of_a_relative_path_the_last_name_is_told(tmp_path: Path, value: str, told: str) -> None:
    """Wherever the card is written, also where the path leads nowhere any more."""
    flags = {"data": value, "languages": ["pl", value]}
    run = run_with(tmp_path / "run", flags, [], hub_ids=["owner/big"])
    assert yaml.safe_load(run_facts.recipe(run)) == {"data": told, "languages": ["pl", told]}


def test_what_came_from_the_hub_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run: a folder like a hub id is none. Of a run that did not, the cache knows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "big").mkdir(parents=True)
    given = {"teacher": "models/big", "data": "owner/texts", "student": None, "vocab_text": "a/b"}
    assert run_plan._hub_ids(given) == ["owner/texts"]
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "owner--big"
    cached.mkdir(parents=True)
    run = run_with(tmp_path / "run", {"teacher": "owner/big"}, [])
    assert yaml.safe_load(run_facts.recipe(run)) == {"teacher": "big"}
    (cached / "source.json").write_text('{"source": "Hugging Face hub owner/big at 0123456789ab"}')
    assert yaml.safe_load(run_facts.recipe(run)) == {"teacher": "owner/big"}


def test_three_english_prompts_with_both_answers(tmp_path: Path) -> None:
    """Of seven, the first, third and fifth; of the stage's own model; none where it has none. A
    second turn is left out, for nobody sees the turns before it in the card.
    """
    answers = []
    for number in range(7):
        answers += [answer(number, model) for model in ("teacher", "distilled", "4-bit")]
    answers += [answer(7, "4-bit", "pl")]
    answers[3:3] = [{**answer(8, name), "kind": "second turn"} for name in ("teacher", "4-bit")]
    run = run_with(tmp_path / "run", {}, answers)
    talks = run_facts.talks(run, "model")
    assert [talk["prompt"] for talk in talks] == ["Question 0?", "Question 2?", "Question 4?"]
    assert talks[1]["answers"] == {
        "teacher": "teacher says 2\nand goes on",
        "4-bit": "4-bit says 2\nand goes on",
    }
    assert list(run_facts.talks(run, "distilled")[0]["answers"]) == ["teacher", "distilled"]
    assert run_facts.talks(run, "pruned") == []
    alone = run_with(tmp_path / "alone", {}, [answer(0, "teacher")])
    assert run_facts.talks(alone, "model") == []
    assert run_facts.talks(tmp_path / "nothing", "model") == []


def test_the_card_of_a_run(finished: tuple[Path, Done]) -> None:
    """The hub's own parser reads it. Settings, table and blocks are the run's."""
    run, _ = finished
    checkpoint = load.open_checkpoint(run / "model")
    text = model_card.readme(
        checkpoint, "owner/big", "x-Q4_1.gguf", ["a fact"], repository="me/small"
    )
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "owner/big",
        "base_model_relation": "finetune",
        "library_name": "mlx",
        "tags": ["mlx", "gguf", "mis_mlx"],
        "pipeline_tag": "text-generation",
    }
    shown = card.text.split("```yaml")[1].split("```")[0]
    assert yaml.safe_load(shown)["iters"] == ITERS
    assert str(run.parent) not in text
    assert (run / "table.md").read_text().strip() in text
    assert "teacher's blocks kept: " in text
    assert f"iters {ITERS}" in text
    assert "- a fact" in text
    assert "ollama create run -f Modelfile" in text
    assert "license of owner/big" in text


def relation(checkpoint: Checkpoint, base: str | None, file: str) -> str | None:
    """What the hub is told of a model and its base."""
    stated = ModelCard(model_card.readme(checkpoint, base, file, [])).data.to_dict()
    return stated.get("base_model_relation")


def test_relations(tmp_path: Path, llama: Checkpoint) -> None:
    """A conversion has none; a file of packed weights is quantized; an aligned model is a
    finetune, as its run began at a model; nothing without a base.
    """
    wanted = {"x-F16.gguf": None, "x-BF16.gguf": None, "x-Q4_1.gguf": "quantized", "": None}
    for file, want in wanted.items():
        assert relation(llama, "owner/big", file) == want
        assert relation(llama, None, file) is None
    run = tmp_path / "sft-001"
    run.mkdir()
    (run / "asked.yaml").write_text("{}\n")
    (run / "config.yaml").write_text("model: owner/big\n")
    shutil.copytree(llama.path, run / "model")
    assert relation(load.open_checkpoint(run / "model"), "owner/big", "") == "finetune"


def test_names_and_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's last model has the run's name; the default teacher is known by its id."""
    run = tmp_path / "goral-001"
    for stage in ("model", "pruned"):
        (run / stage).mkdir(parents=True)
    assert model_card.name_of(run / "model") == "model"
    assert model_card.base_of(run / "model") is None
    (run / "config.yaml").write_text("model: {lr: 0.1}\n")  # another program's
    assert model_card.base_of(run / "model") is None
    (run / "asked.yaml").write_text("{}\n")
    (run / "config.yaml").write_text("teacher: null\n")
    assert model_card.name_of(run / "model") == "goral-001"
    assert model_card.name_of(run / "pruned") == "goral-001-pruned"
    assert model_card.base_of(run / "model") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    cached = tmp_path / "Qwen--Qwen3-0.6B"
    cached.mkdir()
    (cached / "source.json").write_text('{"source": "Hugging Face hub Qwen/Qwen3-0.6B at 0123"}')
    folders = ("/home/me/model", "clients/acme")
    bases = (*((folder, None) for folder in folders), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"))
    for teacher, base in bases:
        (run / "config.yaml").write_text(f"teacher: {teacher}\n")
        assert model_card.base_of(run / "model") == base
    assert model_card.name_of(tmp_path / "SmolLM2") == "SmolLM2"
    assert model_card.base_of(tmp_path / "none" / "SmolLM2") is None
    assert model_card.base_of(tmp_path / "Qwen--Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert (
        model_card.base_of(tmp_path / "SmolLM2-135M-Instruct")
        == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def test_a_model_of_unknown_origin(llama: Checkpoint) -> None:
    """No base, no license claimed, no table, no empty headings."""
    text = model_card.readme(llama, None, "", ["weights in bfloat16"])
    assert "base_model" not in text
    assert "license:" not in text
    assert "## Measured" not in text
    assert "library_name: transformers" in text
    assert "weights in bfloat16" in text


def modelfile(file: str, template: str, stop: str | None) -> str:
    return html.document("Modelfile", {"file": file, "template": template, "stop": stop}) + "\n"


def test_modelfile() -> None:
    """ChatML is written with its stop word; another template is left to Ollama; none is none."""
    text = modelfile("x.gguf", "{{ '<|im_start|>' }}", "<|im_end|>")
    assert text.startswith("FROM ./x.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n" in text
    other = modelfile("x.gguf", "[INST] {{ x }}", "</s>")
    assert "TEMPLATE " not in other.split("#")[0]
    assert "# Ollama looks" in other
    assert modelfile("x.gguf", "", None) == "FROM ./x.gguf\n"
