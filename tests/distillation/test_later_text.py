"""A teacher that would be read from disk for every token does not write: its rounded student does,
and the teacher reads that once.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import distill
from mis_mlx.data import prompts
from mis_mlx.distillation import (
    conversations,
    later_text,
    pipeline,
    strategies,
    teacher_answers,
    writers,
)
from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.judge import answers
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.planner import distillation_spec
from mis_mlx.runs import run_loop
from mis_mlx.storage import logit_store, run_folder
from mis_mlx.types import Budget, MisError
from tests import tiny
from tests.conftest import near

MIB = 2**20
ASKED = 12
# Families beside the llama that talks: of these, answers are cut off.
OTHERS = {"qwen3": tiny.KINDS["qwen3"], "gemma3_text": tiny.FAMILIES["gemma3_text"]}


def shorten(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A folder and a cache of their own, few prompts, short answers, a brief look at types."""
    patch.chdir(folder)
    patch.setenv("MIS_MLX_CACHE", str(folder / "cache"))
    patch.setattr(conversations, "FEWEST", ASKED)
    patch.setattr(
        teacher_answers, "WritingSettings", partial(teacher_answers.WritingSettings, max_tokens=12)
    )
    patch.setattr(answers, "ANSWER_TOKENS", 10)
    patch.setattr(answers, "GREEDY_TOKENS", 6)
    patch.setattr(compute_type, "FREQUENT", 2)
    patch.setattr(compute_type, "SPREAD", 2)


def tell(patch: pytest.MonkeyPatch, writer: str) -> None:
    """Who writes, whatever the budget holds."""
    patch.setattr(writers, "who_writes", lambda *_, **__: writer)


@pytest.fixture(
    scope="module", params=["told", pytest.param("streams", marks=pytest.mark.thorough)]
)
def streams(request: pytest.FixtureRequest) -> bool:
    """Whether a deep teacher streams, so that the student writes; else it is told to."""
    return bool(request.param == "streams")


@pytest.fixture
def brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    """Every test is a short one."""
    shorten(monkeypatch, tmp_path)
    if not streams:
        tell(monkeypatch, "student")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, streams: bool) -> Path:
    """One whose answers end."""
    folder = tmp_path_factory.mktemp("later text")
    return tiny.talking(folder / "teacher", **depth(streams))


def depth(streams: bool) -> dict[str, int]:
    """Of a teacher that streams in `little` MiB, or is as small as can be."""
    return {"num_hidden_layers": layers()} if streams else {}


def layers() -> int:
    """Of a teacher that exceeds `little` MiB; in float16 it takes half as much."""
    return int(near(26, 64))


def little() -> int:
    """MiB in which everything fits but a whole teacher that writes."""
    return int(near(20, 24))


def settings(teacher: Path, data: Path, out: Path, **changes: Any) -> distill.Settings:
    """A run of seconds in a budget in which a deep teacher streams; nothing is cut or trained
    before rounding, and targets are stored.
    """
    given: dict[str, Any] = {
        "teacher": str(teacher),
        "data": str(data),
        "out": str(out),
        "budget": f"{little()}MiB",
        "scenario": "none",
        "vocab": "1x",
        "max_seq_length": 32,
        "num_samples": 4,
        "reconstruct_samples": 0,
        "eval_windows": 3,
        "eval_prompts": 3,
        "bench_tokens": 0,
        "q_group_size": 32,
        "q_method": "round",
        "target_bpw": None,
        "q_iters": 4,
        "iters": 2,
        "save_every": 2,
        "targets": "cached",
    }
    return distill.Settings(**{**given, **changes})


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to."""

    out: Path
    said: str
    before_bytes: int  # what other tests of this process held


@pytest.fixture(scope="module")
def whole(
    teacher: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory, streams: bool
) -> Whole:
    """Do not write into it."""
    folder = tmp_path_factory.mktemp("whole")
    before_bytes = mx.get_active_memory()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        shorten(patch, folder)
        if not streams:
            tell(patch, "student")
        distill.run(settings(teacher, text_folder, folder / "run", keep_steps=True))
    return Whole(out=folder / "run", said=said.getvalue(), before_bytes=before_bytes)


def origin(run: Path) -> dict[str, str]:
    """What a run was made from."""
    found = json.loads((run / run_folder.ORIGIN).read_text())
    assert isinstance(found, dict)
    return found


def talks(run: Path) -> list[dict[str, Any]]:
    """What the student of a run wrote."""
    return run_folder.records(run / later_text.FOLDER / "answers.jsonl")


@pytest.mark.usefixtures("brief")
def test_the_student_writes_and_the_teacher_reads_once(whole: Whole, tmp_path: Path) -> None:
    """The answers are the rounded student's, to our prompts; the run has two texts, and targets of
    the second one alone; every phase stays under its plan.
    """
    out = whole.out
    assert "the text begins with the answers that come with the package" in whole.said
    assert f"the rounded student answers {ASKED} prompts" in whole.said
    assert not (out.parent / "runs" / "answers").exists()
    first = {prompt.turns[0] for prompt in prompts.train(ASKED)}
    assert 0 < len(talks(out)) <= ASKED
    assert {talk["messages"][0]["content"] for talk in talks(out)} <= first
    fingerprints = origin(out)
    assert fingerprints["learned"] != fingerprints["data"]
    assert not (out / pipeline.TARGETS).exists()
    stored = json.loads((out / pipeline.LEARNED_TARGETS / logit_store.MANIFEST).read_text())
    assert stored["windows"] <= 4 * 2  # of the steps with scales alone
    start, *took = run_folder.records(out / run_folder.PHASES)
    planned = {phase["phase"]: phase["peak_bytes"] for phase in start["planned"]}
    names = ["quantize", writers.STUDENT, "logit store", "distil scales", "measure"]
    assert list(planned) == names == [phase["phase"] for phase in took]
    for phase in took:
        assert phase["peak_bytes"] - whole.before_bytes <= planned[phase["phase"]], phase
    student = load.open_checkpoint(out / pipeline.ROUNDED)
    alone = tmp_path / "alone.jsonl"
    how = writers.settings_of(ASKED)
    teacher_answers.write(student, how, alone, Budget(500 * MIB))
    assert run_folder.records(alone) == talks(out)


class Killed(BaseException):
    """As a signal would."""


def after(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which is killed when it is called once more than so often."""
    calls = list[int]()

    def counted(*given: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) > count:
            raise Killed
        return real(*given, **how)

    return counted


