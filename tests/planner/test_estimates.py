"""What a pass takes: MLX's own peaks and counts beside the plan, refusals, rates that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx.compute import precision
from mis_mlx.compute.logits import logit_bytes
from mis_mlx.hardware import rates
from mis_mlx.hardware.memory import headroom_bytes, needed_bytes
from mis_mlx.hardware.rates import M1_AIR, Rates
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost, in_turn
from mis_mlx.maths import rounding
from mis_mlx.maths.losses import chunk_rows
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost, stream
from mis_mlx.models.writing import streamed_batch
from mis_mlx.planner import estimates
from mis_mlx.quantization import stage
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import GIB, UNDECIDED, Budget, Checkpoint, MisError
from tests import peaks, tiny
from tests.conftest import mostly_slow
from tests.models.test_contract import published

MIB = 2**20
# q and o, k and v, the FFN, two norms of tiny.CONFIG
PLAIN = Rates(
    device="pencil",
    gpu=False,
    read_bytes_per_s=100.0,
    write_bytes_per_s=50.0,
    memory_bytes_per_s=1000.0,
    forward_flops_per_s=10.0,
    training_flops_per_s=5.0,
    source="by hand",
    hot=0.5,
)


HYBRIDS = ("lfm2", "qwen3_5_text", "gemma4_text")


def larger(kind: str) -> dict[str, Any]:
    """A hybrid whose activations outweigh what every process holds."""
    config = {**tiny.FAMILIES[kind], "hidden_size": 128, "intermediate_size": 1024}
    config["vocab_size"] = 2048
    if kind == "gemma4_text":
        return {**config, "hidden_size_per_layer_input": 128}
    config["head_dim"] = None
    if kind == "qwen3_5_text":  # heads as wide as half of the hidden size, as in the published ones
        config |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    return config


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`stored(kind)`: one model of six blocks, as F32, BF16 or 4-bit files, or one of a family
    whose blocks differ, made once.
    """
    root = tmp_path_factory.mktemp("stored")
    made = dict[str, Checkpoint]()
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 6}

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            if kind == "4-bit":
                tiny.packed(get("F32"), root / kind)
            elif kind in tiny.FAMILIES:
                tiny.make(root / kind, **larger(kind))
            else:
                tiny.make(root / kind, dtype=kind, **sizes)
            made[kind] = load.open_checkpoint(root / kind)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["F32", "BF16", "4-bit"])
def test_a_config_alone_says_what_the_files_say(
    stored: Callable[[str], Checkpoint], kind: str
) -> None:
    """Within the norms and, in 4 bits, the embedding's 8: both are stored wider than the config's
    bits.
    """
    there = stored(kind)
    by_files = model_of(there)
    by_config = model_of(dict(there.config) | DTYPE[kind])
    assert (
        by_files.as_stored
        == by_config.as_stored
        == (kind == ("4-bit" if precision.keeps_packed() else "F32"))
    )
    assert by_files.packed == by_config.packed == (kind == "4-bit")
    assert by_config.block_bytes == pytest.approx(by_files.block_bytes, rel=0.01)
    assert by_files.nbytes == there.nbytes


DTYPE: dict[str, dict[str, Any]] = {"F32": {}, "BF16": {"torch_dtype": "bfloat16"}, "4-bit": {}}


def test_what_finds_no_room_is_spooled() -> None:
    """One byte less than room for both micro-batches: one goes to disk, written and read by every
    block.
    """
    m = model_of(tiny.CONFIG, gpu=False)
    planned = partial(
        pass_cost.streamed_pass, "pass", m, tokens=128, micro_tokens=64, length=32, head=False
    )
    whole = planned(limit_bytes=GIB)
    limit = needed_bytes(whole.peak_bytes)
    assert planned(limit_bytes=limit) == whole
    half = planned(limit_bytes=limit - 1)
    batch = 64 * 64 * 4
    # embedding, 3 blocks
    assert half.stays == {WINDOWS: 1}
    assert (half.scratch_bytes, half.written_bytes) == (batch, 4 * batch)
    assert half.read_bytes == whole.read_bytes + 4 * batch
    assert half.peak_bytes == whole.peak_bytes - batch
    assert planned(limit_bytes=0, spool=False).peak_bytes == whole.peak_bytes


