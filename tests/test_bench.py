"""The command `bench`: what is counted and kept, not how fast this machine is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import bench
from mis_mlx.judge.speed import rounds
from mis_mlx.judge.speed.rounds import Measurement, Request
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import ROOT, Done, last_line

# The command, with a line of progress every tenth of a second: the usual 10 s would all be trials.
TOLD_AT_ONCE = """
import runpy
from mis_mlx.reporting import progress
progress.EVERY_S = 0.1
runpy.run_module("mis_mlx.bench", run_name="__main__", alter_sys=True)
"""


pytestmark = pytest.mark.usefixtures("cache")


def settings(*models: Path, **flags: Any) -> bench.Settings:
    """A bench of moments."""
    given = {"prompt_tokens": 4, "generation_tokens": 4, "num_trials": 1, **flags}
    return bench.Settings(model=tuple(map(str, models)), **given)


def stamped(*stamps_s: float, cached_s: float | None = None, **more: Any) -> Measurement:
    """A trial whose tokens were there at these times."""
    return Measurement((1, 2), (3,) * len(stamps_s), stamps_s, cached_s, **more)


def test_rates_by_pencil() -> None:
    """Tokens at 0.5, 0.6, 0.7 s: 500 ms to the first, 100 ms each after it, 10 a second (the first
    does not count); a prompt of 20 tokens is read at 40 a second. Rates of 10 and 20 a second are
    15 ± 7.07. 2 trials have no p95; 21 gaps do, and so have 20 trials.
    """
    found = rounds.figures([stamped(0.5, 0.6, 0.7, cached_s=0.1)], Request(20, 3))
    names = ("ttft_ms", "ttft_cached_ms", "tpot_ms", "prefill_tps")
    assert [found[name]["mean"] for name in names] == pytest.approx([500, 100, 100, 40])
    assert found["decode_tps"] == pytest.approx({"mean": 10, "sd": 0, "median": 10, "n": 1})
    assert found["itl_ms"]["n"] == 2
    two = [stamped(*(1 + 0.1 * k for k in range(12))), stamped(*(1 + 0.05 * k for k in range(11)))]
    found = rounds.figures(two, Request(1, 12))
    assert found["decode_tps"]["mean"] == pytest.approx(15)
    assert found["decode_tps"]["sd"] == pytest.approx(7.0711, abs=1e-4)
    assert "p95" not in found["ttft_ms"]
    assert found["itl_ms"]["p95"] == pytest.approx(100)
    assert "p95" in rounds.figures([stamped(1.0, 2.0)] * 20, Request(1, 2))["ttft_ms"]


def test_who_slows_down_is_named() -> None:
    """From 10 to 8 tokens/s is said, from 10 to 9.5 is not."""
    slow = rounds.slowdown_note("m", [stamped(1.0, 1.1), stamped(1.0, 1.125)])
    assert slow is not None
    assert "10.0 to 8.0" in slow
    assert rounds.slowdown_note("m", [stamped(1.0, 1.1), stamped(1.0, 1.105)]) is None


@pytest.mark.usefixtures("cpu_policy")  # bytes of float32
def test_an_m1_by_pencil(llama: Checkpoint) -> None:
    """Floats in float16, two bytes a parameter, and the keys of 10 tokens (3 blocks x 2 x 32
    numbers x 2 bytes), over 68 GB/s.
    """
    params = sum(t.nbytes for t in llama.tensors.values()) // 4
    nbytes = 2 * params + 10 * 3 * 2 * 32 * 2
    assert rounds.m1_tokens_per_s(llama, Request(8, 4)) == pytest.approx(68e9 / nbytes)


@pytest.mark.usefixtures("cpu_policy")  # bytes of float32
def test_a_table_of_two_models(
    llama: Checkpoint, tmp_path: Path, command: Callable[..., Done]
) -> None:
    """mlx-lm's flags; real trials: positive times, the bytes of the weights, one column a model,
    also of a/model and b/model; peak memory holds the weights of one model, not of both.
    """
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "llama").symlink_to(llama.path)
    small = tiny.make(tmp_path / "a" / "llama", num_hidden_layers=1)
    done = command("bench", "--model", tmp_path / "b/llama", small, "-p", 4, "-g", 4, "-n", 1)
    result = last_line(done)
    assert [name[-7:] for name in result["models"]] == ["b/llama", "a/llama"]
    assert result["models"]["b/llama"]["weight_bytes"] == llama.nbytes
    for name, m in result["measured"]["models"].items():
        nbytes = result["models"][name]["weight_bytes"]
        for key in ("ttft_ms", "ttft_cached_ms", "tpot_ms", "decode_tps", "prefill_tps"):
            assert m[key]["mean"] > 0
        assert nbytes < 1e6 * m["peak_mb"]["mean"] < nbytes + 1e6
    assert "| | b/llama | a/llama |" in done.stdout


def test_the_same_seed_gives_the_same_json_apart_from_timings(llama: Checkpoint) -> None:
    """Texts and tokens are the same ones; another seed has other texts."""
    own = ("measured", "hot")

    def measured(seed: int) -> dict[str, Any]:
        result = bench.run(settings(llama.path, num_trials=2, seed=seed))
        return {key: value for key, value in result.items() if key not in own}

    one = measured(3)
    same = measured(3)
    other = measured(4)
    assert one == same
    assert one["models"]["llama"]["texts_sha256"] != other["models"]["llama"]["texts_sha256"]


def test_measure_interleaves_what_fits_and_not_what_does_not(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A B A B within the limit, A A B B beyond it; the warm-up of each before. Beyond it, the model
    before is gone while the next one loads, though the caller still has its last trial.
    """
    order = list[str]()
    alive = list[Any]()
    opened = rounds.load_model

    def loaded(model: Checkpoint) -> rounds.BenchmarkModel:
        assert run.together or all(kept() is None for kept in alive)
        found = opened(model)
        alive.append(weakref.ref(found.model))
        return found._replace(nbytes=len(alive))

    def noted(subject: Any, *_: Any, **__: Any) -> Measurement:
        order.append("ba"[subject.nbytes % 2])
        return stamped(1.0, 2.0)

    monkeypatch.setattr(rounds, "load_model", loaded)
    monkeypatch.setattr(rounds, "trial", noted)
    for together, wanted in ((False, "aaaabbbb"), (True, "abababab")):
        order.clear()
        alive.clear()
        run = bench.Bench(settings(llama.path, num_trials=3))
        run.together = together
        run.models = {"a": llama, "b": llama}
        run.go()
        assert "".join(order) == wanted


