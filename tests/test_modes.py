"""`distill` by every way of training: what the budget decides, and what is stored."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx.distillation import pipeline
from mis_mlx.models.opening import load
from mis_mlx.quantization import packed_format
from mis_mlx.storage import run_folder, safetensors
from mis_mlx.types import Checkpoint
from tests.conftest import Done, last_line, mostly_thorough

ROOT = Path(__file__).parent.parent
FLAGS = ("--max-seq-length", 32, "--num-samples", 2, "--reconstruct-samples", 2)
FLAGS += ("--eval-windows", 1, "--iters", 6, "--save-every", 3, "--quantize", 0, "--seed", 3)
FLAGS += ("--learning-rate", "1e-2", "--keep-steps")
FLAGS += ("--scenario", "half-ffn")  # a search keeps blocks whole
WAYS: dict[str, tuple[object, ...]] = {
    "blocks": ("--train", "blocks"),
    "sharded": ("--train", "sharded"),
    "repaired": ("--train", "none"),
    "tuned": ("--quantize", 4, "--q-iters", 5),
}
QUICK = ("blocks", "tuned")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    llama: Checkpoint,
    text_folder: Path,
    command: Callable[..., Done],
) -> Callable[[str], tuple[Path, Done]]:
    """`whole(way)`: an undisturbed run of that way, made once."""
    made: dict[str, tuple[Path, Done]] = {}

    def get(way: str) -> tuple[Path, Done]:
        if way not in made:
            out = tmp_path_factory.mktemp("way") / "run"
            flags = ("--teacher", llama.path, "--data", text_folder, *FLAGS, *WAYS[way])
            done = command("distill", *flags, "--out", out)
            assert done.returncode == 0, done.stderr
            made[way] = out, done
        return made[way]

    return get


@pytest.mark.parametrize("way", mostly_thorough(WAYS, *QUICK))
def test_every_way_ends_in_an_ordinary_model(
    whole: Callable[[str], tuple[Path, Done]], way: str
) -> None:
    """Stock mlx-lm opens the result, and the run's files say what was done. (That losses fall:
    tests/training.)
    """
    out, done = whole(way)
    mode = WAYS[way][1] if "--train" in WAYS[way] else "blocks"
    assert last_line(done)["mode"] == mode
    assert run_folder.stored_settings(out, run_folder.PLAN)["mode"] == mode
    steps = 0 if way == "repaired" else 6
    assert [r["number"] for r in run_folder.metrics(out)] == list(range(1, steps + 1))
    assert (out / "targets").exists() == (way != "repaired")
    load.mlx_lm("utils").load(str(out / "model"))


def test_a_frozen_vocabulary_stays_as_it_is(whole: Callable[[str], tuple[Path, Done]]) -> None:
    """Every matrix of the blocks is another than the pruned student's; the embedding is not."""
    out, _ = whole("blocks")
    before, after = (load.open_checkpoint(out / name) for name in ("pruned", "model"))
    arrays = [safetensors.lazy(c.tensors, list(c.tensors)) for c in (before, after)]
    same = {name for name in before.tensors if (arrays[0][name] == arrays[1][name]).all()}
    assert "model.embed_tokens.weight" in same
    assert not [n for n in same if "proj" in n]


def test_scales_learn_what_rounding_cost(whole: Callable[[str], tuple[Path, Done]]) -> None:
    """Between `rounded` and `model` only scales, biases and norms differ, in steps of
    their own.
    """
    out, _ = whole("tuned")
    rounded = load.open_checkpoint(out / "rounded")
    model = load.open_checkpoint(out / "model")
    assert rounded.config == model.config
    assert (out / "model" / packed_format.SENSITIVITY).is_file()
    logged = run_folder.records(out / pipeline.TUNE_LOG)
    assert [r["number"] for r in logged] == [1, 2, 3, 4, 5]
    before, after = (safetensors.lazy(c.tensors, list(c.tensors)) for c in (rounded, model))
    differ = {name for name in before if not (before[name] == after[name]).all()}
    assert all(name.endswith(("scales", "biases")) or "norm" in name for name in differ)
    assert {n for n in before if n.endswith("scales") and "layers" in n} <= differ
    assert "model.embed_tokens.scales" not in differ


@pytest.mark.slow
def test_a_model_eight_times_the_budget(tmp_path: Path) -> None:
    """4 bits, more than 8 x 280 MiB: calibrated, its logits stored, repaired, a shard trained; peak
    under it.
    """
    program = runpy.run_path(str(ROOT / "benchmarks" / "streaming.py"))
    sizes = {
        "num_hidden_layers": 760,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "vocab_size": 1024,
    }
    folder = program["synthetic"](tmp_path / "big", sizes, 4)
    limit = 280 * 2**20
    assert load.open_checkpoint(folder).nbytes > 8 * limit
    found = program["budget"](folder, tmp_path / "run", "280MiB")
    assert found["mode"] == "sharded"
    assert found["peak_bytes"] < limit == found["budget_bytes"]
