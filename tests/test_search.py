"""The command `search`: students within limits, how they are ranked, measured and judged; kills and
refusals.
"""

from __future__ import annotations

import itertools
import math
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import cli, distill, search
from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.data.token_windows import Windows
from mis_mlx.judge import comparison
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.pruning import calibrate, select, slicing
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.reporting import text
from mis_mlx.size_search import candidates, finalists, limits, shape_search
from mis_mlx.size_search.candidates import Candidates
from mis_mlx.size_search.shape_search import Choice, Losses
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, MisError
from tests import forks, tiny
from tests.conftest import Done, last_line, sentence

SMALL: dict[str, Any] = dict(
    bytes="190KB",
    axes=search.ALL_BUT_HIDDEN,
    max_seq_length=32,
    num_samples=4,
    reconstruct_samples=0,
    rank_windows=3,
    eval_windows=60,  # fewer say nothing about eight steps
    iters=8,
    evaluations=3,
    finalists=2,
    learning_rate=2e-4,
)
SMOLLM2 = {
    **tiny.CONFIG,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "head_dim": 64,
}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
LOGS = (candidates.PROBES, candidates.CANDIDATES, finalists.FINALISTS, "table.md")


def as_flags(settings: dict[str, Any]) -> list[object]:
    """Keyword settings as a command line has them."""
    flags = list[object]()
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *values]
    return flags


@pytest.fixture(scope="module")
def small(llama: Checkpoint, text_folder: Path) -> search.Settings:
    """A search of seconds: three students of the tiny llama."""
    return search.Settings(teacher=str(llama.path), data=str(text_folder), **SMALL)


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory,
    llama: Checkpoint,
    text_folder: Path,
    command: Callable[..., Done],
) -> tuple[Path, Done]:
    """(run folder, process) of one undisturbed search; do not write into it."""
    out = tmp_path_factory.mktemp("search") / "run"
    run = command(
        "search", "--teacher", llama.path, "--data", text_folder, *as_flags(SMALL), "--out", out
    )
    assert run.returncode == 0, run.stderr
    return out, run


def sizes(record: dict[str, Any]) -> dict[str, Any]:
    """Of a line of a log."""
    return {axis: record[axis] for axis in (*shape_search.CUTS, "bits")}


@pytest.mark.thorough
def test_end_to_end(done: tuple[Path, Done], llama: Checkpoint) -> None:
    """The likeliest within the limit are measured once, the best two distilled and rounded, no
    student is left over; every folder has at most the bytes asked for.
    """
    out, run = done
    result = last_line(run)
    assert len(result["candidates"]) == 3 < result["students"]
    assert all(
        150_000 < each["bytes"] <= 190_000 for each in result["candidates"] + result["finalists"]
    )
    measured = [sizes(each) for each in result["candidates"]]
    assert all(sizes(each) in measured for each in result["finalists"])
    assert len(result["finalists"]) == 2
    assert {p.name for p in out.iterdir()} - {"thermal.jsonl", ".lock"} == {
        "asked.yaml",
        "config.yaml",
        "taken.json",
        "origin.json",
        "plan.json",
        "result.json",
        "finalists",
        "sensitivity.json",
        *LOGS,
    }
    assert not list((out / "finalists").iterdir())
    assert f"students within --bytes 190KB: {result['students']}; 3 are measured" in run.stderr
    assert (out / "table.md").read_text() in run.stdout
    assert "Traceback" not in run.stderr
    axes = {record["axis"] for record in run_folder.records(out / candidates.PROBES)}
    assert axes == {"layers", "ffn", "heads"}  # the tiny tokenizer is as small as can be


