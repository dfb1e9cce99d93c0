"""The allowed loss: the smallest student that keeps to it, by pencil and from end to end; what
cannot be kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mis_mlx import distill, search
from mis_mlx.distillation import answer_loss, summary
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.size_search import (
    candidates,
    known_losses,
    ranking,
    shape_search,
    size_request,
)
from mis_mlx.size_search.shape_search import Choice, Losses
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError, Row
from tests import tiny
from tests.conftest import Done, last_line
from tests.test_search import SMOLLM2

LEFT = {"ffn": 0.5, "vocab": 1.0, "bits": 0.25}


def losses_of(left: dict[str, float] = LEFT) -> Losses:
    """A teacher that loses 0.3 nats a byte with a third of its neurons gone, and 0.4 in 4 bits."""
    points = {
        "ffn": [(1024, 0.3), (1280, 0.1)],
        "vocab": [(24_576, 0.06), (36_864, 0.02)],
        "bits": [(3.5, 1.0), (4.0, 0.4), (5.0, 0.1), (6.0, 0.02), (8.5, 0.0)],
    }
    return Losses(shape_of(SMOLLM2), points, left)


def test_the_fewest_bits_by_pencil() -> None:
    """Of the whole shape a loss of 0.1 leaves 0.1 / 0.25 = 0.4 nats of rounding, which 4 bits have;
    with 0.02 for tokens 0.08 / 0.25 = 0.32, four fifths of the way back from 5 bits. What the shape
    alone costs leaves none.
    """
    losses = losses_of()
    whole = shape_of(SMOLLM2)
    assert losses.fewest_bits(whole, 0.1, 8.5) == 4.0
    assert losses.fewest_bits(replace(whole, vocab=36_864), 0.1, 8.5) == pytest.approx(4.27)
    assert losses.fewest_bits(replace(whole, vocab=24_576), 0.05, 8.5) is None
    assert losses.fewest_bits(whole, 0.001, 5.5) is None
    assert losses.fewest_bits(whole, 0.5, 8.5) == 3.5  # there are no fewer


@pytest.mark.parametrize("lose", [0.03, 0.1, 0.3])
def test_the_smallest_is_the_smallest_of_all(lose: float) -> None:
    """Against every shape in every hundredth of a bit, one by one: the fewest bytes that should
    lose no more.
    """
    losses = losses_of()
    sizes = shape_search.axis_sizes(SMOLLM2, (24_576, 36_864), ffn=True)
    sizes = {axis: values[-3:] for axis, values in sizes.items()}
    best = shape_search.smallest(SMOLLM2, sizes, losses=losses, lose=lose)

    tried = list[tuple[float, Choice]]()
    for shape in shape_search.shapes(SMOLLM2, sizes):
        for bpw in np.arange(3.5, 8.51, 0.01):
            choice = Choice(shape, round(float(bpw), 2))
            if losses.expected(choice) <= lose:
                tried.append((shape_search.file_bytes(SMOLLM2, *choice), choice))
                break
    assert best[0] == min(tried)[1]
    assert len(best) == len(tried)
    nbytes = [shape_search.file_bytes(SMOLLM2, *choice) for choice in best]
    assert nbytes == sorted(nbytes)


def test_more_steps_leave_less() -> None:
    """Of what is cut; not of tokens or bits, which no step of the student gives back."""
    few = shape_search.remaining_after(30, shape_search.REMAINING_ANSWER_LOSS)
    many = shape_search.remaining_after(300, shape_search.REMAINING_ANSWER_LOSS)
    assert few == pytest.approx(shape_search.REMAINING_ANSWER_LOSS)
    assert shape_search.remaining_after(None, shape_search.REMAINING_ANSWER_LOSS) == few
    assert many["ffn"] < few["ffn"]
    assert many["vocab"] == few["vocab"]
    assert many["bits"] == few["bits"]


def test_the_loss_on_answers(tmp_path: Path) -> None:
    """The teacher loses nothing; few conversations, or text alone, are no measure."""
    chat = load.open_checkpoint(tiny.talking(tmp_path / "teacher"))
    talks = []
    for number in range(10):
        answer = {"role": "assistant", "content": f"It is number {number} of all that are here."}
        talks.append({"messages": [{"role": "user", "content": "Which?"}, answer]})
    pairs = answer_loss.last_answers(talks, 40)
    nothing: Any = None
    data: Any = SimpleNamespace(talks=talks)
    c = candidates.Candidates(run=nothing, teacher=chat, data=data, asked=nothing)
    assert c.answers == pairs
    assert c.lost([c.student(c.before)]) == [0.0]
    assert answer_loss.last_answers(talks[: answer_loss.FEWEST_ANSWERS - 1], 40) == []
    assert answer_loss.last_answers([{"text": "no conversation"}] * 20, 40) == []


def searched(llama: Checkpoint, text_folder: Path, out: Path, **given: Any) -> dict[str, Any]:
    """The result of a small search."""
    brief = {"max_seq_length": 32, "num_samples": 4, "reconstruct_samples": 0}
    paths = {"teacher": str(llama.path), "data": str(text_folder), "out": str(out)}
    return search.run(search.Settings(**paths, **brief, **given))


@pytest.mark.thorough
def test_a_smaller_loss_needs_more_bytes(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two searches of one teacher: less allowed, more bytes. The table falls in bytes as the loss
    rises, and the choice is one of its rows. No loss at all is refused.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    found = {}
    for lose in (0.015, 0.003):
        result = searched(llama, text_folder, tmp_path / str(lose), lose=lose)
        assert 0.5 * lose < result["expected_bits"] <= lose * ranking.CLOSE
        nbytes = [row["bytes"] for row in result["table"]]
        assert nbytes == sorted(nbytes, reverse=True)
        assert result["expected_bytes"] in nbytes
        found[lose] = result["expected_bytes"]
    assert found[0.015] < found[0.003]
    with pytest.raises(MisError, match="--lose 0 .*--lose"):
        searched(llama, text_folder, tmp_path / "none", lose=0.0)


def test_what_is_kept_is_of_this_teacher_and_text(llama: Checkpoint, tmp_path: Path) -> None:
    """Another teacher, another end of its answers, another text, more words, a teacher that
    streams: another identity. What the package ships has the default one's.
    """
    asked = search.Settings(lose=0.1)
    folder = tiny.talking(tmp_path / "chat")
    chat = load.open_checkpoint(folder)
    about = known_losses.identity(llama, "a", asked)
    streamed = known_losses.identity(chat, "a", asked, streams=True)
    others = [
        about,
        streamed,
        known_losses.identity(chat, "a", asked),
        known_losses.identity(llama, "b", asked),
        known_losses.identity(llama, "a", replace(asked, languages=("de",))),
    ]
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    others.append(known_losses.identity(chat, "a", asked))
    assert len(set(map(json.dumps, others))) == len(others)
    assert streamed["coarse"] and not streamed["own_answers"]
    same = replace(asked, lose=0.2, seed=3, max_seq_length=128)
    assert about == known_losses.identity(llama, "a", same)
    shipped = json.loads((known_losses.SHIPPED / known_losses.ABOUT).read_text())
    assert shipped.keys() == about.keys()
    assert shipped["text"] == "built-in"
    assert shipped["version"] == known_losses.VERSION


def test_losses_on_answers_are_not_those_on_text(llama: Checkpoint) -> None:
    """What is known of the built-in text was told on answers, so a search without conversations
    does not use it.
    """
    asked = search.Settings(lose=0.1)

    def known(**given: Any) -> dict[str, Any]:
        return search._identity_of_built_in(asked.with_values(**given), llama, streams=False)

    assert known() == known_losses.identity(llama, "built-in", asked)
    assert known(conversations=0.3) != {}
    assert known(conversations=0.0) == known(data="folder") == {}


@pytest.mark.thorough
def test_a_distillation_by_its_loss(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, command: Callable[..., Done]
) -> None:
    """A search, then a run with its sizes; what was expected stands beside what was reached, and
    the same again from its config.
    """
    flags = tiny.run_flags(llama.path, text_folder)
    done = command("distill", *flags, "--lose", "0.03", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert result["loss_of"] == "text"
    assert 0 < result["expected_loss"] < 0.04
    stored = run_folder.stored_settings(tmp_path / "run")
    assert stored["lose"] == 0.03 and stored["expected_loss"] == result["expected_loss"]
    config = tmp_path / "run" / "config.yaml"
    again = command("distill", "-c", config, "--out", tmp_path / "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert last_line(again)["reached_loss"] == result["reached_loss"]


def test_by_default_a_loss_is_allowed(llama: Checkpoint) -> None:
    """Where nothing is said about sizes, whether the teacher fits or streams; else nothing is
    searched for.
    """
    plain = distill.Settings(teacher=str(llama.path))

    def allowed(**given: Any) -> float | None:
        return size_request.asked_loss(plain.with_values(**given), llama)

    for given in ({}, {"vocab": None}, {"budget": str(llama.nbytes)}):
        assert allowed(**given) == size_request.DEFAULT_LOSS
    said = ({"scenario": "gazda"}, {"layers": 2}, {"vocab": "0.5x"}, {"target_bpw": 4.5})
    for given in said:  # also where it is the default
        assert allowed(**given) is None
    with pytest.raises(MisError, match=r"--layers 2.*--lose 0\.2"):
        allowed(lose=0.2, layers=2)


def test_what_no_search_knows_is_not_cut(models: Callable[[str], Checkpoint]) -> None:
    """Of a gemma4_text, whose rows of 32 no group of 64 divides: a plain run keeps the teacher's
    sizes; what is to be searched for is refused before the teacher writes any text.
    """
    gemma = models("gemma4_text")
    plain = distill.Settings(teacher=str(gemma.path))
    assert size_request.unsearched(plain) == {"scenario": "none"}
    assert size_request.unsearched(plain.with_values(scenario="gazda")) == {}
    assert size_request.asked_loss(plain, gemma) is None
    for given in ({"lose": 0.1}, {"bytes": "1MB"}):
        ((flag, value),) = given.items()
        with pytest.raises(MisError, match=rf"--{flag} {value} .* 64 .*32"):
            distill.run(plain.with_values(**given))


@pytest.mark.parametrize(("reached", "far"), [(0.12, False), (0.14, True), (0.06, True)])
def test_what_was_expected_beside_what_was_reached(reached: float, far: bool) -> None:
    """Within 30 % it is a number beside another; farther off it is said."""
    rows = [Row("teacher", "bpb", 1.0), Row("4-bit", "bpb", 1.0 + reached)]
    found = summary.expectation(0.1, "4-bit", None, {"English": rows})
    assert found == {"expected_loss": 0.1, "reached_loss": reached, "loss_of": "text"}
    told = summary.expectation_sentence(found, 0.11)
    assert all(f"{number:.3f}" in told for number in (reached, 0.1, 0.11))
    assert ("30 %" in told) == far
    assert summary.expectation(None, "4-bit", None, {"English": rows}) == {}


def test_a_stopped_search_begins_with_what_is_known(llama: Checkpoint, tmp_path: Path) -> None:
    """Logs are merged line by line, each once; a folder of another identity is not read."""
    run = tmp_path / "run"
    run.mkdir()
    (run / candidates.PROBES).write_text('{"axis": "ffn", "size": 1, "nats": 0.5}\n')
    about = {"version": known_losses.VERSION, "teacher": "somebody", "text": "t"}
    folder = known_losses.kept_folder(about)
    known_losses.keep_logs(run, about)
    known_losses.keep_logs(run, about)
    assert run_folder.records(folder / candidates.PROBES) == [
        {"axis": "ffn", "size": 1, "nats": 0.5}
    ]

    new = tmp_path / "new"
    new.mkdir()
    assert known_losses.copy_into_run(new, {**about, "text": "another"}, DISK) == 0
    assert known_losses.copy_into_run(new, about, DISK) == 1
    assert known_losses.copy_into_run(new, about, DISK) == 1