def test_stages_in_a_row_take_the_time_of_each() -> None:
    """3 s at the disk, then 5 s of arithmetic, are 8 s: they overlap within a stage alone. A
    training stays one, behind another or repeated.
    """
    reads = StageCost(name="a", read_bytes=300, written_bytes=0, peak_bytes=7, flops=10.0)
    works = StageCost(name="b", read_bytes=0, written_bytes=0, peak_bytes=9, flops=50.0)
    trains = replace(works, updated=1)
    both = in_turn("c", reads, works)
    assert (both.name, both.read_bytes, both.flops, both.peak_bytes) == ("c", 300, 60.0, 9)
    assert both.seconds(PLAIN) == 3 + 5
    assert both.seconds(PLAIN, hot=True) == 3 + 10
    assert both.repeated(4).seconds(PLAIN) == 4 * 8
    assert in_turn("d", both, in_turn("e", reads, works)).seconds(PLAIN) == 16
    assert in_turn("f", reads, trains).seconds(PLAIN) == 3 + 10
    assert in_turn("f", reads, trains).updated == 1
    assert in_turn("f", trains, reads).repeated(3).updated == 3


def test_quick_products_do_not_make_fits_quick() -> None:
    """Grids are fitted, and columns corrected, at the rate of element-wise kernels: a processor
    with products a hundred times as quick takes no less than that. A GPU's numbers stay as they
    were.
    """
    how = QuantizationConfig()
    m = replace(model_of(tiny.CONFIG, dtype=mx.float32), gpu=False)
    cost = stage.quantizing_cost(m, how, windows=2, length=64, limit=GIB)
    assert cost.numbers > rounding.FITTED_NUMBERS * m.params
    slow = replace(PLAIN, read_bytes_per_s=1e12, write_bytes_per_s=1e12, memory_bytes_per_s=1e12)
    quick = replace(slow, forward_flops_per_s=1e15)
    assert quick.numbers_per_s == PLAIN.numbers_per_s
    assert cost.seconds(slow) > cost.seconds(quick) > cost.numbers / quick.numbers_per_s
    slower = replace(quick, numbers_per_s=quick.numbers_per_s / 2)
    assert cost.seconds(slower) == pytest.approx(2 * cost.seconds(quick), rel=0.01)
    gpu = stage.quantizing_cost(replace(m, gpu=True), how, windows=2, length=64, limit=GIB)
    assert gpu.numbers == 0


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("qwen3-8b", 8_190_735_360),
        ("gemma-4-e2b", 4_628_569_379),
        ("gemma-4-e4b", 7_463_013_418),
    ],
)
def test_a_whole_model_has_all_its_tables(name: str, total: int) -> None:
    """A head of its own and the tables of per-layer inputs are in memory, too, where a model that
    answers or is asked by others is whole.
    """
    m = model_of({**published(name), "torch_dtype": "bfloat16"}, gpu=True, dtype=mx.bfloat16)
    assert pass_cost.whole_bytes(m) == 2 * total
    assert streamed_batch.resident_bytes(m, at_once=1, tokens=2) > 2 * total


def test_a_budget_has_no_cache_in_it() -> None:
    """150 MiB are for the process, whatever computes; a budget below that holds nothing."""
    assert headroom_bytes(GIB, 100 * MIB) == GIB - 250 * MIB
    assert headroom_bytes(140 * MIB, 0) == 0


PASSES = [(1, 16), (6, 64), (2, 256)]
CASES = [
    (word, kind, *windows)
    for word, kind, windows in product(("cpu", "metal"), ("F32", "BF16", "4-bit"), PASSES)
]


