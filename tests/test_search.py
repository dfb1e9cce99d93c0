"""`search`, the first phase of `distill`: sizes, bytes, the allowed loss, and what it keeps."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mis_mlx import cli, distill, search
from mis_mlx.distillation import answer_loss, summary
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load
from mis_mlx.quantization import packed_format
from mis_mlx.size_search import candidates, known_losses, ranking, shape_search, size_request
from mis_mlx.size_search.shape_search import Choice, Losses
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError, Row
from tests import tiny
from tests.conftest import Done, last_line, weights

SMOLLM2 = tiny.CONFIG | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
E2B = arch.PUBLISHED["gemma-4-e2b"]
CURVE = [(3.5, 1.0), (4.0, 0.4), (5.0, 0.1), (6.0, 0.02), (8.5, 0.0)]


def test_losses_by_pencil() -> None:
    """Two sizes of the FFN give the power, 0.3 and 0.1 at 1/3 and 1/6: 1.585; tokens and bits as
    they were measured; what learning leaves of each.
    """
    before = shape_of(SMOLLM2)
    points = {"ffn": [(1024, 0.3), (1280, 0.1)], "vocab": [(24_576, 0.06)], "bits": CURVE}
    losses = Losses(before, points, {"ffn": 0.5, "vocab": 1.0, "bits": 0.25})
    choice = Choice(replace(before, ffn=1024, vocab=24_576), 4.5)
    assert losses.by_axis(choice) == pytest.approx({"ffn": 0.3, "vocab": 0.06, "bits": 0.25})
    assert losses.expected(choice) == pytest.approx(0.15 + 0.06 + 0.0625)
    assert losses.by_axis(Choice(before, 5.0)) == {"ffn": 0.0, "vocab": 0.0, "bits": 0.1}


def test_the_best_are_not_neighbours() -> None:
    """Of six numbers of tokens every other one is measured at the most."""
    sizes = shape_search.axis_sizes(SMOLLM2, (12_288, 18_432, 24_576, 36_864))
    points = {"vocab": [(n, 1 / n) for n in sizes["vocab"][:-1]], "bits": CURVE}
    losses = Losses(shape_of(SMOLLM2), points)
    within = shape_search.within(SMOLLM2, sizes, 70e6)
    found = shape_search.best(within, sizes, losses, 10)
    places = sorted(sizes["vocab"].index(choice.shape.vocab) for choice in found)
    assert all(b - a > 1 for a, b in itertools.pairwise(places))
    assert all(shape_search.file_bytes(SMOLLM2, *choice) <= 70e6 for choice in within)


def test_a_trimmed_student_may_need_more_bits_than_its_teacher() -> None:
    """Its small matrices of 8 bits weigh more: it has its own fewest bits, and is not left out."""
    rows = (32_768, 65_536, 131_072)
    sizes = shape_search.axis_sizes(E2B, rows)
    before = shape_of(E2B)
    fewest, most = shape_search.bpw_range(E2B, before)
    losses = Losses(before, {"vocab": [(n, 1e-3) for n in rows], "bits": [(fewest, 0), (most, 0)]})
    found = shape_search.smallest(E2B, sizes, losses, 1.0)
    assert found[0].shape.vocab == 32_768
    assert found[0].bpw == shape_search.bpw_range(E2B, found[0].shape)[0] > fewest


def test_bits_are_probed_where_there_are_students() -> None:
    """Of a teacher with more than 4 bits at least, at those; in hundredths that stay whole."""
    assert candidates.bits_probed(3.5) == (4.0, 5.0)
    assert candidates.bits_probed(4.01) == (4.01, 5.0)
    low, high = candidates.bits_probed(4.9)
    assert low == 4.9 < high
    config = {**tiny.CONFIG, **tiny.MODELS["qwen3_5_text"]}
    config = family({**config, "linear_num_value_heads": 32}).own_config()
    fewest, _ = shape_search.bpw_range(config, shape_of(config))
    sizes = shape_search.axis_sizes(config, ())
    least = shape_search.file_bytes(config, shape_of(config), fewest)
    (choice,) = shape_search.within(config, sizes, least)
    assert choice.bpw == fewest


def test_no_bits_are_not_a_loss_of_nothing(llama: Checkpoint, tmp_path: Path) -> None:
    """Fewer bits than each matrix has at least: refused with both numbers, not an empty choice."""
    paths = packed_format.formats_of(llama.config, 64)
    costs = {path: {bits: 1.0 / bits for bits in (4, 5, 6, 8)} for path in paths}
    (tmp_path / packed_format.SENSITIVITY).write_text(json.dumps(costs))
    nothing: Any = None
    c = candidates.Candidates(
        run=SimpleNamespace(folder=tmp_path),  # type: ignore[arg-type]
        teacher=llama,
        data=nothing,
        asked=nothing,
    )
    assert c.allocated(Choice(shape_of(llama.config), 5.0))
    with pytest.raises(MisError, match=r"4 bits .* 4\.50"):
        c.allocated(Choice(shape_of(llama.config), 4.0))


@pytest.mark.skipif(os.name == "nt", reason="a file in place of a folder is another error there")
def test_a_cache_that_cannot_be_written_stops_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and what was measured stays in the run."""
    (tmp_path / "cache").write_text("a file, no folder")
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    (tmp_path / candidates.PROBES).write_text('{"axis": "ffn", "size": 1, "nats": 0.5}\n')
    known_losses.keep_logs(tmp_path, {"version": known_losses.VERSION})
    assert "not kept for other searches" in capsys.readouterr().err