@pytest.mark.thorough
def test_the_table_says_what_the_log_holds(done: tuple[Path, Done], llama: Checkpoint) -> None:
    """Columns are the finalists; each mean is of the windows in the log; distilled is better than
    pruned.
    """
    out, run = done
    records = run_folder.records(out / finalists.FINALISTS)
    rows = [line.split("|") for line in run.stdout.splitlines()]
    lines = {cells[1].strip(): cells[2:-1] for cells in rows if len(cells) > 3}
    for metric, (label, form) in text.TABLES["search"].items():
        if isinstance(records[0].get(metric), list):
            assert [c.split("±")[0].strip() for c in lines[label]] == [
                format(np.mean(r[metric]), form) for r in records
            ]
            assert all("±" in cell for cell in lines[label])
            assert all(len(r[metric]) == SMALL["eval_windows"] for r in records)
    assert all(np.mean(r["kl_distilled"]) < np.mean(r["kl_pruned"]) for r in records)
    before = shape_of(llama.config)
    shapes = []
    for record in records:
        cut = {axis: record[axis] for axis in (*shape_search.CUTS, "kv_heads")}
        shapes.append(replace(before, **cut))
    names = [
        f"{shape_search.words(x, before)}, {r['bits']:.2f} bits"
        for x, r in zip(shapes, records, strict=True)
    ]
    assert (
        next(x for x in run.stdout.splitlines() if x.startswith("| | "))
        == f"| | {' | '.join(names)} |"
    )


@pytest.mark.thorough
def test_the_line_it_recommends_is_one_that_distill_takes(
    done: tuple[Path, Done], in_process: Callable[..., Done]
) -> None:
    """The student that the line makes has the parameters of the finalist."""
    result = last_line(done[1])
    words = shlex.split(result["command"])
    assert words[:2] == ["scripts/mis", "distill"]
    dry = in_process("distill", *words[2:], "--dry-run", "--max-seq-length", 32)
    assert dry.returncode == 0, dry.stderr
    assert last_line(dry)["params_student"] in [f["params"] for f in result["finalists"]]


@pytest.mark.thorough
def test_the_score_is_that_of_a_student_by_hand(
    tmp_path: Path, done: tuple[Path, Done], small: search.Settings
) -> None:
    """Calibrated on the run's windows, pruned by plain importance, every matrix rounded to the bits
    that its costs in the teacher give it, compared on some windows of valid.jsonl, which judge
    nothing: the log's nats, to the last bit; by Metal's policy, which computes what is in a file as
    it is stored, to half a per cent.
    """
    record = run_folder.records(done[0] / candidates.CANDIDATES)[-1]
    teacher = load.open_checkpoint(str(small.teacher))
    data = preparation.prepare(small.data, load.tokenizer(teacher.path), 32)
    at = np.random.default_rng([0, 1, 1]).permutation(len(data.train.tokens))[:4]
    windows = [mx.array(data.train.tokens[i][None]) for i in at]
    cut = {axis: record[axis] for axis in shape_search.CUTS[:-1]}
    statistics, _ = calibrate.calibrate(teacher, windows)
    how = select.PruningConfig(scenario="none", importance="rms", **cut)
    shape, keep = select.select_units(dict(teacher.config), statistics, how)
    slicing.write_student(
        teacher, shape, keep=keep, out=tmp_path / "s", dtype="bfloat16", files=DISK
    )
    student = load.open_checkpoint(tmp_path / "s")
    nats = bit_allocation.costs(teacher, windows, 64, rounding.CANDIDATE_BITS, fit=True)
    costs = {}
    weights = {}
    for name, size in arch.tensors_of(student.config).items():
        path = name.removesuffix(".weight")
        source = path.replace(f".{(i := arch.block_of(name))}.", f".{keep.layers[i or 0]}.", 1)
        if source in nats:
            weights[path] = math.prod(size)
            share = weights[path] / math.prod(arch.tensors_of(teacher.config)[f"{source}.weight"])
            costs[path] = {bits: share * cost for bits, cost in nats[source].items()}
    group = shape_search.group_of(shape)
    bits = bit_allocation.allocate(costs, weights, record["bits"] - 32 / group)
    layout = {path: packed_format.Format(each, group) for path, each in bits.items()}
    packed_format.write_quantized(student, tmp_path / "m", layout, DISK, fit=True)
    assert data.choosing is not None
    held_out = comparison.spread_windows(data.choosing, 3)
    both = {"teacher": teacher, "student": load.open_checkpoint(tmp_path / "m")}
    kl = comparison.compare(both, held_out)["student", "kl"]
    assert held_out.text_bytes is not None
    nats_by_hand = (kl * 31).sum() / held_out.text_bytes.sum()
    apart = 0 if precision.policy() == "cpu" else 5e-3
    assert record["nats"] == pytest.approx(nats_by_hand, rel=apart, abs=0)
    assert both["student"].nbytes == record["bytes"]


