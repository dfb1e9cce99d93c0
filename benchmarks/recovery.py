"""Pruning recipes at equal tokens: the baseline is Minitron as ModelOpt codes it; which part of
ours does what.

    scripts/mis benchmarks/recovery.py                       # everything: a night on 2 cores
    scripts/mis benchmarks/recovery.py --only main --seeds 0 # one group, one seed; finished rows
    are not run again

SmolLM2-135M-Instruct to -33 % parameters. A row is one student: pruned, perhaps repaired, distilled
with forward KL, judged on the same held-out windows before and after. A seed chooses calibration
windows and the order of batches; all arms of a seed see the same ones. Every row is written when it
is done, so a run that was stopped goes on with the next. Writes
benchmarks/results/<machine>/recovery/<arm>-<seed>.json; scripts/render.py makes the tables of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from ablations import block_removal, fisher_importance, local_steps, rankings
from laboratory import Laboratory, stored, write

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.distillation import live_teacher
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.maths.importance import Key, Statistics
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import calibrate, reconstruct, select, slicing
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Air, Checkpoint, KeptUnits

Tensor = Callable[[str], mx.array]
Measured = dict[Key, rankings.Moments]

PLAIN = select.PruningConfig(
    scenario="goral", importance="activation", hidden_by="importance"
)  # GÓRAL, neurons by activation, blocks by 1 - cosine


@dataclass(frozen=True)
class Arm:
    """One way to make the student.

    short: a third of the steps, half of the windows for the repair; compared with arms that are
    short too.
    """

    group: str
    cut: select.PruningConfig = PLAIN
    # how neurons and heads are, where not as `cut` says: fluctuation, magnitude, fisher, random
    ranked: str = ""
    blocks: str = ""  # how blocks are chosen, where not by 1 - cosine: see ablations/block_removal
    repair: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)  # of Distillation
    graft: str = ""  # what else becomes of the cut tensors: see GRAFTS
    start: str = "teacher"  # or random
    local: int = 0  # steps of every block by itself first, taken from the steps of the whole
    short: bool = False


def cut(**changes: Any) -> select.PruningConfig:
    """GÓRAL by activation, but for `changes`."""
    return replace(PLAIN, **changes)


def short(group: str, **changes: Any) -> Arm:
    """A short arm."""
    return Arm(group, **changes, short=True)


WHOLE = {"scenario": "none"}
WIDE = {"layers": 28, "ffn": 768}
DEFAULT: dict[str, Any] = {"cut": cut(**WIDE, importance="rms"), "recipe": {"learning_rate": 1e-4}}
ARMS: dict[str, Arm] = {
    # Full length: the baseline in the paper's shape (3e-4) and in ours; ours, which starts nearer
    # and steps shorter.
    "minitron": Arm("main"),
    "minitron-1e-4": Arm("main", recipe={"learning_rate": 1e-4}),
    "minitron-wide": Arm("main", cut=cut(**WIDE)),
    "goral-repaired": Arm("main", repair=True, recipe={"learning_rate": 1e-4}),
    "ours-3e-4": Arm("main", cut=cut(**WIDE), repair=True),
    "ours": Arm("main", cut=cut(**WIDE), repair=True, recipe={"learning_rate": 1e-4}),
    "ours-l2": Arm(
        "main", cut=cut(**WIDE, importance="rms"), repair=True, recipe={"learning_rate": 1e-4}
    ),
    # The other end: a student that knows nothing.
    "random-init": Arm("control", start="random"),
    # Eight of the twenty steps block by block, with the same repair: against wide-1e-4.
    "wide-local": short("warm", cut=cut(**WIDE), local=8, recipe={"learning_rate": 1e-4}),
    # Shapes of -31 to -35 %, repaired.
    "20x1280": short("shape", repair=True),
    "24x1024": short("shape", repair=True, cut=cut(layers=24, ffn=1024)),
    "28x768": short("shape", repair=True, cut=cut(layers=28, ffn=768)),  # at 3e-4
    "18x1536": short("shape", repair=True, cut=cut(layers=18, ffn=1536)),
    "30x1280x432": short(
        "shape", repair=True, cut=cut(layers=30, ffn=1280, hidden=432, hidden_by="pca")
    ),
    # The learning rate, of a repaired student and of one that is not.
    "wide-1e-4": short("rate", repair=True, cut=cut(**WIDE), recipe={"learning_rate": 1e-4}),
    "wide-5e-5": short("rate", repair=True, cut=cut(**WIDE), recipe={"learning_rate": 5e-5}),
    "goral-1e-4": short("rate", recipe={"learning_rate": 1e-4}),
    # Which blocks go, repaired: against repair-ffn.
    "blocks-kl": short("blocks", repair=True, blocks="kl"),
    "blocks-greedy": short("blocks", repair=True, blocks="greedy"),
    "blocks-contiguous": short("blocks", repair=True, blocks="contiguous"),
    "blocks-fisher": short("blocks", repair=True, blocks="fisher"),
    # What makes up for the cut.
    "repair-none": short("repair"),
    "repair-ffn": short("repair", repair=True),
    # The same in the default's shape and ranking.
    "wide-repair-ffn": short("wide-repair", repair=True, **DEFAULT),
    "merge": short("repair", graft="merge"),
    "mean-shift": short("repair", graft="mean-shift"),
    # Which neurons go, of 30 layers halved to 768, nothing else cut.
    "ffn-activation": short("neurons", cut=cut(**WHOLE, ffn=768)),
    "ffn-l2-l2": short("neurons", cut=cut(**WHOLE, ffn=768, importance="rms")),
    "ffn-fluctuation": short("neurons", cut=cut(**WHOLE, ffn=768), ranked="fluctuation"),
    "ffn-magnitude": short("neurons", cut=cut(**WHOLE, ffn=768), ranked="magnitude"),
    "ffn-fisher": short("neurons", cut=cut(**WHOLE, ffn=768), ranked="fisher"),
    "ffn-random": short("neurons", cut=cut(**WHOLE, ffn=768), ranked="random"),
    # Which heads, nine to six; which kv group, three to two; which hidden channels.
    "heads-activation": short("heads", cut=cut(**WHOLE, heads=6, kv_heads=3)),
    "heads-fisher": short("heads", cut=cut(**WHOLE, heads=6, kv_heads=3), ranked="fisher"),
    "heads-random": short("heads", cut=cut(**WHOLE, heads=6, kv_heads=3), ranked="random"),
    "kv-activation": short("heads", cut=cut(**WHOLE, kv_heads=2)),
    "hidden-ranked": short("hidden", cut=cut(**WHOLE, hidden=432)),
    "hidden-pca": short(
        "hidden", cut=cut(**WHOLE, hidden=432, hidden_by="pca"), recipe={"learning_rate": 1e-4}
    ),  # the other one starts so far off that it needs its 3e-4
    # What is learned from.
    "loss-ce": short("loss", recipe={"cross_entropy": 0.5}),
    "loss-t2": short("loss", recipe={"temperature": 2.0}),
}


@dataclass(frozen=True)
class Settings:
    """What is run; the defaults are what the README shows."""

    only: tuple[str, ...] = ()
    """groups or arms; default: all"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """runs of each arm"""
    iters: int = 60
    """optimizer steps of two windows; a third of them for short arms"""
    max_seq_length: int = 256
    """tokens in a window"""
    table: bool = False
    """print what there is, and make nothing"""
    eval_windows: int = 16
    """held-out English windows; a third as many Polish ones"""


class Bench(Laboratory):
    """The laboratory, with the statistics of each seed's calibration windows."""

    @cache  # noqa: B019 one object, as long as the program
    def statistics(self, seed: int) -> Statistics:
        """Of 32 windows."""
        found, _ = calibrate.calibrate(self.checkpoint, self.pick(32, seed, 1))
        return found

    @cache  # noqa: B019
    def measured(self, seed: int) -> tuple[Measured, dict[Key, np.ndarray]]:
        """Moments and lengths of weights, of the same windows."""
        return rankings.measured(self.checkpoint, self.pick(32, seed, 1), precision.usual_dtype())

    @cache  # noqa: B019
    def fisher(self, seed: int) -> dict[Key, np.ndarray]:
        """Of the first 8 of them."""
        return fisher_importance.fisher(self.checkpoint, self.pick(32, seed, 1)[:8], seed)

    def ranked(self, arm: Arm, seed: int) -> Statistics:
        """Statistics by which the arm's choices are the highest ones."""
        found = self.statistics(seed)
        scores: dict[str, Callable[[], rankings.Scores]] = {
            "fluctuation": lambda: rankings.moving(
                self.measured(seed)[0], shape_of(self.checkpoint.config).head_dim
            ),
            "magnitude": lambda: self.measured(seed)[1].__getitem__,
            "fisher": lambda: self.fisher(seed).__getitem__,
            "random": lambda: rankings.random(found, seed),
        }
        if arm.ranked:
            found = rankings.by(found, scores[arm.ranked]())
        if arm.blocks:
            few = self.pick(32, seed, 1)[: 1 if arm.blocks == "greedy" else 4]
            fisher = self.fisher(seed) if arm.blocks == "fisher" else {}
            count = select.wanted_shape(self.checkpoint.config, arm.cut).layers
            kept = block_removal.kept(
                arm.blocks,
                self.checkpoint,
                batches=few,
                dtype=precision.usual_dtype(),
                keep=count,
                fisher=fisher,
            )
            found = rankings.keeping(found, kept)
        return found

    def pruned(self, arm: Arm, seed: int, out: Path) -> Checkpoint:
        """The student's folder before repair."""
        if arm.cut.hidden_by == "pca":
            select.prune(
                self.checkpoint,
                self.pick(32, seed, 1),
                held_out=self.held_out["English"],
                out=out,
                cut=arm.cut,
                dtype="bfloat16",
                air=Air,
                files=DISK,
            )
            return compute_type.open_to_compute(out)
        shape, keep = select.select_units(self.checkpoint.config, self.ranked(arm, seed), arm.cut)
        whole = self.checkpoint
        tensor = None
        if arm.graft:
            whole, tensor = GRAFTS[arm.graft](whole, keep, self.measured(seed)[0])
        slicing.write_student(
            whole, shape, keep=keep, out=out, dtype="bfloat16", files=DISK, tensor=tensor
        )
        return compute_type.open_to_compute(out)

    def begun(
        self, arm: Arm, seed: int, recipe: DistillationConfig, temp: Path
    ) -> tuple[Any, Checkpoint, dict[str, Any]]:
        """(the student in memory before it is distilled, its folder, what it was worth on the
        way).
        """
        student = self.pruned(arm, seed, temp / "pruned")
        keep = model_writer.read_keep(student.path)
        found = dict[str, Any]()
        assert keep is not None
        if arm.local:
            found["pruned"] = self.judge(
                stream.load_checked(load.resident_model(student, mx.float32))
            )
            taught = model_writer.by_block(student, temp / "parts", DISK)
            r = replace(
                recipe,
                iters=arm.local,
                warmup=2,
                learning_rate=3e-4,
                batch_size=1,
                grad_accumulation_steps=recipe.batch_size,
            )
            windows = self.pick(recipe.reconstruct_samples, seed, 2)
            for _ in local_steps.train(
                self.checkpoint,
                student,
                student=taught,
                keep=keep,
                batches=windows,
                recipe=r,
                folder=temp,
                held=len(windows),
                files=DISK,
            ):
                pass
            return stream.load_checked(load.resident_model(taught, mx.float32)), student, found
        model = stream.load_checked(load.resident_model(student, mx.float32))
        if arm.repair:
            found["pruned"] = self.judge(model)
            windows = self.pick(recipe.reconstruct_samples, seed, 2)
            repaired, _ = reconstruct.reconstruct(self.checkpoint, student, keep, windows)
            model.load_weights(list(repaired.items()), strict=False)
            stream.load_checked(model)
        if arm.start == "random":
            forget(model, seed)
        return model, student, found

    def row(self, arm: Arm, seed: int, recipe: DistillationConfig) -> dict[str, Any]:
        """Make one student and judge it."""
        began = time.monotonic()
        with TemporaryDirectory() as temp:
            model, student, found = self.begun(arm, seed, recipe, Path(temp))
            keep = model_writer.read_keep(student.path)
        assert keep is not None
        found["start"] = self.judge(model)
        source = live_teacher.StreamedTeacher(
            self.checkpoint,
            None,
            direct=False,
            temperature=recipe.temperature,
            cross_entropy=recipe.cross_entropy,
        )
        student = WholeModel(model, GuardedAdamW(weight_decay=recipe.weight_decay))
        steps = list(live_teacher.steps(student, source, self.data.train, recipe))
        model.eval()
        return {
            "group": arm.group,
            "seed": seed,
            "params": arch.params(student.config),
            "layers": list(keep.layers),
            "iters": len(steps),
            "tokens": sum(s.tokens for s in steps),
            "pruned": found.get("pruned", found["start"]),
            "start": found["start"],
            "end": self.judge(model),
            "train_loss": [round(s.loss, 4) for s in steps],
            "notes": [f"{s.number}: {s.note}" for s in steps if s.note],
            "seconds": round(time.monotonic() - began),
        }


