"""Weights that learn block by block, all or a shard at a time: the step of a resident model, in
little memory, and exact whatever is killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mis_mlx import distill
from mis_mlx.distillation import targets, train_loop
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.hardware.clock import Clock
from mis_mlx.maths.optimizer import GuardedAdamW, global_norm
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.storage.safetensors import InParts
from mis_mlx.types import Checkpoint, MisError, Step
from tests import tiny
from tests.conftest import mostly_slow
from tests.distillation import students
from tests.distillation.students import LOSS, Killed, facts, micro_batches, schedule

LAYERS = 4
VISIT = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`source(kind)`: a random student of four small blocks, made once."""
    root = tmp_path_factory.mktemp("students")
    made = dict[str, Checkpoint]()

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            changes = {"num_hidden_layers": LAYERS, "intermediate_size": 128, **tiny.KINDS[kind]}
            made[kind] = load.open_checkpoint(tiny.make(root / kind, **changes))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three blocks of a few thousand bytes, for runs that are killed hundreds of times."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "head_dim": 8,
    }
    folder = tmp_path_factory.mktemp("smallest") / "s"
    return load.open_checkpoint(
        tiny.make(folder, num_attention_heads=2, num_key_value_heads=1, **sizes)
    )


def resident(
    student: Checkpoint, each: int, iters: int
) -> tuple[nn.Module, list[Step], list[dict[str, mx.array]]]:
    """The same training with everything in memory, all gradients first: the model, the steps,
    weights and moments after each. Every block has an optimizer of its own, and so has the norm.
    """
    model = stream.load_checked(load.resident_model(student, mx.float32))
    steps: list[Step] = []
    arrays: list[dict[str, mx.array]] = []
    parts = nn.Module()
    parts.norm = model.model.norm
    of_norm = GuardedAdamW(eight_bit=True)

    def slabs(rows: int) -> Any:
        head = load.head_weight(model)
        return ((start, head[start : start + rows]) for start in range(0, len(head), rows))

    for number in range(iters):
        # of all blocks there is one visit
        if number % VISIT == 0 and (not number or each < LAYERS):
            first = number // VISIT % math.ceil(LAYERS / each) * each
            parts.layers = model.model.layers[first : first + each]
            optimizers = [GuardedAdamW(eight_bit=True) for _ in parts.layers]
        batches = micro_batches(number)
        _, mask, ids, shares = map(list, zip(*batches, strict=True))
        states = [model.model(tokens).reshape(-1, 64) for tokens, *_ in batches]
        value, pull = LOSS(mx.concatenate(states), slabs, *map(mx.concatenate, (mask, ids, shares)))
        pulls = mx.split(pull, len(batches))

        def surrogate(_: nn.Module, batches: Any = batches, pulls: Any = pulls) -> mx.array:
            """Whose gradient is the loss's."""
            total = mx.array(0.0)
            for (tokens, *_), pull in zip(batches, pulls, strict=True):
                total = total + (model.model(tokens).reshape(-1, 64) * pull).sum()
            return total

        _, made = nn.value_and_grad(parts, surrogate)(parts)
        tokens = sum(m.sum().item() for m in mask)
        rate = schedule(iters).rate(number)
        units = [("model.norm.", parts.norm, made["norm"], of_norm)]
        for i, (block, mine, o) in enumerate(
            zip(parts.layers, made["layers"], optimizers, strict=True), first
        ):
            units.append((f"model.layers.{i}.", block, mine, o))
        after: dict[str, mx.array] = {}
        norms = []
        for unit, module, mine, o in units:
            norms.append(1 / tokens * global_norm(mine).item())
            o.update(
                module,
                mine,
                loss=value.item() / tokens,
                norm=norms[-1],
                learning_rate=rate,
                batch=number + 1,
                scale=1 / tokens,
            )
            mx.eval(module.parameters(), o.adamw.state)
            for name, array in [*tree_flatten(module.parameters()), *o.arrays().items()]:
                after[unit + name] = array
        arrays.append(after)
        steps.append(
            Step(
                number=number + 1,
                loss=value.item() / tokens,
                grad_norm=math.hypot(norms[0], *reversed(norms[1:])),
                learning_rate=rate,
                tokens=int(tokens),
                seconds=0.0,
                peak_bytes=0,
                note="",
            )
        )
    return model, steps, arrays


def opened(student: Checkpoint, folder: Path, each: int = 1, **how: Any) -> BlockStudent:
    """`student` in parts in `folder`, ready to train."""
    made = BlockStudent(
        model_writer.by_block(student, folder),
        "weights",
        **{"at_once": each, "steps_each": VISIT, **how},
    )
    made.begin()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def taken(student: BlockStudent, name: str) -> mx.array:
    """A weight of the end; one in parts is joined."""
    weight = student.take(name)
    if isinstance(weight, InParts):
        return mx.concatenate(list(weight.parts))
    return weight


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def learned(student: BlockStudent) -> dict[str, mx.array]:
    """Weights, moments and counts by name in the whole model."""
    arrays: Any = student.arrays()
    return {**arrays["model"], **arrays["optimizer"]}