def test_bytes_leave_no_sizes_to_say(
    llama: Checkpoint, text_folder: Path, in_process: Callable[..., Done]
) -> None:
    """`distill --bytes` beside a size or bits: what to leave out. (That the file is no larger than
    asked for: test_search_phase.py.)
    """
    flags = tiny.run_flags(llama.path, text_folder)
    refused = {
        ("--layers", 2): "leave out --layers 2, or --bytes",
        ("--target-bpw", 5): "leave out --target-bpw 5.0, or",
        ("--quantize", 0): "--quantize 0 turns them off",
    }
    for more, why in refused.items():
        assert why in sentence(in_process("distill", *flags, "--bytes", "190KB", *more))


def test_sensitivity_keeps_to_the_plan_of_its_own(
    tmp_path: Path, llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps what enters every block: those states go to disk where the budget holds those of one
    block alone.
    """
    seen = list[Any]()
    monkeypatch.setattr(
        bit_allocation, "costs", lambda *given, **named: seen.append(named["kept"]) or {}
    )
    windows = [mx.zeros((1, 32), mx.int32)] * 8
    for name, budget_bytes in (("much", 2**30), ("little", 2**20)):
        (tmp_path / name).mkdir()
        plan = SimpleNamespace(budget_bytes=budget_bytes, held_windows=lambda _: 8)
        asked = SimpleNamespace(num_samples=8, seed=0)
        place = tmp_path / name
        run: Any = SimpleNamespace(teacher=llama, folder=place, files=DISK, plan=plan, recipe=asked)
        run.pick = lambda *_: windows
        nothing: Any = None
        assert (
            Candidates(
                run=run, data=nothing, ranking=nothing, judging=nothing, settings=nothing
            ).sensitivity
            == {}
        )
    assert seen[0] is None
    assert isinstance(seen[1], Spool)


def kill_at(
    out: Path, flags: list[object], env: dict[str, str], reached: Callable[[], bool]
) -> None:
    """Start or resume a search and SIGKILL it once `reached`."""
    process = forks.start(
        ["-m", "mis_mlx.search", *flags, "--out", out], env, stderr=subprocess.DEVNULL
    )
    while not reached() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the kill came too late"


@pytest.mark.thorough
def test_killed_and_resumed_is_the_undisturbed_search(
    tmp_path: Path,
    done: tuple[Path, Done],
    llama: Checkpoint,
    text_folder: Path,
    own_home: dict[str, str],
    command: Callable[..., Done],
) -> None:
    """SIGKILL among the candidates and in the first finalist's training: logs and tables are equal
    byte for byte.
    """
    out = tmp_path / "run"
    flags = ["--teacher", llama.path, "--data", text_folder, *as_flags(SMALL)]
    kill_at(out, flags, own_home, lambda: len(run_folder.records(out / candidates.CANDIDATES)) >= 2)
    kill_at(out, ["--resume"], own_home, lambda: any(out.glob("finalists/*/metrics.jsonl")))
    resumed = command("search", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from step" in resumed.stderr
    for name in LOGS:
        assert (out / name).read_bytes() == (done[0] / name).read_bytes(), name
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.thorough
def test_nothing_is_measured_twice(
    tmp_path: Path,
    done: tuple[Path, Done],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Resumed from its logs alone, with no way to prune, it says the same; a torn line is measured
    again.
    """
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    lines = (out / finalists.FINALISTS).read_text().splitlines(keepends=True)
    monkeypatch.setattr(Candidates, "prune", lambda *_: pytest.fail("measured again"))
    search.run(search.Settings(resume=True, out=str(out)))
    assert capsys.readouterr().out.strip() == (done[0] / "table.md").read_text().strip()
    monkeypatch.undo()
    (out / finalists.FINALISTS).write_text(lines[0] + lines[1][:40])
    search.run(search.Settings(resume=True, out=str(out)))
    assert (out / finalists.FINALISTS).read_text() == lines[0] + lines[1][:40] + "\n" + lines[1]
    assert (out / "table.md").read_bytes() == (done[0] / "table.md").read_bytes()


@pytest.mark.thorough
def test_a_resumed_search_keeps_its_flags_and_is_no_distillation(
    done: tuple[Path, Done], finished: tuple[Path, Done], in_process: Callable[..., Done]
) -> None:
    """Another --seed is refused by name; neither command goes on with the other's run."""
    with pytest.raises(MisError, match="--seed is 3, but the run has 0"):
        search.run(search.Settings(resume=True, out=str(done[0]), seed=3))
    said = sentence(in_process("distill", "--resume", "--out", done[0]))
    assert "which this command does not know" in said
    with pytest.raises(MisError, match="which this command does not know"):
        search.run(search.Settings(resume=True, out=str(finished[0])))


@pytest.mark.thorough
def test_a_stop_in_a_training_names_the_search(
    tmp_path: Path, done: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `pipeline.train` says of the finalist's own folder is said of the run's, which --resume
    takes.
    """
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    (out / finalists.FINALISTS).unlink()

    by_hand = KeyboardInterrupt()

    def stopped(c: Any, _: Checkpoint) -> None:
        raise MisError(
            f"stopped at step 2 of 8, everything is saved: continue with --out {c.folder} --resume"
        ) from by_hand

    monkeypatch.setattr(finalists.pipeline, "train", stopped)
    with pytest.raises(MisError, match=f"continue with --out {out} --resume$") as caught:
        search.run(search.Settings(resume=True, out=str(out)))
    assert caught.value.__cause__ is by_hand  # which the exit code goes by


def test_gradients_that_are_no_numbers(tmp_path: Path, small: search.Settings) -> None:
    """What bits cost is made of them: one sentence, with the way out."""
    loud = tiny.loud(load.open_checkpoint(str(small.teacher)), tmp_path / "loud")
    with pytest.raises(MisError, match="the cost of bits cannot be measured"):
        search.run(replace(small, teacher=str(loud), out=str(tmp_path / "run")))


@pytest.mark.slow
def test_a_training_that_diverges_is_unstable_and_not_the_end(
    tmp_path: Path, small: search.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients beyond float32: set back once, then the guard gives up on both finalists; nothing
    is recommended.
    """
    loud = tiny.loud(load.open_checkpoint(str(small.teacher)), tmp_path / "loud")
    loudly = replace(
        small, teacher=str(loud), bytes=None, params="0.667x", out=str(tmp_path / "run")
    )
    result = search.run(loudly)  # bits are as usual: their costs are gradients too
    assert [f["unstable"] for f in result["finalists"]] == ["its loss became NaN or infinite"] * 2
    assert result["command"] is None and "No finalist was stable" in capsys.readouterr().out


def test_bytes_are_what_is_written(tmp_path: Path, llama: Checkpoint) -> None:
    """Of the file that `quantize` writes, header and all, give or take a hundredth."""
    four = {
        path: packed_format.Format(4, 64) for path in packed_format.formats_of(llama.config, 64)
    }
    packed_format.write_quantized(llama, tmp_path / "q4", four, DISK)
    before = shape_of(llama.config)
    on_disk = limits.bytes_limit(llama.config, "1MB").cost(before, 4.5)
    assert on_disk == pytest.approx(
        (tmp_path / "q4" / "model.safetensors").stat().st_size, rel=0.01
    )


def test_a_plan_as_a_user_asks_for_it(llama: Checkpoint, in_process: Callable[..., Done]) -> None:
    """--dry-run: phases on stderr, bytes and seconds in the JSON, nothing started."""
    flags = (
        "--teacher",
        llama.path,
        "--bytes",
        "190KB",
        "--dry-run",
        "--max-seq-length",
        32,
    )
    done = in_process("search", *flags)
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert result["peak_bytes"] <= result["budget_bytes"]
    assert result["read_bytes"] > result["written_bytes"] > 0
    assert "calibrate: " in done.stderr
    assert "finalists" in done.stderr
    assert "run" not in result
    assert "candidates" not in result
    done = in_process("search", *flags, "--budget", "1MiB", "--axes", "layers", "ffn", "bits")
    assert done.returncode == 3
    assert last_line(done)["check_failed"] is True


EVERY = ("layers", "ffn", "heads", "hidden", "vocab", "bits")
ROWS = (12_288, 24_576)


def test_choices_are_all_that_meet_the_limits() -> None:
    """All combinations of sizes through the gate, one by one: those within the bytes, in the most
    bits that fit.
    """
    sizes_of = shape_search.axis_sizes(SMOLLM2, EVERY, ROWS)
    assert sizes_of["heads"] == (3, 6, 9)
    assert sizes_of["ffn"] == (512, 768, 1024, 1280, 1536)
    assert sizes_of["vocab"] == (*ROWS, 49_152)
    assert sizes_of["hidden"] == (288, 576)
    assert len(sizes_of["layers"]) == 13  # twelve below the teacher's, evenly spread
    few = {axis: values[-3:] for axis, values in sizes_of.items()}
    limit = limits.bytes_limit(SMOLLM2, "45MB")
    found = list(shape_search.choices(SMOLLM2, few, [limit], True))
    tried = set()
    for layers, ffn, heads, hidden, vocab in itertools.product(
        *(few[axis] for axis in shape_search.CUTS)
    ):
        try:
            kv = heads // 3  # whole groups go
            shape = arch.target_shape(
                SMOLLM2, {}, layers=layers, ffn=ffn, heads=heads, kv_heads=kv, hidden=hidden
            )
        except MisError:
            continue
        if limit.cost(shape := replace(shape, vocab=vocab), 3.5) <= 45_000_000:
            tried.add(shape)
    assert {choice.shape for choice in found} == tried
    assert len(found) == len(tried) > 20
    for choice in found:
        assert limit.cost(*choice) <= 45_000_000
        assert (
            choice.bpw == 8.5
            or limit.cost(choice.shape, choice.bpw + 0.01) > 45_000_000
            or (shape_search.group_of(choice.shape) == 32)
        )
    usual = list(shape_search.choices(SMOLLM2, few, [limit], False))
    assert usual
    assert {choice.bpw for choice in usual} == {4.5}
    named = limits.params_limit(SMOLLM2, "0.667x")
    assert all(choice.bpw == 4.5 for choice in shape_search.choices(SMOLLM2, few, [named], True))


def test_heads_go_with_their_keys_where_the_number_allows_it() -> None:
    """Three heads a group: six are two groups. Seven a group: twelve are six of each, seven are one
    group. What is recommended is taken by `distill`, and makes that shape. One group: a part of it
    goes.
    """
    groups = shape_of(SMOLLM2)
    assert [arch.kv_heads(groups, n) for n in (9, 6, 3)] == [3, 2, 1]
    assert [arch.kv_heads(replace(groups, heads=14, kv_heads=2), n) for n in (14, 12, 7, 6)] == [
        2,
        2,
        1,
        2,
    ]
    choice = Choice(replace(groups, heads=6, kv_heads=2, layers=20), 4.5)
    given = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in search.flags_of(choice, groups).items()
    ]
    asked = cli.parse(distill.Settings, given)
    assert select.wanted_shape(SMOLLM2, asked) == choice.shape
    assert "kv_heads" in choice.sizes
    assert "6h2" in choice.name
    few, single = ({**SMOLLM2, "num_attention_heads": 20, "num_key_value_heads": n} for n in (4, 1))
    heads = [
        shape_search.axis_sizes({**of, "hidden_size": 1280}, ("heads",), ())["heads"]
        for of in (few, single)
    ]
    # transformers wants heads that divide the hidden size
    assert heads == [(5, 10, 20), (5, 8, 10, 16, 20)]


def test_losses_by_pencil() -> None:
    """A quarter of the layers costs 1, half of them 4: a square. One point: a square too.
    Vocabularies are the points themselves, bits lie between theirs; what is expected to be left is
    a share of each.
    """
    before = shape_of(SMOLLM2)
    points = {
        "layers": [(20, 0.36), (25, 0.09)],
        "heads": [(6, 1.0)],
        "vocab": [(24_576, 0.05)],
        "bits": [(3.5, 0.4), (4.5, 0.1)],
    }
    losses = Losses(before, points)
    choice = Choice(replace(before, layers=15, heads=3, kv_heads=1, vocab=24_576), 4.0)
    assert losses.by_axis(choice) == pytest.approx(
        {"layers": 0.81, "heads": 4.0, "vocab": 0.05, "bits": 0.25}
    )
    assert losses.raw(choice) == pytest.approx(5.11)
    left = shape_search.REMAINING_LOSS
    expected = (
        0.81 * left["layers"] + 4.0 * left["heads"] + 0.05 * left["vocab"] + 0.25 * left["bits"]
    )
    assert losses.expected(choice) == pytest.approx(expected)
    parts = Choice(replace(choice.shape, kv_heads=3), 4.0)  # of every group
    assert losses.expected(parts) == pytest.approx(
        expected + 4.0 * (shape_search.REMAINING_LOSS_OF_PARTIAL_GROUPS - left["heads"])
    )
    assert losses.raw(Choice(before, 4.5)) == pytest.approx(0.1)


def test_the_best_are_not_neighbours() -> None:
    """The first is the one of least loss among all; no two are one step along one axis apart."""
    sizes_of = shape_search.axis_sizes(SMOLLM2, EVERY[:3], ())
    losses = Losses(
        shape_of(SMOLLM2), {"layers": [(20, 1.0)], "ffn": [(1024, 1.0)], "heads": [(6, 2.0)]}
    )
    within = list(
        shape_search.choices(SMOLLM2, sizes_of, [limits.params_limit(SMOLLM2, "0.667x")], True)
    )
    best = shape_search.best(within, sizes_of, losses, 5)
    assert best[0] == min(within, key=losses.expected)
    assert len(best) == 5
    for one, other in itertools.combinations(best, 2):
        steps = [
            abs(v.index(getattr(one.shape, a)) - v.index(getattr(other.shape, a)))
            for a, v in sizes_of.items()
        ]
        assert sum(steps) > 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            dict(params="0.05x"),
            "that is 26k parameters (0.050x), but the smallest possible student has",
        ),
        (
            dict(params="1.2x"),
            "that is 615k parameters, but the teacher has only 512k: ask for fewer",
        ),
        (
            dict(params="0.667y"),
            "--params '0.667y' is not understood: write a share of the teacher, such as 0.667x",
        ),
        (dict(params="-1x"), "is not understood"),
        (dict(bytes="20KB"), "that is 0.02 MB, but the smallest possible student has"),
        (dict(bytes="20KB"), "or add hidden vocab to `search --axes`"),
        (dict(bytes="3 apples"), "--bytes '3 apples' is not a size"),
        (dict(finalists=-1), "--finalists is -1: give 0 or more"),
        (dict(eval_windows=1), "--eval-windows is 1: give 2 or more"),
        (dict(params="0.667x", budget="10MB"), "the budget is 10 MiB: give --budget"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    tmp_path: Path, llama: Checkpoint, text_folder: Path, flags: dict[str, Any], said: str
) -> None:
    """Refused before any folder is made, with both numbers and what to do."""
    out = tmp_path / "run"
    with pytest.raises(MisError) as error:
        search.run(
            search.Settings(teacher=str(llama.path), data=str(text_folder), out=str(out), **flags)
        )
    assert said in str(error.value)
    assert not out.exists()