# Emulated float16 with packed weights is slow here: not with many tokens.
@pytest.mark.usefixtures("brief_look")
@pytest.mark.parametrize(
    ("word", "kind", "windows", "length"),
    [
        *mostly_slow(
            CASES[:-3],
            *CASES[:9:2],
            thorough=[*CASES[:9], ("metal", "F32", 2, 256), *CASES[12:-3]],
            of_several=True,
        ),
        pytest.param("metal", "4-bit", 1, 16, marks=pytest.mark.thorough),
        *(("cpu", kind, 1, 64) for kind in HYBRIDS),
        *(pytest.param("cpu", kind, 6, 128, marks=pytest.mark.thorough) for kind in HYBRIDS),
    ],
)
def test_a_real_pass_stays_under_the_plan(
    stored: Callable[[str], Checkpoint],
    kind: str,
    windows: int,
    length: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLX's peak is under the plan's and not by more than half, or than all of it where blocks
    differ, with the channels of every token and the keys and values that wait; bytes read agree
    but for the embedding's rows.

    Under Metal's policy (float16, packed) the plan may be 3.5 times the peak: its workspace is
    float32's, as some of Metal's kernels have it, while here half of it is float16; and a GPU holds
    what its commands in flight need.
    """
    checkpoint = stored(kind)
    monkeypatch.setenv(precision.POLICY, word)
    m = model_of(checkpoint)
    dtype = precision.dtype_of(checkpoint)
    assert dtype == {"cpu": mx.float32, "metal": mx.float16}[word]
    batches = [mx.random.randint(0, 512, (1, length), key=mx.random.key(k)) for k in range(windows)]
    mx.eval(batches)
    with peaks.of_mlx() as peak:
        source = stream.Stream(checkpoint, dtype)
        hidden = source.embed(batches)
        embedded = source.reader.nbytes
        for _, block in source.blocks():
            source.run_block(block, hidden)
        source.norm(hidden)
    p = pass_cost.streamed_pass(
        "pass",
        m,
        tokens=windows * length,
        micro_tokens=length,
        length=length,
        limit_bytes=GIB,
        head=False,
    )
    # extents: whole pages at the ends; of blocks that differ the largest are planned
    least = 0.75 if kind in HYBRIDS else 0.99
    assert least * p.read_bytes < source.reader.nbytes - embedded < 1.01 * p.read_bytes
    most = 2.0 if kind in HYBRIDS else 1.5 if word == "cpu" else 3.5
    assert p.peak_bytes - pass_cost.SMALL_BYTES < most * peak.nbytes
    assert peak.nbytes < peaks.allocated(p.peak_bytes)


@pytest.mark.usefixtures("brief_look")
@pytest.mark.parametrize(
    ("word", "kind", "kept", "beyond"),
    [
        *list(product(("cpu", "metal"), ("BF16", "4-bit"), (2, 6), (False,)))[:-2],
        *[pytest.param("metal", "4-bit", kept, False, marks=pytest.mark.slow) for kept in (2, 6)],
        pytest.param("metal", "4-bit", 6, True, marks=pytest.mark.thorough),
    ],
)
def test_blocks_that_stay_are_within_the_plan(
    stored: Callable[[str], Checkpoint],
    word: str,
    kind: str,
    kept: int,
    beyond: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A first and a second pass that keep the head and so many blocks: packed ones with the buffers
    they lie in.

    beyond: as if float16 did not hold the activations. So bfloat16 does, of as many bytes: products
    of packed weights take a fifth of the time that they take in float16, where both are emulated.
    """
    monkeypatch.setenv(precision.POLICY, word)
    if beyond:
        monkeypatch.setattr(rates, "computes_bfloat16", lambda: True)
        monkeypatch.setattr(compute_type, "largest_activation", lambda _: float("inf"))
    checkpoint = compute_type.with_precision(stored(kind), UNDECIDED)
    m = model_of(checkpoint)
    dtype = precision.dtype_of(checkpoint)
    batches = [mx.array([[*range(64)]])]
    if word == "cpu":
        assert dtype == mx.float32
    else:
        assert dtype == (mx.bfloat16 if beyond else mx.float16)
    mx.eval(batches)
    with peaks.of_mlx() as peak:
        source = stream.Stream(checkpoint, dtype, m.head_work + kept * m.block_work)
        assert source.resident_blocks == kept
        for _ in range(2):
            mx.eval(load.logits(source.head(), source.forward(batches)[0]))
    once = pass_cost.streamed_pass("pass", m, tokens=64, micro_tokens=64, length=64, spool=False)
    most = 3 if word == "cpu" else 5  # a GPU holds what its commands in flight need, too
    planned = once.peak_bytes + kept * m.block_work
    assert peak.nbytes < planned < most * peak.nbytes + pass_cost.SMALL_BYTES


def test_a_gpu_holds_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten command buffers, each with as many float32 elements as MLX counts before it sends one,
    and those of the operation that takes it over; never more than the work; a CPU holds none.
    Planned for a small Mac elsewhere. Of logits as many arrays as commands in flight, beside the
    five alive.
    """
    m = model_of(tiny.CONFIG, gpu=True)
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    assert m.in_flight(GIB) == 10 * 16 * 2**20
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert (m.in_flight(2 * GIB), m.in_flight(2**20)) == (10 * 164 * 2**20, 2**20)
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "3")
    assert m.in_flight(GIB) == 10 * 16 * 2**20
    assert model_of(tiny.CONFIG, gpu=False).in_flight(GIB) == 0
    one = 4 * 512 * chunk_rows(512)
    assert logit_bytes(512, 64, gpu=True) == 12 * one
    assert logit_bytes(512, 10_000, gpu=True) == 15 * one


def test_a_pass_reads_what_does_not_stay() -> None:
    """With more room never more of the weights; with enough room nothing."""
    m = model_of(tiny.CONFIG, gpu=False)
    found = [pass_cost.stays(m, n * MIB // 4) for n in range(60)]
    shares = [kept.share for kept in found]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1, 0)
    assert len({*shares}) == 5  # nothing, the head, and one, two and three blocks stay
    assert found[-1].nbytes == 3 * m.block_work + m.head_work


def test_a_refusal_names_both_numbers_and_a_budget_that_does() -> None:
    """The largest phase counts; a budget as advised is enough; a remedy of the caller's own is
    used.
    """
    small = StageCost(name="prune", read_bytes=0, written_bytes=0, peak_bytes=100 * MIB, flops=0.0)
    large = StageCost(
        name="measure", read_bytes=0, written_bytes=0, peak_bytes=700 * MIB + 1, flops=0.0
    )
    estimates.require_fit(Budget(needed_bytes(large.peak_bytes)), small, large)
    with pytest.raises(MisError):
        estimates.require_fit(Budget(needed_bytes(large.peak_bytes) - 1), small, large)
    numbers = "measure needs 850 MiB, but the budget is 600 MiB: give --budget 851MiB or"
    with pytest.raises(MisError, match=f"{numbers} more, or lower"):
        estimates.require_fit(Budget(600 * MIB), small, large)
    with pytest.raises(MisError, match=f"{numbers} more, or pray"):
        estimates.require_fit(Budget(600 * MIB), large, other=", or pray")


def test_measured_rates_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assumed until measured; then the file's; the Air's whenever asked for; the temporary file is
    gone.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "SAMPLE_BYTES", 4 * MIB)
    assert "assumed" in estimates.machine_rates().source
    found = estimates.machine_rates(measure=True)
    assert found == estimates.machine_rates()
    assert found.source.startswith("measured 20")
    kept = {p.name for p in (tmp_path / "cache").iterdir()} - {".lock"}
    assert kept == {"rates.json"}
    assert json.loads((tmp_path / "cache" / "rates.json").read_text())["gpu"] is False
    assert estimates.machine_rates("m1-air") == M1_AIR
    with pytest.raises(MisError, match="leave one of them out"):
        estimates.machine_rates("m1-air", measure=True)


def test_a_cache_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stops answering during the measurement: one sentence."""

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    monkeypatch.setattr("os.fsync", broken)
    monkeypatch.setattr(rates, "SAMPLE_BYTES", MIB)
    with pytest.raises(MisError, match="The disk stopped answering"):
        estimates.machine_rates(measure=True)
