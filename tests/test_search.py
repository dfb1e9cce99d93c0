"""`search`, the first phase of `distill`: sizes, bytes, losses, and what it keeps."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mis_mlx import distill, search
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.quantization import packed_format
from mis_mlx.size_search import candidates, known_losses, shape_search
from mis_mlx.size_search.shape_search import Choice, Losses
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests import tiny

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


@pytest.mark.thorough
def test_a_search_goes_on_as_it_began(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at its first probe and resumed in another budget: the same students, the same
    answer; `distill` takes the folder from there.
    """
    flags: dict[str, Any] = {"teacher": str(llama.path), "data": str(text_folder), "lose": 0.01}
    flags |= {"max_seq_length": 32, "num_samples": 4}
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "one"))
    whole = search.run(search.Settings(**flags, out=str(tmp_path / "whole")))
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "two"))
    with monkeypatch.context() as stopped:
        stopped.setattr(
            candidates.Candidates, "scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            search.run(search.Settings(**flags, out=str(tmp_path / "run")))
    again = search.run(search.Settings(out=str(tmp_path / "run"), resume=True))
    same = ("best", "table", "candidates", "expected_bits")
    assert {name: again[name] for name in same} == {name: whole[name] for name in same}
    assert not run_folder.is_decided(tmp_path / "run")
    resumed = distill.Settings(out=str(tmp_path / "run"), resume=True, dry_run=True)
    assert distill.run(resumed)["params_student"]