def test_bytes_that_nothing_reaches_name_what_would(llama: Checkpoint) -> None:
    """FFN is asked where tokens and bits are not enough; where that is not either, both numbers."""
    asked = search.Settings(teacher=str(llama.path), dry_run=True)
    cut = search.plan(asked.with_values(bytes="190KB"), llama, None)
    assert cut is not None and len(cut.sizes["ffn"]) > 1
    whole = search.plan(asked.with_values(bytes="300KB"), llama, None)
    assert whole is not None and len(whole.sizes["ffn"]) == 1
    with pytest.raises(MisError, match=r"--bytes 20KB.* 0\.02 .* 0\.1"):
        search.plan(asked.with_values(bytes="20KB"), llama, None)


def test_a_dry_run_plans_a_student_of_those_bytes(llama: Checkpoint) -> None:
    """Not of the size that a search by loss has."""
    asked = distill.Settings(
        teacher=str(llama.path), bytes="190KB", dry_run=True, max_seq_length=32, conversations=0
    )
    assert distill.run(asked)["params_student"] < arch.params(llama.config)


def test_few_bits_are_said_of_a_model_that_calls_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `distill`, below 4 bits; not of a model that is told of none."""
    for name, make, bpw in (
        ("few", tiny.calling, 3.9),
        ("enough", tiny.calling, 4.0),
        ("none", tiny.talking, 3.9),
    ):
        folder = str(make(tmp_path / name))
        distill.run(distill.Settings(teacher=folder, dry_run=True, target_bpw=bpw))
        assert ("few for calls of tools" in capsys.readouterr().err) == (name == "few")


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
    rises, and the choice is one of its rows. No loss at all is refused. Gone on with, a search that
    is over says the same, and `distill` takes its folder from there.
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
    again = search.run(search.Settings(out=str(tmp_path / "0.003"), resume=True))
    same = ("best", "table", "candidates", "expected_bits")
    assert {name: again[name] for name in same} == {name: result[name] for name in same}
    assert not run_folder.is_decided(tmp_path / "0.003")
    taken = distill.Settings(out=str(tmp_path / "0.003"), resume=True, dry_run=True)
    assert distill.run(taken)["params_student"]
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
    assert known_losses.copy_into_run(new, {**about, "text": "another"}) == 0
    assert known_losses.copy_into_run(new, about) == 1
    assert known_losses.copy_into_run(new, about) == 1


LIMIT = ("--bytes", "190KB")  # below what tokens and bits reach: axes are measured alone
Line = tuple[object, ...]


@pytest.fixture(scope="module")
def line(llama: Checkpoint, text_folder: Path) -> Line:
    """Flags of a `distill` that searches first."""
    return (*tiny.run_flags(llama.path, text_folder), *LIMIT)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, line: Line, command: Callable[..., Done]
) -> tuple[Path, Done]:
    """(run folder, process) of an undisturbed run; do not write into it."""
    here = tmp_path_factory.mktemp("whole")
    done = command("distill", *line, "--out", here / "run", cwd=here)
    assert done.returncode == 0, done.stderr
    return here / "run", done


def test_a_distillation_in_so_many_bytes(whole: tuple[Path, Done], llama: Checkpoint) -> None:
    """A search, then a run with its sizes and bits; the file is no larger than
    asked for.
    """
    run, done = whole
    size = (run / "model" / "model.safetensors").stat().st_size
    assert 0.9 * 190_000 < size <= 190_000
    stored = run_folder.stored_settings(run)
    assert (stored["bytes"], stored["scenario"]) == ("190KB", "none")
    assert stored["target_bpw"] > 3.5
    assert last_line(done)["params_student"] < arch.params(llama.config)
    assert not (run.parent / "runs").exists()


@pytest.mark.thorough
def test_stopped_in_its_search(
    tmp_path: Path,
    line: Line,
    whole: tuple[Path, Done],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--resume finds it, although an older run is unfinished, too; what was measured is not
    measured again; the weights are those of the undisturbed run, to the last bit.
    """
    monkeypatch.chdir(tmp_path)
    older = tmp_path / "runs" / "older-001"
    older.mkdir(parents=True)
    shutil.copy(whole[0] / run_folder.CONFIG, older)
    os.utime(older / run_folder.CONFIG, (1e9, 1e9))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(candidates.Candidates, "scores", stopped)
        distill.run(cli.parse(distill.Settings, list(map(str, line))))
    (run,) = (path for path in Path("runs").iterdir() if path.name != older.name)
    assert not run_folder.is_decided(run)
    probes = run / run_folder.SEARCH / candidates.PROBES
    before = probes.read_text()
    assert before
    assert distill.run(distill.Settings(resume=True))["run"] == str(run)
    assert probes.read_text().startswith(before)
    assert weights(run) == weights(whole[0])
    assert run_folder.stored_settings(run) == run_folder.stored_settings(whole[0])
    assert {path.name for path in older.iterdir()} == {run_folder.CONFIG}
