"""One shard trained at a time: the step of the resident model, in little memory, and exact whatever
is killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from mis_mlx import distill
from mis_mlx.compute.token_losses import TokenLoss, teacher_kl
from mis_mlx.distillation import live_teacher, sharded, train_loop
from mis_mlx.hardware.clock import Clock
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW, global_norm
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, Files
from mis_mlx.storage.safetensors import InParts
from mis_mlx.types import Checkpoint, MisError, Step
from tests import family_checks, tiny
from tests.conftest import mostly_slow

LAYERS = 4
VISIT = 2
Arrays = dict[str, dict[str, mx.array]]


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


def micro_batches(
    step: int, count: int = 3, width: int = 64, windows: int = 2
) -> list[tuple[mx.array, ...]]:
    """Tokens (2, 16), an uneven learn mask (of the second one empty), and a teacher's hidden
    states.
    """
    made: list[tuple[mx.array, ...]] = []
    for b in range(count):
        keys = mx.random.split(mx.random.key(100 * step + b), 3)
        loss_mask = (mx.random.uniform(shape=(windows * 16,), key=keys[0]) < 0.7) * float(b != 1)
        tokens = mx.random.randint(0, 512, (windows, 16), key=keys[1])
        made.append((tokens, loss_mask, mx.random.normal((windows * 16, width), key=keys[2])))
    return made


def logits(hidden: mx.array) -> mx.array:
    """A teacher's, with a fixed random head."""
    return hidden @ (0.05 * mx.random.normal((512, hidden.shape[1]), key=mx.random.key(9))).T


def kl(
    hidden: mx.array,
    head: mx.array,
    loss_mask: mx.array,
    target: mx.array,
    *,
    frozen_head: bool = True,
) -> mx.array:
    """Forward KL against that teacher."""
    return losses.kl_sum(
        hidden,
        head,
        teacher=target,
        teacher_logits=logits,
        loss_mask=loss_mask,
        temperature=1.0,
        rows=None,
        frozen_head=frozen_head,
    )


LOSS = TokenLoss(kl)


def schedule(iters: int) -> Any:
    return tiny.schedule(iters, 1e-2, 2)


def resident(
    student: Checkpoint, each: int, iters: int
) -> tuple[nn.Module, list[Step], list[Arrays]]:
    """The same training with everything in memory, all gradients first: the model, the steps,
    weights and moments after each. Every block has an optimizer of its own.
    """
    model = stream.load_checked(load.resident_model(student, mx.float32))
    steps: list[Step] = []
    arrays: list[Arrays] = []
    shard = nn.Module()

    def loss(_: nn.Module, tokens: mx.array, loss_mask: mx.array, target: mx.array) -> mx.array:
        hidden = model.model(tokens)
        return kl(hidden.reshape(-1, hidden.shape[-1]), load.head_weight(model), loss_mask, target)

    for number in range(iters):
        # of all blocks there is one visit
        if number % VISIT == 0 and (not number or each < LAYERS):
            first = number // VISIT % math.ceil(LAYERS / each) * each
            shard.layers = model.model.layers[first : first + each]
            optimizers = [GuardedAdamW(eight_bit=True) for _ in shard.layers]
        total = 0.0
        tokens = 0.0
        summed = None
        for batch in micro_batches(number):
            value, made = nn.value_and_grad(shard, loss)(shard, *batch)
            summed = made if summed is None else tree_map(mx.add, summed, made)
            total = total + value
            tokens = tokens + batch[1].sum().item()
        norms = []
        rate = schedule(iters).rate(number)
        for block, mine, o in zip(shard.layers, summed["layers"], optimizers, strict=True):
            norms.append(global_norm(mine).item() / tokens)
            o.update(
                block,
                mine,
                loss=total.item() / tokens,
                norm=norms[-1],
                learning_rate=rate,
                batch=number + 1,
                scale=1 / tokens,
            )
        mx.eval(shard.parameters(), [o.adamw.state for o in optimizers])
        weights = {}
        moments = {}
        for i, (block, optimizer) in enumerate(zip(shard.layers, optimizers, strict=True), first):
            for name, array in tree_flatten(block.parameters()):
                weights[f"model.layers.{i}.{name}"] = array
            for name, array in optimizer.arrays().items():
                moments[f"model.layers.{i}.{name}"] = array
        arrays.append({"model": weights, "optimizer": moments})
        steps.append(
            Step(
                number=number + 1,
                loss=total.item() / tokens,
                grad_norm=math.hypot(*norms),
                learning_rate=rate,
                tokens=int(tokens),
                seconds=0.0,
                peak_bytes=0,
                note="",
            )
        )
    return model, steps, arrays


def opened(
    student: Checkpoint, folder: Path, each: int = 1, files: Files = DISK, **how: Any
) -> sharded.Sharded:
    """`student` in parts in `folder`, ready to train."""
    made = sharded.Sharded(
        model_writer.by_block(student, folder, files),
        each,
        steps_per_shard=VISIT,
        files=files,
        **how,
    )
    made.begin()
    return made