def test_a_teacher_that_cannot_be_cut_everywhere(
    tmp_path: Path, in_process: Callable[..., Done]
) -> None:
    """FFN 64 and one head: what stays is named; too much is one sentence, no broken model."""
    stuck = tiny.make(
        tmp_path / "stuck",
        intermediate_size=64,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
    )
    done = in_process(
        "search", "--teacher", stuck, "--params", "0.8x", "--dry-run", "--max-seq-length", 32
    )
    assert done.returncode == 0, done.stderr
    assert "ffn 64, heads 1, vocab 512 stay unchanged" in done.stderr
    said = sentence(in_process("search", "--teacher", stuck, "--params", "0.1x"))
    assert (
        "the smallest possible student has" in said
        and "add ffn heads hidden vocab to `search --axes`" in said
    )


def test_a_teacher_that_cannot_be_packed(tmp_path: Path) -> None:
    """No group divides an FFN of 1000: said before any work; of students in the usual bits it can
    be the teacher.
    """
    odd = search.Settings(
        teacher=str(tiny.make(tmp_path / "odd", intermediate_size=1000)),
        bytes="190KB",
        axes=search.ALL_BUT_HIDDEN,
        dry_run=True,
    )
    with pytest.raises(
        MisError, match="the rows of this teacher's matrices are not divisible by 32"
    ):
        search.run(replace(odd, max_seq_length=32))
    assert search.run(replace(odd, max_seq_length=32, bytes=None, params="0.667x"))["students"] > 0