def test_what_does_not_go_together_is_a_sentence(llama: Checkpoint) -> None:
    """No gap between tokens; a model twice."""
    with pytest.raises(MisError, match="--generation-tokens is 1: .* 2"):
        bench.run(settings(llama.path, generation_tokens=1))
    with pytest.raises(MisError):
        bench.run(settings(llama.path, llama.path))


def test_a_format_says_all_its_bits() -> None:
    """One number for all matrices, or the span; floats are named by what they are computed in."""

    def kind(**quantization: Any) -> str:
        config = {"quantization": quantization} if quantization else {}
        return rounds.format_name(Checkpoint(Path(), config, {}), "float32")

    assert kind() == "float32"
    assert kind(bits=4, group_size=64, **{"model.layers.0.mlp.up_proj": {"bits": 4}}) == "4-bit"
    assert kind(bits=4, a={"bits": 3}, b={"bits": 8}, c=False) == "3- to 8-bit"


def test_ctrl_c_keeps_the_finished_trials(llama: Checkpoint, own_home: dict[str, str]) -> None:
    """SIGINT to the real process after its first trials: a table, exit 0, JSON that says it was
    stopped and how far.
    """
    line = [sys.executable, "-c", TOLD_AT_ONCE, "--model", llama.path]
    line += ["-p", "4", "-g", "4", "-n", "10000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, cwd=ROOT, env=own_home, stdout=pipe, stderr=pipe, text=True)
    assert process.stderr
    # the first has been told of
    assert any(re.search("trials [1-9]", line) for line in process.stderr)
    time.sleep(1)  # for some more, of a few milliseconds each
    os.kill(process.pid, signal.SIGINT)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads(said.splitlines()[-1])
    assert result["stopped"]
    kept = result["models"]["llama"]["trials"]
    assert 2 < kept < 10_000
    assert f"{kept} of 10000" in err
    assert result["measured"]["models"]["llama"]["decode_tps"]["n"] == kept
