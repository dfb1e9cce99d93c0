"""The prompts with tools that come with the package are those that the program writes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mis_mlx.data import prompts
from mis_mlx.judge.tasks import tool_tasks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_files_are_what_the_program_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; and what judges shares no tool and no prompt with what is learned."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    program = importlib.import_module("tool_prompts")
    program.main(tmp_path / "judges", tmp_path / "learns")
    for made, kept in (
        (tmp_path / "judges", tool_tasks.SETS),
        (tmp_path / "learns", prompts.TRAIN.parent),
    ):
        files = sorted(path.name for path in made.iterdir())
        assert files
        for name in files:
            assert (made / name).read_bytes() == (kept / name).read_bytes(), name
    judging = {tool["function"]["name"] for tool in program.toolbox(program.JUDGE)}
    learned = {tool["function"]["name"] for tool in program.toolbox(program.LEARN)}
    assert len(judging) == len(learned) == 12
    assert not judging & learned
    (single,) = tool_tasks.tasks([tool_tasks.CALLS], 400)
    asked = {turn for prompt in prompts.train(tools=True) for turn in prompt.turns}
    assert not asked & {question.context for question in single.questions}