def answered(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Answers, of which the one after so many is not there any more."""

    def some(*given: Any, **how: Any) -> Iterator[Any]:
        for number, found in enumerate(real(*given, **how)):
            if number == count:
                raise Killed
            yield found

    return some


KILLS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "before the first answer": (answers, "answered", partial(answered, 0)),
    "among answers": (answers, "answered", partial(answered, 5)),
    "behind the answers": (later_text.token_windows, "fingerprint", partial(after, 1)),
    "among targets": (logit_store.Targets, "put", partial(after, 2)),
    "among steps": (run_loop.CheckpointedTraining, "save", partial(after, 1)),
}


@pytest.mark.thorough
@pytest.mark.usefixtures("brief")
def test_killed_in_each_phase_it_ends_the_same(
    whole: Whole,
    teacher: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    streams: bool,
) -> None:
    """The same answers, texts and weights, of one run that every kill hits; and who writes is
    decided once: another budget, in which the teacher would fit, changes nothing.
    """
    out = tmp_path / "run"
    asked = settings(teacher, text_folder, out)
    for what, (place, name, kill) in KILLS.items():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, kill(getattr(place, name)))
            distill.run(asked)
        asked = distill.Settings(out=str(out), resume=True, eval_prompts=0)
        if what == "among answers":
            asked = asked.with_values(budget="200MiB")
            if not streams:
                tell(monkeypatch, "teacher")
    distill.run(asked)
    assert talks(out) == talks(whole.out)
    made, wanted = (run / "model" / "model.safetensors" for run in (out, whole.out))
    assert made.read_bytes() == wanted.read_bytes()
    mine, theirs = origin(out), origin(whole.out)
    assert (mine["data"], mine["learned"]) == (theirs["data"], theirs["learned"])


def test_another_text_is_another_run(teacher: Path, text_folder: Path, tmp_path: Path) -> None:
    """A run whose scales began to learn from a text is refused with another one."""
    out = tmp_path / "run"
    out.mkdir()
    (out / run_folder.ORIGIN).write_text(json.dumps({"data": "0"}))
    files = run_folder.Files()
    run_folder.same_learned(out, "a" * 20, files)
    run_folder.same_learned(out, "a" * 20, files)
    with pytest.raises(MisError, match=r"learn from \(aaaaaaaaaaaa is now bbbbbbbbbbbb\) changed"):
        run_folder.same_learned(out, "b" * 20, files)


@pytest.mark.usefixtures("brief")
def test_a_student_that_says_nothing_learns_from_the_first_text(
    text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], streams: bool
) -> None:
    """Said, with both numbers."""
    silent = tiny.talking(tmp_path / "silent", ending=50.0, **depth(streams))
    out = tmp_path / "run"

    distill.run(settings(silent, text_folder, out, eval_prompts=0))

    said = capfd.readouterr().err
    why = f"of {ASKED} student's answers only 0 are neither empty nor loops"
    assert f"scales learn from the same text as before: {why}" in said
    assert "learned" not in origin(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_families(
    kind: str, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their students write, too."""
    shorten(monkeypatch, tmp_path)
    changes = {**OTHERS[kind], "model_type": kind, "num_hidden_layers": layers()}
    teacher = tiny.make(tmp_path / "teacher", **changes)
    (teacher / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    out = tmp_path / "run"

    result = distill.run(settings(teacher, text_folder, out, eval_prompts=0))

    assert 0 < len(talks(out)) <= ASKED
    assert origin(out)["learned"] != origin(out)["data"]
    assert result["nll_quantized"] < result["nll_teacher"] + 1


def test_a_teacher_that_fits_writes(tmp_path: Path) -> None:
    """And one that does not fit whole does not."""
    deep = tiny.talking(tmp_path / "deep", **depth(streams=True))
    m = model_of(load.open_checkpoint(deep))

    assert writers.who_writes(m, ASKED, Budget(200 * MIB)) == "teacher"
    assert writers.who_writes(m, ASKED, Budget(little() * MIB)) == "student"
    assert writers.who_writes(m, ASKED, Budget(MIB)) == "student"


def test_a_second_store_where_weights_learned_before() -> None:
    """Targets of both texts are kept, each before the phase that learns from them; nothing where
    nobody writes.
    """
    m = model_of({**tiny.CONFIG, "num_hidden_layers": layers()}, gpu=False)
    asked = distill.Settings(iters=10, max_seq_length=32, q_iters=4, targets="cached")
    job = distillation_spec.spec_of(m, m, asked, asked)

    def names(conversations: int) -> list[str]:
        wanted = replace(job, conversations=conversations, writer="student")
        plan = strategies.best_plan(wanted, 400 * MIB, M1_AIR)
        return list(plan.planned)

    silent = ["prune", "repair", "logit store", "distil", "quantize", "distil scales", "measure"]
    assert names(0) == silent
    assert names(ASKED) == [
        *silent[:5],
        writers.STUDENT,
        writers.SECOND_STORE,
        *silent[5:],
    ]