KINDS = [
    ("llama", 1),
    ("llama", 2),
    ("llama", 3),
    ("llama", 4),
    ("untied", 2),
    ("qwen2", 2),
    ("qwen3", 1),
]


@pytest.mark.parametrize(
    ("kind", "each"),
    mostly_slow(KINDS, ("llama", 3), ("qwen3", 1), thorough=KINDS[2:], of_several=True),
)
def test_a_step_is_the_resident_models_bit_for_bit(
    tmp_path: Path, source: Callable[[str], Checkpoint], kind: str, each: int
) -> None:
    """A round over all shards, bottom, middle and top, and one visit more, three micro-batches a
    step.

    Loss, gradient norm, weights and moments (the first are the gradient times 0.1) after every
    step, and the model on disk at the end.
    """
    iters = VISIT * (math.ceil(LAYERS / each) + 1)
    model, wanted, arrays = resident(source(kind), each, iters)
    student = opened(source(kind), tmp_path / "s", each)
    got = []
    for step in train_loop.steps(student, micro_batches, LOSS, schedule(iters)):
        got.append(step)
        if step.number % VISIT:
            assert same(learned(student), arrays[step.number - 1])
    assert facts(got) == facts(wanted)
    wanted_weights = dict(tree_flatten(model.parameters()))
    assert same({name: taken(student, name) for name in wanted_weights}, wanted_weights)
    end = load.open_checkpoint(tmp_path / "s")
    in_files = [name for name in wanted_weights if name != "model.norm.weight"]
    assert each == LAYERS or same(
        {name: load.dense(end, name) for name in in_files},
        {name: wanted_weights[name] for name in in_files},
    )
    assert mx.array_equal(
        taken(student, "model.embed_tokens.weight"), load.embedding(source(kind), mx.float32).weight
    )


@pytest.fixture(name="written_bytes")
def _written_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every write to a file."""
    counted = list[int]()

    def count(do: Callable[..., None], path: Path, data: bytes | memoryview) -> None:
        counted.append(len(data))
        do(path, data)

    for name in ("write", "extend"):
        monkeypatch.setattr(DISK, name, partial(count, getattr(DISK, name)))
    return counted


def test_blocks_are_written_at_the_end_of_a_visit_only(
    tmp_path: Path, source: Callable[[str], Checkpoint], written_bytes: list[int]
) -> None:
    """Two blocks a visit: their files, all of them and nothing else, at steps 2, 4 and at the last,
    5.
    """
    written = []
    student = opened(source("llama"), tmp_path / "s", 2)
    before = contents(tmp_path / "s")
    written_bytes.clear()
    for _ in train_loop.steps(student, micro_batches, LOSS, schedule(5)):
        now = contents(tmp_path / "s")
        written.append(
            (sorted(name for name in now if now[name] != before.get(name)), sum(written_bytes))
        )
        before = now
        written_bytes.clear()
    low = ["model-00002-of-00006.safetensors", "model-00003-of-00006.safetensors"]
    high = ["model-00004-of-00006.safetensors", "model-00005-of-00006.safetensors"]
    assert [changed for changed, _ in written] == [
        [],
        [*low, "visit.json"],
        [],
        [*high, "visit.json"],
        [*low, "visit.json"],
    ]
    # visit.json is one digit
    per_visit = sum((tmp_path / "s" / name).stat().st_size for name in low) + 1
    assert [nbytes for _, nbytes in written] == [0, per_visit, 0, per_visit, per_visit]


def run(
    source: Checkpoint,
    root: Path,
    each: int = 2,
    every: int = VISIT,
    iters: int = 5,
    stop: int | None = None,
) -> list[Step]:
    """`students.run` of so many steps in the folder `root`."""
    parts = model_writer.by_block(source, root / "s")
    made = BlockStudent(parts, "weights", at_once=each, steps_each=VISIT)
    micro = partial(micro_batches, count=2, windows=1)

    def training(made: BlockStudent, start: int) -> Iterator[Step]:
        return train_loop.steps(made, micro, LOSS, schedule(iters), start)

    return students.run(made, root / "steps", training, every=every, last=iters, stop=stop)


Whole = tuple[list[tuple[float, ...]], dict[str, bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smallest: Checkpoint) -> Whole:
    """Steps and files of an undisturbed run of six steps, one block at a time."""
    root = tmp_path_factory.mktemp("whole")
    return facts(run(smallest, root, each=1, iters=6)), contents(root / "s")


def damage(step: Path) -> None:
    data = bytearray((step / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (step / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_damaged_checkpoint_can_be_done_without(
    tmp_path: Path, smallest: Checkpoint, whole: Whole, stop: int
) -> None:
    """Two a visit: the newest is damaged, the one before is perhaps of the visit before, and the
    end is the same.
    """
    with pytest.raises(Killed):
        run(smallest, tmp_path, each=1, every=1, iters=6, stop=stop)
    damage(tmp_path / "steps" / f"step-{stop:08d}")
    rest = run(smallest, tmp_path, each=1, every=1, iters=6)
    assert (facts(rest), contents(tmp_path / "s")) == (whole[0][stop - 1 :], whole[1])


def test_what_cannot_be_exact_is_refused(tmp_path: Path, smallest: Checkpoint) -> None:
    """Two visits written since the newest whole checkpoint, or no checkpoint at all: one sentence,
    both numbers.
    """
    root = tmp_path / "run"
    with pytest.raises(Killed):
        # visits 0 and 1 are written, 0 was saved
        run(smallest, root, each=1, every=100, iters=8, stop=5)
    before = contents(root / "s")
    with pytest.raises(
        MisError,
        match=r"run/s holds blocks from visit 1, but the newest complete checkpoint is from "
        r"visit 0",
    ):
        run(smallest, root, each=1, every=100, iters=8)
    damage(root / "steps" / "step-00000000")
    with pytest.raises(
        MisError, match=r"holds blocks from visit 1, but no checkpoint is complete: start a new run"
    ):
        run(smallest, root, each=1, every=100, iters=8)
    assert contents(root / "s") == before


def test_a_resumed_run_keeps_its_shards(tmp_path: Path, smallest: Checkpoint) -> None:
    """Shard and visit come from the checkpoint: a budget that changed meanwhile changes no bit."""
    run(smallest, tmp_path / "whole", each=2)
    with pytest.raises(Killed):
        run(smallest, tmp_path / "run", each=2, stop=3)
    run(smallest, tmp_path / "run", each=1)
    assert contents(tmp_path / "run" / "s") == contents(tmp_path / "whole" / "s")


def test_a_run_goes_back_to_the_checkpoint_of_its_visit(
    tmp_path: Path, llama: Checkpoint, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bad batches around the end of a visit: the run goes on without them, and ends."""
    drawn = targets.KeptTargets.micro_batches
    poisoned = (6, 7, 8)  # steps, from 1

    def some_bad(*given: Any) -> list[Any]:
        batches = drawn(*given)
        if given[-1] + 1 not in poisoned:
            return batches
        return [(*rest, shares * math.nan) for *rest, shares in batches]

    monkeypatch.setattr(targets.KeptTargets, "micro_batches", some_bad)
    asked = distill.Settings(
        teacher=str(llama.path),
        data=str(text_folder),
        out=str(tmp_path / "run"),
        scenario="none",
        ffn=512,
        vocab="512",
        train="sharded",
        quantize=0,
        iters=12,
        save_every=2,
        num_samples=2,
        reconstruct_samples=4,
        eval_windows=2,
        max_seq_length=32,
    )
    result = distill.run(asked)
    assert result["mode"] == "sharded"
    steps = run_folder.metrics(tmp_path / "run")
    assert [step["number"] for step in steps] == list(range(1, 13))
    skipped = [step["number"] for step in steps if "not a number before" in step.get("note", "")]
    assert skipped == [7, 8]
    assert all(math.isfinite(step["loss"]) for step in steps[8:])