def test_mixtures_are_for_other_commands(models: Callable[[str], Checkpoint]) -> None:
    """One sentence, with the flag that cuts them."""
    with pytest.raises(MisError, match="search supports dense models only"):
        search.run(search.Settings(teacher=str(models("qwen3_moe").path)))


@pytest.mark.parametrize("kind", [*tiny.KINDS, "lfm2"])
def test_every_kind_has_students_that_loaders_take(kind: str) -> None:
    """Every choice passes arch's gate; a qwen2 keeps heads and hidden."""
    config = {**tiny.CONFIG, **(tiny.KINDS | tiny.FAMILIES)[kind]}
    sizes_of = shape_search.axis_sizes(config, EVERY, ())
    found = list(
        shape_search.choices(config, sizes_of, [limits.bytes_limit(config, "200KB")], True)
    )
    assert found
    for shape, _ in found:
        sizes = {a: getattr(shape, a) for a in (*shape_search.CUTS[:-1], "kv_heads")}
        assert arch.target_shape(config, {}, **sizes) == shape
    if kind in ("qwen2", "lfm2"):
        assert {(x.shape.heads, x.shape.hidden) for x in found} == {(4, 64)}


def finalist(kl: list[float | None], **changes: Any) -> dict[str, Any]:
    """A record by pencil."""
    made = {
        "layers": 2,
        "ffn": 768,
        "heads": 4,
        "hidden": 64,
        "params": 1,
        "steps": 20,
        "skipped": 0,
        "clipped": 0,
        "diverged": False,
        "kl_pruned": [1.0] * len(kl),
        "kl_distilled": kl,
        "nll_rounded": kl,
    }
    return {**made, **changes}


