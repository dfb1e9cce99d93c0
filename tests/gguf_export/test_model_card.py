"""gguf_export/model_card.py: the papers of an export say where the model came from, and nothing
that is not known.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mis_mlx.gguf_export import model_card
from mis_mlx.reporting import html
from mis_mlx.types import Checkpoint
from tests.conftest import ITERS, Done


def test_the_card_of_a_run(finished: tuple[Path, Done]) -> None:
    """Front matter that YAML reads, the run's own table to the letter, blocks kept, settings."""
    from mis_mlx.models.opening import load

    run, _ = finished
    text = model_card.readme(
        load.open_checkpoint(run / "model"), "owner/teacher", "x.gguf", ["a fact"]
    )
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "owner/teacher"
    assert front["library_name"] == "gguf"
    assert "license" not in front
    assert (run / "table.md").read_text().strip() in text
    assert "teacher's blocks kept: " in text
    assert f"iters {ITERS}" in text
    assert "- a fact" in text
    assert "ollama create run -f Modelfile" in text
    assert "license of owner/teacher" in text


def test_names_and_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's last model has the run's name, an earlier stage says so; the default teacher is known
    by its id.
    """
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
    """ChatML is written out with its stop word; another template is left to Ollama; none stays
    none.
    """
    text = modelfile("x.gguf", "{{ '<|im_start|>' }}", "<|im_end|>")
    assert text.startswith("FROM ./x.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n" in text
    other = modelfile("x.gguf", "[INST] {{ x }}", "</s>")
    assert "TEMPLATE " not in other.split("#")[0]
    assert "# Ollama looks" in other
    assert modelfile("x.gguf", "", None) == "FROM ./x.gguf\n"