def forget(model: Any, seed: int) -> None:
    """Random weights of the same shape: N(0, 0.02) as llamas begin, norms 1."""
    from mlx.utils import tree_flatten

    fresh = []
    for at, (name, w) in enumerate(tree_flatten(model.parameters())):
        noise = mx.random.normal(w.shape, key=mx.random.key(1000 * seed + at)) * 0.02
        fresh.append((name, mx.ones_like(w) if "norm" in name else noise))
    model.load_weights(fresh)
    stream.load_checked(model)


def merged(teacher: Checkpoint, keep: KeptUnits, moments: Measured) -> tuple[Checkpoint, Tensor]:
    """What the dropped blocks behind a kept one differ from it by is added to it (LaCo, arXiv
    2402.11187 eq. 1).
    """
    ends = dict(zip(keep.layers, [*keep.layers[1:], shape_of(teacher.config).layers], strict=True))

    def tensor(name: str) -> mx.array:
        weight = load.dense(teacher, name)
        if (layer := arch.block_of(name)) is None:
            return weight
        own = weight.astype(mx.float32)
        others = [
            load.dense(teacher, name.replace(f".{layer}.", f".{j}.", 1))
            for j in range(layer + 1, ends[layer])
        ]
        return own + sum((o.astype(mx.float32) - own for o in others), mx.zeros_like(own))

    return teacher, tensor