def test_the_verdict_by_pencil() -> None:
    """Paired: windows that differ by 1 nat hide no steady gap of 0.1; a gap with both signs is
    noise.
    """
    clear = [finalist(3 * [0.2, 0.4, 0.1, 0.6]), finalist(3 * [0.3, 0.5, 0.2, 0.7])]
    found = finalists.best_candidate(clear)
    assert (found.best, found.second, found.clear) == (0, 1, True)
    assert found.gap is not None
    assert found.gap[0] == pytest.approx(0.1) == found.gap[1]
    said = finalists.advice(found, clear, ["A", "B"], ["line a", "line b"])
    assert said.startswith("A is best, by 0.100 bits per byte") and said.endswith(": line a")
    noisy = [finalist(3 * [0.5, 0.1, 0.5, 0.1]), finalist(3 * [0.1, 0.5, 0.15, 0.5])]
    found = finalists.best_candidate(noisy)
    assert (found.best, found.clear) == (0, False)
    said = finalists.advice(found, noisy, ["A", "B"], ["line a", "line b"])
    assert "Between A and B the difference is smaller than the noise" in said
    assert "line a" in said
    few = [finalist([0.2, 0.4, 0.1, 0.6]), finalist([0.3, 0.5, 0.2, 0.7])]
    found = finalists.best_candidate(few)
    assert (found.best, found.clear) == (0, False)
    said = finalists.advice(found, few, ["A", "B"], ["line a", "line b"])
    assert "inf" not in said
    assert finalists.best_candidate([clear[0]]).clear
    assert finalists.best_candidate([]).best is None


