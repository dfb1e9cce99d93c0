"""The command `bench`: what is counted and kept, not how fast this machine is."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mis_mlx import bench
from mis_mlx.hardware.rates import Roof
from mis_mlx.judge.speed import rounds
from mis_mlx.judge.speed.rounds import Measurement, Request
from mis_mlx.types import Checkpoint, MisError, Reading
from tests import forks, tiny
from tests.conftest import Done, last_line, sentence
from tests.hardware.recorded import VirtualClock

QUICK = ("-p", 4, "-g", 4, "-n", 1)
# The command, with a line of progress every tenth of a second: the usual 10 s would all be trials.
TOLD_AT_ONCE = """
import runpy
from mis_mlx.reporting import progress
from tests.hardware.recorded import VirtualClock
progress.EVERY_S = 0.1
runpy.run_module("mis_mlx.bench", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(autouse=True)
def measured_roof(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A cache folder of the test's own, with a roof in it: measuring takes 5 s, and tests/hardware
    does.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(
        "mis_mlx.hardware.rates.measure_roof",
        lambda: Roof(
            device="this one", threads="1", memory_bytes_per_s=1e9, flops_per_s=1e9, source="given"
        ),
    )
    yield


def settings(*models: Path, **flags: Any) -> bench.Settings:
    """A bench of moments."""
    given = {"prompt_tokens": 4, "generation_tokens": 4, "num_trials": 1, **flags}
    return bench.Settings(model=tuple(map(str, models)), **given)


def stamped(*stamps_s: float, cached_s: float | None = None, **more: Any) -> Measurement:
    """A trial whose tokens were there at these times."""
    return Measurement((1, 2), (3,) * len(stamps_s), stamps_s, cached_s, **more)


def test_rates_by_pencil() -> None:
    """Tokens at 0.5, 0.6, 0.7 s: 500 ms to the first, 100 ms each after it, 10 a second (the first
    does not count); a prompt of 20 tokens is read at 40 a second.
    """
    found = rounds.figures([stamped(0.5, 0.6, 0.7, cached_s=0.1)], Request(20, 3))
    names = ("ttft_ms", "ttft_cached_ms", "tpot_ms", "prefill_tps")
    assert [found[name]["mean"] for name in names] == pytest.approx([500, 100, 100, 40])
    assert found["decode_tps"] == pytest.approx({"mean": 10, "sd": 0, "median": 10, "n": 1})
    assert found["itl_ms"]["n"] == 2


def test_mean_and_deviation_over_trials_and_95_of_many_only() -> None:
    """Rates 10 and 20 a second: 15 ± 7.07. 2 trials have no p95; 21 gaps do, and so have 20
    trials.
    """
    two = [stamped(*(1 + 0.1 * k for k in range(12))), stamped(*(1 + 0.05 * k for k in range(11)))]
    found = rounds.figures(two, Request(1, 12))
    assert found["decode_tps"]["mean"] == pytest.approx(15)
    assert found["decode_tps"]["sd"] == pytest.approx(7.0711, abs=1e-4)
    assert "p95" not in found["ttft_ms"]
    assert found["itl_ms"]["p95"] == pytest.approx(100)
    assert "p95" in rounds.figures([stamped(1.0, 2.0)] * 20, Request(1, 2))["ttft_ms"]


def test_energy_is_what_work_took_beyond_rest() -> None:
    """30 J in 2 s at 5 W of rest are 20 J of work: 10 J for each of the two tokens after the
    first.
    """
    found = rounds.figures([stamped(0.5, 1.5, 2.5, watts=15.0)], Request(1, 3), 5.0)
    assert found["joules"]["mean"] == pytest.approx(10)
    assert "joules" not in rounds.figures([stamped(0.5, 1.5)], Request(1, 2), 5.0)
    assert "joules" not in rounds.figures([stamped(0.5, 1.5, watts=15.0)], Request(1, 2))


def test_power_by_trapezoids() -> None:
    """Readings at 1, 2 and 4 s of 4, 8 and 14 W hold 28 J in 3 s; one before the stretch does not
    count.
    """
    clock = VirtualClock()
    powers = {0.0: 100.0, 1.0: 4.0, 2.0: 8.0, 4.0: 14.0}
    history = [Reading(at, power_w=power) for at, power in powers.items()]
    monitor: Any = SimpleNamespace(clock=clock, history=lambda: history)
    clock.sleep(4.0)
    assert rounds.mean_watts(monitor, 3.5) == pytest.approx(28 / 3)
    assert rounds.mean_watts(monitor, 0.0) is None


def test_who_slows_down_is_named() -> None:
    """From 10 to 8 tokens/s is said, from 10 to 9.5 is not."""
    slow = rounds.slowdown_note("m", [stamped(1.0, 1.1), stamped(1.0, 1.125)])
    assert slow is not None
    assert "10.0 to 8.0" in slow
    assert rounds.slowdown_note("m", [stamped(1.0, 1.1), stamped(1.0, 1.105)]) is None


@pytest.mark.usefixtures("cpu_policy")  # bytes of float32
def test_the_roof_by_pencil(llama: Checkpoint) -> None:
    """1 MB of weights and the keys of 10 tokens (3 blocks x 2 x 32 numbers x 4 bytes) a token, at 1
    GB/s.
    """
    r = Request(8, 4)
    at = Roof(device="d", threads="", memory_bytes_per_s=1e9, flops_per_s=1e15, source="given")
    (nbytes, _), _ = rounds.token_traffic(llama, 1_000_000, r)
    assert nbytes == 1_000_000 + 10 * 3 * 2 * 32 * 4
    found = rounds.compare_to_roof(llama, 1_000_000, r=r, roof=at, tps=500.0)
    assert found["bound"] == "memory bandwidth"
    assert found["decode_best_tps"] == pytest.approx(1e9 / nbytes)
    assert found["reached"] == pytest.approx(500 * nbytes / 1e9)
    # arithmetic is the limit: 2 operations a parameter of blocks and head
    slow = Roof(device="d", threads="", memory_bytes_per_s=1e15, flops_per_s=1e6, source="given")
    assert (
        rounds.compare_to_roof(llama, 1_000_000, r=r, roof=slow, tps=1.0)["bound"] == "arithmetic"
    )
    params = sum(t.nbytes for t in llama.tensors.values()) // 4
    assert rounds.token_traffic(llama, 0, r)[0][1] == pytest.approx(2 * params, rel=0.02)
    # An M1 is computed: floats in float16, two bytes a parameter, and the keys of 10 tokens, over
    # 68 GB/s.
    assert rounds.m1_tokens_per_s(llama, r) == pytest.approx(
        68e9 / (2 * params + 10 * 3 * 2 * 32 * 2)
    )


@pytest.mark.usefixtures("cpu_policy")  # bytes of float32
def test_a_table_of_two_models(
    llama: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real trials: positive times, the bytes of the weights, one column a model; peak memory holds
    the weights of one model, not of both.
    """
    small = tiny.make(tmp_path / "small", num_hidden_layers=1)
    result = bench.run(settings(llama.path, small))
    assert result["models"]["llama"]["weight_bytes"] == llama.nbytes
    for name in ("llama", "small"):
        m = result["measured"]["models"][name]
        nbytes = result["models"][name]["weight_bytes"]
        assert (
            min(
                m[k]["mean"]
                for k in ("ttft_ms", "ttft_cached_ms", "tpot_ms", "decode_tps", "prefill_tps")
            )
            > 0
        )
        assert nbytes < 1e6 * m["peak_mb"]["mean"] < nbytes + 1e6
    out = capsys.readouterr().out
    assert "| | llama | small |" in out
    assert "computed" in out


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
    """A B A B within the limit, A A B B beyond it; the warm-up of each before."""
    order = list[str]()
    opened = rounds.load_model
    count = itertools.count()

    def noted(subject: Any, *_: Any, **__: Any) -> Measurement:
        order.append("ab"[subject.nbytes % 2])
        return stamped(1.0, 2.0)

    monkeypatch.setattr(
        rounds, "load_model", lambda model: opened(model)._replace(nbytes=next(count))
    )
    monkeypatch.setattr(rounds, "trial", noted)
    for together, wanted in ((True, "abababab"), (False, "aaaabbbb")):
        order.clear()
        run = bench.Bench(settings(llama.path, num_trials=3))
        run.together = together
        run.models = {"a": llama, "b": llama}
        run.go(None)
        assert "".join(order) == wanted


def test_one_by_one_there_is_one_model_in_memory(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the next one loads, the one before is gone, though the caller still has the last trial
    in its hands.
    """
    alive = list[Any]()
    opened = rounds.load_model

    def noted(model: Checkpoint) -> rounds.BenchmarkModel:
        assert all(kept() is None for kept in alive)
        found = opened(model)
        alive.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(rounds, "load_model", noted)
    run = bench.Bench(settings(llama.path))
    run.together = False
    run.models = {name: next(iter(run.models.values())) for name in "abc"}
    run.go(None)
    assert len(alive) == 3


def test_what_does_not_go_together_is_a_sentence(llama: Checkpoint) -> None:
    """No gap between tokens; a model twice."""
    with pytest.raises(MisError, match="--generation-tokens is 1: give 2 or more"):
        bench.run(settings(llama.path, generation_tokens=1))
    with pytest.raises(MisError, match="give each once"):
        bench.run(settings(llama.path, llama.path))


def test_a_model_that_does_not_fit_is_plans_sentence(
    llama: Checkpoint, in_process: Callable[..., Done]
) -> None:
    """Both numbers and a remedy, before anything is loaded."""
    said = sentence(in_process("bench", "--model", llama.path, *QUICK, "--budget", "1MiB"))
    assert "timing llama needs" in said
    assert "the budget is 1 MiB: give a larger --budget" in said


@pytest.mark.thorough
def test_flags_of_mlx_lm_and_two_models(
    llama: Checkpoint, tmp_path: Path, command: Callable[..., Done]
) -> None:
    """-p -g -n, two models; the last line is JSON. a/model and b/model get a column each; the roof
    is measured.
    """
    folders = [
        tiny.make(tmp_path / name / "model", num_hidden_layers=n)
        for n, name in ((1, "a"), (2, "b"))
    ]
    done = command("bench", "--model", *folders, *QUICK)
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert [name[-7:] for name in result["models"]] == ["a/model", "b/model"]
    assert result["measured"]["roof"]["memory_bytes_per_s"] > 1e8
    assert set(result["models"]) == set(result["measured"]["models"])


def test_what_comes_between_two_tokens_is_clocked() -> None:
    """Every token has its time."""
    stamps, tokens = rounds.token_times(iter([1, 2]))
    assert 0 <= stamps[0] <= stamps[1]
    assert tokens == [1, 2]


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
    flags = ("--model", llama.path, "-p", 4, "-g", 4, "-n", 10_000)
    pipe = subprocess.PIPE
    process = forks.start(["-c", TOLD_AT_ONCE, *flags], own_home, stdout=pipe, stderr=pipe)
    assert process.stderr
    # the first has been told of
    assert any(re.search("trials [1-9]", line) for line in process.stderr)
    time.sleep(1)  # for some more, of a few milliseconds each
    os.kill(process.pid, signal.SIGINT)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads(said.splitlines()[-1])
    assert result["stopped"]
    assert "stopped by hand" in err
    assert 2 < (kept := result["models"]["llama"]["trials"]) < 10_000
    assert f"{kept} of 10000 trials are kept" in err
    assert (
        result["measured"]["models"]["llama"]["decode_tps"]["n"]
        == result["models"]["llama"]["trials"]
    )