def shifted(teacher: Checkpoint, keep: KeptUnits, moments: Measured) -> tuple[Checkpoint, Tensor]:
    """The mean of what the cut neurons wrote stays as a bias of down_proj (FLAP, arXiv 2312.11983
    eq. 7).
    """

    def tensor(name: str) -> mx.array:
        if not name.endswith(".bias"):
            return load.dense(teacher, name)
        layer = arch.block_of(name)
        weight = load.dense(teacher, name.replace(".bias", ".weight"))
        if "down_proj" not in name or layer is None:
            return mx.zeros((weight.shape[0],))
        gone = moments[layer, "ffn"].mean.copy()
        gone[list(keep.kept[layer, "ffn"])] = 0
        return weight.astype(mx.float32) @ mx.array(gone.astype(np.float32))

    return replace(teacher, config={**teacher.config, "mlp_bias": True}), tensor


GRAFTS = {"merge": merged, "mean-shift": shifted}


def by_seed(name: str, seeds: Iterable[int]) -> dict[int, Any]:
    """The stored rows of an arm, of these seeds that it has been run with."""
    rows = {seed: stored(f"recovery/{name}-{seed}") for seed in seeds}
    return {seed: row for seed, row in rows.items() if row}


def table() -> str:
    """Markdown of all rows there are: means over seeds, and what is closed of the gap that the
    baseline leaves.
    """
    nll = stored("recovery/teacher")["nll"]
    head = (
        "group,student,seeds,M parameters,tokens,pruned,before distilling,after,KL after,Polish "
        "after"
    )
    heads = [
        *head.split(","),
        "closed of the baseline's remaining gap, English then Polish, by seed",
    ]
    lines = []
    for name, arm in ARMS.items():
        rows = by_seed(name, range(10))
        if not rows:
            continue
        against = {}
        if not arm.short and name != "minitron":
            against = by_seed("minitron", rows)
        closed = []
        for metric, text in (("nll", "English"), ("nll_polish", "Polish")):
            for seed, row in against.items():
                base = row["end"][metric]
                gap = base - nll[text]
                closed.append(f"{(base - rows[seed]['end'][metric]) / gap:+.0%}")
        values = []
        for when, metric in (
            ("pruned", "nll"),
            ("start", "nll"),
            ("end", "nll"),
            ("end", "kl"),
            ("end", "nll_polish"),
        ):
            mean = np.mean([row[when][metric] for row in rows.values()])
            values.append(f"{mean:.3f}")
        row = next(iter(rows.values()))
        sizes = [str(len(rows)), f"{row['params'] / 1e6:.1f}", str(row["tokens"])]
        lines.append([arm.group, name, *sizes, *values, " ".join(closed) or "–"])
    return markdown_table(heads, lines, words=2)