def test_the_least_sure_comparison_counts() -> None:
    """Third place may be hard to tell from the first where second place is not."""
    records = [
        finalist(3 * [0.2, 0.2, 0.2, 0.2]),
        finalist(3 * [0.3, 0.3, 0.3, 0.3]),
        finalist(3 * [0.0, 0.7, 0.05, 0.6]),
    ]
    found = finalists.best_candidate(records)
    assert (found.best, found.second, found.clear) == (0, 2, False)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (finalist([0.5, 0.5]), ""),
        (finalist([0.5, 0.5], skipped=1, clipped=1), ""),
        (finalist([0.5, 0.5], skipped=1, clipped=2), "the guard had to step in at 3 of 20 steps"),
        (finalist([1.5, 0.7]), "its KL rose from 1.000 to 1.100"),
        (finalist([0.5, None]), "its loss became NaN or infinite"),
        (finalist([0.5, 0.5], diverged=True), "its loss became NaN or infinite"),
    ],
)
def test_unstable_by_pencil(record: dict[str, Any], why: str) -> None:
    """Not finite, the guard too often (more than a tenth of the steps), or worse than before."""
    assert finalists.instability(record) == why


def test_windows_that_rank_do_not_judge() -> None:
    """Two disjoint choices of the held-out windows; too few is a sentence."""
    tokens = np.arange(40, dtype=np.int32).reshape(20, 2)
    one, other = (
        Windows(tokens + 100 * k, np.ones((20, 2), np.float32), np.arange(20)) for k in (0, 1)
    )
    ranking, judging = candidates.split_held_out({"English": one, "Polish": other}, 6, 24)
    ids = [{int(row[0]) for row in part.tokens} for part in (ranking, judging)]
    assert len(ids[0]) == 6 + 2 and len(ids[1]) == 14 + 8 and not ids[0] & ids[1]
    assert ranking.text_bytes is not None and len(ranking.text_bytes) == 8
    with pytest.raises(
        MisError, match="the text English has 3 held-out windows, but a search needs 4"
    ):
        candidates.split_held_out({"English": one.pick(slice(3))}, 6, 24)


def test_a_text_to_choose_by_ranks_and_all_held_out_windows_judge() -> None:
    """Where valid and test are two texts, none of one stands in for the other."""
    tokens = np.arange(40, dtype=np.int32).reshape(20, 2)
    loss_mask = np.ones((20, 2), np.float32)
    held_out = Windows(tokens, loss_mask, np.arange(20))
    choosing = Windows(tokens + 100, loss_mask, np.arange(20))
    ranking, judging = candidates.split_held_out({"held-out": held_out}, 6, 24, choosing)
    assert len(ranking.tokens) == 6
    assert ranking.tokens.min() >= 100
    assert judging.tokens.tolist() == held_out.tokens.tolist()


def test_guard_notes_are_counted() -> None:
    """As `GuardedAdamW.update` words them."""
    slept = "the machine slept 3 min; step done again. clipped 4.0 to 2.0"
    notes = ["", "skipped: not a number", "clipped 9.0 to 3.0", slept]
    counts = finalists.guard_report([{"note": note} for note in notes], object())
    assert counts == {"steps": 4, "skipped": 1, "clipped": 2, "diverged": False}
