"""Known numbers: what is stored is what stock mlx_lm and a pencil say, and no path is stored."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx.judge.speed import rounds
from mis_mlx.judge.tasks import instructions, questions
from mis_mlx.models.opening import compute_type
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.test_docs import program

ROOT = Path(__file__).parents[2]
PAIRS = [
    {"good": "if the loop is true the loop ends", "bad": "if the loop are true the loop ends"},
    {"good": "the class has a name", "bad": "the class have a name"},
    {"good": "a function returns the value", "bad": "a function return the value"},
    {"good": "all names are in the list", "bad": "all names is in the list"},
    {"good": "the list is not empty", "bad": "the list are not empty"},
]
PROMPTS = [
    {
        "prompt": f"Write {count} words about sheep, without commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 400}],
    }
    for count in (7, 8, 9)
]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The program, the renderer, files of questions, an empty cache and a folder for results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(questions, "INSTRUCTION_TOKENS", 8)
    for name, rows in (("ifeval", PROMPTS), ("blimp", PAIRS)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    known = program(ROOT / "benchmarks/known_numbers.py")
    results = tmp_path / "benchmarks" / "results" / "here"
    monkeypatch.setattr(sys.modules["laboratory"], "RESULTS", results)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("ifeval", "blimp")}
    return SimpleNamespace(
        program=known,
        render=program(ROOT / "scripts/render.py"),
        files=files,
        stored=results / "known_numbers.json",
        root=tmp_path,
    )


def measured(lab: SimpleNamespace, **given: Any) -> dict[str, Any]:
    """The rows that the program stores."""
    lab.program.main(lab.program.Settings(**given))
    return json.loads(lab.stored.read_text("utf-8"))["rows"]


def log_likelihood(folder: Path, sentence: str) -> float:
    """Of a sentence behind the token that begins a text, by stock mlx_lm."""
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(folder))
    ids = [tokenizer.bos_token_id, *tokenizer.encode(sentence, add_special_tokens=False)]
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sum(logps[place, token].item() for place, token in enumerate(ids[1:]))


def test_pairs_are_marked_as_stock_mlx_lm_marks_them(
    lab: SimpleNamespace, llama: Checkpoint
) -> None:
    """Every second pair; a second call finds the figure stored, and no path is."""
    given: dict[str, Any] = {"teacher": str(llama.path), "models": ("teacher",), "blimp_step": 2}
    given |= {"measures": ("blimp",), "blimp": lab.files["blimp"]}
    figure = measured(lab, **given)["teacher"]["blimp"]
    right = []
    for pair in PAIRS[::2]:
        good = log_likelihood(llama.path, pair["good"])
        right.append(good > log_likelihood(llama.path, pair["bad"]))
    assert figure["questions"] == 3
    assert figure["mean"] == pytest.approx(100 * sum(right) / 3, abs=0.01)
    stored = lab.stored.read_text("utf-8")
    command = json.loads(stored)["command"]
    assert command.endswith("--blimp FILE --blimp-step 2 --measures blimp")
    assert str(lab.root) not in stored
    before = lab.stored.stat().st_mtime_ns
    measured(lab, **given)
    assert lab.stored.stat().st_mtime_ns == before


@pytest.mark.skipif(
    find_spec(instructions.PACKAGE) is None,
    reason=f"if-verifiable is not here: {instructions.INSTALL}",
)
def test_instructions_are_counted_and_shown(lab: SimpleNamespace, llama: Checkpoint) -> None:
    """Eight tokens are fewer than 400 words: at best the commas are right, so no prompt is."""
    given: dict[str, Any] = {"teacher": str(llama.path), "models": ("teacher",)}
    given |= {"measures": ("ifeval",), "ifeval": lab.files["ifeval"]}
    figure = measured(lab, **given)["teacher"]["ifeval"]
    texts = []
    for file in (lab.root / "cache").rglob("*.jsonl"):
        texts += [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]
    without_commas = sum("," not in text for text in texts)
    assert len(texts) == figure["questions"] == 3
    assert figure["instructions"] == 6
    assert figure["prompt_strict"] == figure["prompt_loose"] == 0
    assert figure["inst_strict"] == pytest.approx(100 * without_commas / 6, abs=0.01)
    assert figure["mean"] == pytest.approx(50 * without_commas / 6, abs=0.01)
    page = lab.render.table(lab.root, "here/known-numbers")
    assert f"| teacher | {llama.nbytes / 1e6:.1f} | {figure['mean']:.1f} (" in page
    assert "3 prompts of IFEval; answers to IFEval have at most 8 tokens" in page


def test_calls_of_tools_are_counted_and_shown(lab: SimpleNamespace) -> None:
    """A model that babbles calls nothing: right where no tool is wanted, and in no round.

    A student that is its teacher is neither above nor below it.
    """
    folder = tiny.calling(lab.root / "calling")
    (lab.root / "model").symlink_to(folder)
    given = {"run": str(lab.root), "teacher": str(folder), "models": ("teacher", "4-bit")}
    rows = measured(lab, **given, measures=lab.program.TOOLS, tool_prompts=20)
    row = rows["teacher"]
    assert "above_teacher" not in row["tool-calls"]
    assert rows["4-bit"]["tool-calls"]["above_teacher"] == [0, 0, 0]
    calls, rounds = row["tool-calls"], row["tool-rounds"]
    assert (calls["questions"], rounds["questions"]) == (20, 20)
    assert calls["mean"] == pytest.approx(20)
    assert rounds["mean"] == 0
    page = lab.render.table(lab.root, "here/known-numbers")
    assert "20 prompts with tools, 20 rounds of calls" in page
    assert f"| {100 * calls['shares']['valid JSON']:.1f} | 0.0 (0.0–100.0) |" in page