def facts(steps: list[Step]) -> list[tuple[float, ...]]:
    return [(s.number, s.loss, s.grad_norm, s.learning_rate, s.tokens) for s in steps]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def taken(student: sharded.Sharded, name: str) -> mx.array:
    """A weight of the end; one in parts is joined."""
    weight = student.take(name)
    if isinstance(weight, InParts):
        return mx.concatenate(list(weight.parts))
    return weight


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


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
def test_sharded_is_resident_bit_for_bit(
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
            assert all(
                same(student.arrays()[key], arrays[step.number - 1][key])
                for key in ("model", "optimizer")
            )
    assert facts(got) == facts(wanted)
    wanted_weights = dict(tree_flatten(model.parameters()))
    assert same({name: taken(student, name) for name in wanted_weights}, wanted_weights)
    end = load.open_checkpoint(tmp_path / "s")
    assert each == LAYERS or same(
        {name: load.dense(end, name) for name in wanted_weights}, wanted_weights
    )
    assert mx.array_equal(
        taken(student, "model.embed_tokens.weight"), load.embedding(source(kind), mx.float32).weight
    )


def test_room_and_the_page_cache_change_no_bit(
    tmp_path: Path, source: Callable[[str], Checkpoint]
) -> None:
    """Blocks kept in memory (fewer bytes read), reads past the page cache: the same files."""
    head = 512 * 64 * 4
    block = sum(t.nbytes for n, t in source("llama").tensors.items() if ".layers.1." in n) + 4096
    hows: dict[str, dict[str, Any]] = {
        "plain": {},
        "room": {"headroom_bytes": head + 2 * block},
        "direct": {"direct": True},
    }
    read = {}
    for name, how in hows.items():
        student = opened(source("llama"), tmp_path / name, 2, **how)
        for _ in train_loop.steps(student, micro_batches, LOSS, schedule(4)):
            read[name] = student._source.reader.nbytes  # since the visit began
        assert contents(tmp_path / name) == contents(tmp_path / "plain"), name
    assert read["room"] < read["plain"] == read["direct"]


def test_memory_holds_a_shard_not_the_student(tmp_path: Path) -> None:
    """24 blocks of 641 KiB, one trainable: two steps, each of another shard, take under 6 MiB.

    That is two slots and one block with its gradient and moments (3.8 MiB), a block's new gradient,
    24 x 2 hidden states of 8 KiB, head and logits, or the update (4.3 MiB measured).
    """
    source = load.open_checkpoint(tiny.make(tmp_path / "deep", num_hidden_layers=24))
    student = sharded.Sharded(
        model_writer.by_block(source, tmp_path / "s", DISK),
        1,
        steps_per_shard=1,
        files=DISK,
    )
    micro = partial(micro_batches, count=2)
    mx.eval([micro(step) for step in range(2)])
    mx.clear_cache()
    before = mx.get_active_memory()
    student.begin()
    steps = list(train_loop.steps(student, micro, LOSS, schedule(2)))
    assert max(s.peak_bytes for s in steps) - before < 6 * 2**20 < source.nbytes


class Counting(Files):
    """The real disk, counting the bytes written to every file."""

    def __init__(self) -> None:
        self.written = 0
        for name in ("write", "extend"):
            setattr(self, name, partial(self._count, getattr(self, name)))

    def _count(self, do: Callable[..., None], path: Path, data: bytes | memoryview) -> None:
        self.written += len(data)
        do(path, data)


def test_blocks_are_written_at_the_end_of_a_visit_only(
    tmp_path: Path, source: Callable[[str], Checkpoint]
) -> None:
    """Two blocks a visit: their files, all of them and nothing else, at steps 2, 4 and at the last,
    5.
    """
    files = Counting()
    written = []
    student = opened(source("llama"), tmp_path / "s", 2, files)
    before = contents(tmp_path / "s")
    files.written = 0
    for _ in train_loop.steps(student, micro_batches, LOSS, schedule(5)):
        now = contents(tmp_path / "s")
        written.append(
            (sorted(name for name in now if now[name] != before.get(name)), files.written)
        )
        before = now
        files.written = 0
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


class Killed(BaseException):
    """Stands for the end of the process: no `except` and no clean-up gets past it."""


def run(
    source: Checkpoint,
    root: Path,
    files: Files = DISK,
    each: int = 2,
    every: int = VISIT,
    iters: int = 5,
    stop: int | None = None,
) -> list[Step]:
    """What a command does: start or resume, train, save `every` steps; killed after step `stop` is
    saved, or not.
    """
    steps_dir = root / "steps"
    done = []
    files.make_folder(steps_dir)
    student = sharded.Sharded(
        model_writer.by_block(source, root / "s", files),
        each,
        steps_per_shard=VISIT,
        files=files,
    )

    def save(number: int) -> None:
        arrays = {key: named for key, named in student.arrays().items() if named}
        memory = student.memory()
        state = {"arrays": list(arrays), "shard": memory}
        protocol.save_step(steps_dir, number, arrays=arrays, state=state, files=files)

    if saved := protocol.newest(steps_dir, files):
        arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
        student.restore(arrays, saved.state["shard"])
        start = saved.number
    else:
        student.begin()
        save(start := 0)
    micro = partial(micro_batches, count=2, width=16, windows=1)
    for step in train_loop.steps(student, micro, LOSS, schedule(iters), start):
        done.append(step)
        if step.number % every == 0 or step.number == iters:
            save(step.number)
        if step.number == stop:
            raise Killed
    return done


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


def test_three_bad_batches_stop_the_run_across_visits(
    tmp_path: Path, source: Callable[[str], Checkpoint]
) -> None:
    """Visits of one step: the dog counts on, and no block holds anything that is not a number."""
    student = sharded.Sharded(
        model_writer.by_block(source("llama"), tmp_path / "s", DISK),
        1,
        steps_per_shard=1,
        files=DISK,
    )
    student.begin()

    def poisoned(step: int) -> list[tuple[mx.array, ...]]:
        return [
            (tokens, loss_mask, target * math.nan)
            for tokens, loss_mask, target in micro_batches(step)
        ]

    with pytest.raises(MisError, match="3 steps in a row"):
        list(train_loop.steps(student, poisoned, LOSS, schedule(9)))
    end = load.open_checkpoint(tmp_path / "s")
    assert same(*(dict(load.weights(c, "", mx.float32)) for c in (end, source("llama"))))


def test_a_run_goes_back_to_the_checkpoint_of_its_visit(
    tmp_path: Path, llama: Checkpoint, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bad batches around the end of a visit: the run goes on without them, and ends."""
    drawn = live_teacher.step_micro_batches
    poisoned = (6, 7, 8)  # steps, from 1

    def some_bad(*given: Any) -> list[Any]:
        batches = drawn(*given)
        if given[-1] + 1 not in poisoned:
            return batches
        bad = []
        for tokens, mask, *targets in batches:
            no_numbers = [target * math.nan for target in targets]
            bad.append((tokens, mask, *no_numbers))
        return bad

    monkeypatch.setattr(live_teacher, "step_micro_batches", some_bad)
    flags = {**family_checks.RUN, "vocab": "512", "layers": 3, "iters": 12, "save_every": 2}
    asked = distill.Settings(
        teacher=str(llama.path), data=str(text_folder), out=str(tmp_path / "run"), **flags
    )
    result = distill.run(replace(asked, train="sharded", targets="live", quantize=0))
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
    assert all(same(plain.arrays()[key], disturbed.arrays()[key]) for key in ("model", "optimizer"))


def test_every_block_has_its_own_dog(tmp_path: Path, source: Callable[[str], Checkpoint]) -> None:
    """Ten steps, then one a hundred times as loud: each block is clipped to a bound of its own, and
    the note says so. They remember as many norms when they are restored.
    """
    student = opened(source("llama"), tmp_path / "s", LAYERS)

    def loud(step: int) -> float:
        return 100.0 if step == 10 else 1.0

    *_, last = train_loop.steps(student, micro_batches, LOSS, schedule(11), factor=loud)
    clipped = [
        float(bound) for bound in re.findall(r"block \d: clipped \S+ to ([0-9.]+)", last.note)
    ]
    assert len(clipped) == LAYERS
    assert all(len(o.norms) == 11 for o in student.optimizers)
    again = sharded.Sharded(load.open_checkpoint(tmp_path / "s"), 1, steps_per_shard=1, files=DISK)
    again.restore(student.arrays(), student.memory())
    assert again.memory() == student.memory()
    assert again.memory()["guards"][0]["norms"]


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("shard", [1, LAYERS])
def test_numpy_computes_the_loss_of_the_graph(
    tmp_path: Path, source: Callable[[str], Checkpoint], shard: int
) -> None:
    """A step by numpy is one by MLX: the loss to 1e-6, the gradients to 1e-5 of the
    largest.
    """
    student = sharded.Sharded(
        model_writer.by_block(source("llama"), tmp_path / "s", DISK),
        shard,
        steps_per_shard=VISIT,
        weight_decay=0.0,
        files=DISK,
    )
    student.begin()
    batches = micro_batches(0)
    by_numpy = teacher_kl(lambda head: logits)
    assert by_numpy.by_numpy
    a = student.look(batches, LOSS)
    left = list(student.passes.backward_blocks(a))
    b = student.look(batches, by_numpy)
    right = list(student.passes.backward_blocks(b))
    assert a.tokens == b.tokens
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert [i for i, _ in left] == [i for i, _ in right] == list(reversed(student.blocks))
    for (_, ours), (_, theirs) in zip(left, right, strict=True):
        for name, gradient in ours.items():
            most = mx.abs(gradient).max().item()
            assert mx.abs(gradient - theirs[name]).max().item() <= 1e-5 * most + 1e-9, name