def test_a_step_in_which_the_machine_slept_changes_nothing(
    tmp_path: Path, source: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lid was closed on the way forth: said, and done again before any update, as if it had not
    been.
    """

    class Lid(Clock):
        naps = 1

        def slept(self, since: float) -> float:
            self.naps, slept = 0, 120.0 * self.naps
            return slept

    plain, disturbed = (opened(source("llama"), tmp_path / name, LAYERS) for name in ("a", "b"))
    one = next(train_loop.steps(plain, micro_batches, LOSS, schedule(2), factor=lambda step: 1.1))
    monkeypatch.setattr(train_loop, "CLOCK", Lid())
    two = next(
        train_loop.steps(disturbed, micro_batches, LOSS, schedule(2), factor=lambda step: 1.1)
    )
    assert facts([one]) == facts([two])
    assert two.note == "the machine slept 2 min; step done again."
    assert same(learned(plain), learned(disturbed))


def test_every_block_has_its_own_dog(tmp_path: Path, source: Callable[[str], Checkpoint]) -> None:
    """Ten steps, then one a hundred times as loud: each block is clipped to a bound of its own, and
    the note says so. They remember as many norms when they are restored.
    """
    student = opened(source("llama"), tmp_path / "s", LAYERS)

    def loud(step: int) -> float:
        return 100.0 if step == 10 else 1.0

    *_, last = train_loop.steps(student, micro_batches, LOSS, schedule(11), factor=loud)
    clipped = [
        float(bound) for bound in re.findall(r"layers.\d: clipped \S+ to ([0-9.]+)", last.note)
    ]
    assert len(clipped) == LAYERS
    assert len(student.optimizers) == LAYERS + 1
    assert all(len(o.norms) == 11 for o in student.optimizers)
    again = BlockStudent(load.open_checkpoint(tmp_path / "s"), "weights", at_once=1)
    arrays: Any = student.arrays()
    again.restore(arrays, student.memory())
    assert again.memory() == student.memory()
    assert again.memory()["guards"][0]["norms"]