def main(s: Settings) -> None:
    """Every arm that was asked for and is not there yet."""
    if s.table:
        print(table())
        return
    names = [n for n, a in ARMS.items() if not s.only or n in s.only or a.group in s.only]
    asked = [(name, seed) for seed, name in product(s.seeds, names)]
    todo = [(name, seed) for name, seed in asked if not stored(f"recovery/{name}-{seed}")]
    cli.say(f"{len(todo)} rows to make")
    if not todo:
        return
    bench = Bench(s.max_seq_length, s.eval_windows)
    if not stored("recovery/teacher"):
        write(
            "recovery/teacher", "scripts/mis benchmarks/recovery.py", {"nll": bench.teacher_nll()}
        )
    for name, seed in todo:
        arm = ARMS[name]
        iters = s.iters // 3 if arm.short else s.iters
        sizes = {"max_seq_length": s.max_seq_length, "reconstruct_samples": 32 if arm.short else 64}
        rate = {"learning_rate": 3e-4, **arm.recipe}
        recipe = DistillationConfig(iters=iters - arm.local, seed=seed, **sizes, **rate)
        found = bench.row(arm, seed, recipe)
        command = (
            f"scripts/mis benchmarks/recovery.py --only {name} --seeds {seed} --iters {s.iters}"
        )
        command += f" --eval-windows {s.eval_windows}"
        write(f"recovery/{name}-{seed}", command, {"arm": name, **found})
        losses = " -> ".join(f"{found[when]['nll']:.3f}" for when in ("pruned", "start", "end"))
        cli.say(f"{name}, seed {seed}: {losses} nats, {found['seconds']} s")
        mx.clear_cache()


if __name__ == "__main__":
    main(cli.parse(Settings))
