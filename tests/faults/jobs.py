"""Real jobs on a model of 2 layers, of a fraction of a second: what faults are made under, and what
must come out.

A job begins in an empty folder, or goes on with what lies there, as a user would. `outcome` is
every byte that must be the same at the end, whatever happened on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import distill, dpo, export, grpo, prune, quantize, sft
from mis_mlx.alignment import alignment_run
from mis_mlx.distillation import block_student, pipeline, strategies
from mis_mlx.models.opening import load
from mis_mlx.quantization import begun_rounding
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import logit_store, run_folder
from mis_mlx.storage.hidden_spool import Spool
from tests import tiny

Outcome = dict[str, str]
# a reward that a model of random weights gets now and then
VOWELS = """
def vowels(prompts, completions, answer):
    return [sum(c in "aeiouy" for c in text) / max(1, len(text)) for text in completions]
"""
LOSSES = "losses"  # in an outcome: of a power cut they may miss some, whose lines were not synced
# of the logit store
WINDOWS = 6
LENGTH = 8


@dataclass(frozen=True)
class Job:
    """`run(place)`: begin or go on. `outcome(place)`: name -> sha256."""

    name: str
    run: Callable[[Path], None]
    outcome: Callable[[Path], Outcome]
    # model and text, from which `jobs` makes it again in another process
    made: tuple[Path, Path] = (Path(), Path())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(folder: Path) -> Outcome:
    """{path inside: sha256} of all files."""
    return {
        str(p.relative_to(folder)): sha256(p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def made(root: Path) -> tuple[Path, Path]:
    """(model, text) for the jobs, made below `root`."""
    from pydoc_data.topics import topics

    text = root / "text"
    names = sorted(topics)
    text.mkdir(parents=True)
    for split, chosen in (("train", names[:6]), ("valid", names[30:31]), ("test", names[40:42])):
        rows = [json.dumps({"text": topics[name][:1500]}) for name in chosen]
        (text / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (root / "lessons").mkdir()
    (root / "lessons" / "vowels.py").write_text(VOWELS)
    for split, chosen in (("train", names[:8]), ("valid", names[30:32])):
        taught = []
        for name in chosen:
            answers = {"completion": topics[name][:80], "chosen": topics[name][:80]}
            more = {"rejected": f"Nobody knows {name}", "answer": "5"}
            taught.append(json.dumps({"prompt": f"What is {name}?", **answers, **more}))
        (root / "lessons" / f"{split}.jsonl").write_text("\n".join(taught) + "\n")
    model = tiny.make(root / "model", num_hidden_layers=2, intermediate_size=512)
    tiny.packed(load.open_checkpoint(model), root / "packed")
    return model, text


def _folder(
    command: Callable[[Path], object],
) -> tuple[Callable[[Path], None], Callable[[Path], Outcome]]:
    """run and outcome of a command that makes the one folder `out`."""

    def run(place: Path) -> None:
        if not (place / "out").exists():
            command(place / "out")

    return run, lambda place: contents(place / "out")


def jobs(model: Path, text: Path) -> dict[str, Job]:
    """All of them, by name."""
    few: dict[str, Any] = {"data": str(text), "num_samples": 2, "max_seq_length": 32}

    def pruned(out: Path) -> None:
        prune.run(prune.Settings(model=str(model), mlx_path=str(out), ffn=256, **few))

    def quantized(out: Path) -> None:
        rough: dict[str, Any] = {"q_method": "round", "target_bpw": None}
        _quantized(out, model=str(model), **rough)

    def tuned(out: Path) -> None:
        learning: dict[str, Any] = {"teacher": str(model), "q_iters": 2, "save_every": 1}
        _quantized(out, model=str(model), target_bpw=4.6, **few, **learning)

    def exported(out: Path) -> None:
        export.run(export.Settings(model=str(model), out=str(out)))

    asked: dict[str, Any] = {"teacher": str(model), **few, "reconstruct_samples": 2, "ffn": 256}
    asked |= {"eval_windows": 1, "iters": 2, "save_every": 1, "q_iters": 1, "keep_steps": True}
    asked["learning_rate"] = 1e-2
    lessons = text.parent / "lessons"
    taught: dict[str, Any] = {"model": str(model), "data": str(lessons), "max_seq_length": 128}
    taught |= {"iters": 3, "save_every": 2, "eval_rows": 2}
    of_scales = {**taught, "model": str(model.parent / "packed"), "fine_tune_type": "scales"}
    answered = {**taught, "group_size": 4, "grad_accumulation_steps": 2}
    answered |= {"max_completion_length": 8, "reward_functions_file": str(lessons / "vowels.py")}

    makers: dict[str, Callable[[Path], None]] = {
        "prune": pruned,
        "quantize": quantized,
        "quantize, tuned": tuned,
        "export": exported,
    }
    found = [Job(name, *_folder(maker)) for name, maker in makers.items()]
    found += [
        Job("distill", _running(distill, asked), _distilled),
        Job(
            "distill, block by block", _running(distill, {**asked, "train": "sharded"}), _distilled
        ),
        Job("distill, scales on disk", _with_scales_on_disk(_running(distill, asked)), _distilled),
        Job("distill, blocks in turn", _running(distill, {**asked, "train": "blocks"}), _distilled),
        Job("sft", _running(sft, taught), _distilled),
        Job("sft of scales", _running(sft, of_scales), _distilled),
        Job("dpo", _running(dpo, taught), _distilled),
        Job("grpo", _running(grpo, answered), _distilled),
        Job("logit store", _store, lambda place: contents(place / "targets")),
        Job("spool", _spool, lambda place: contents(place)),
    ]
    return {job.name: replace(job, made=(model, text)) for job in found}


def _quantized(out: Path, **asked: Any) -> None:
    """`quantize`, begun or gone on with."""
    begun = run_folder.is_run(out.with_name(f"{out.name}-unfinished"))
    flags = {"resume": True} if begun else asked
    quantize.run(quantize.Settings(mlx_path=str(out), **flags))


def _running(command: Any, asked: dict[str, Any]) -> Callable[[Path], None]:
    """A command with a run folder, begun or gone on with."""

    def run(place: Path) -> None:
        out = place / "run"
        if (out / run_folder.RESULT).exists():
            return
        begun = {"resume": True} if run_folder.is_run(out) else asked
        with contextlib.redirect_stdout(io.StringIO()):
            command.run(command.Settings(out=str(out), **begun))

    return run


def _with_scales_on_disk(run: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same as planned where scales and their moments do not fit in memory."""

    def run_on_disk(place: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            on_disk = partial(block_student._scales, on_disk=True)
            patch.setattr(strategies, "scales_cost", on_disk)
            run(place)

    return run_on_disk


def _distilled(place: Path) -> Outcome:
    """The models that a run wrote, and every loss on the way."""
    out = place / "run"
    losses = [(r["number"], r["loss"], r["grad_norm"]) for r in run_folder.metrics(out)]
    held_out = {r["number"]: r["loss"] for r in run_folder.records(out / alignment_run.HELD_OUT)}
    whole = {}
    for name in ("pruned", "distilled", "model"):
        files = contents(out / name)
        files.pop("README.md", None)
        whole |= {f"{name}/{file}": value for file, value in files.items()}
    return {**whole, LOSSES: sha256(json.dumps([losses, sorted(held_out.items())]).encode())}


def _store(place: Path) -> None:
    """A logit store of three parts."""
    shape: dict[str, Any] = {"count": 4, "vocab": 64, "windows": WINDOWS, "length": LENGTH}
    origin: dict[str, Any] = {"teacher": "teacher", "data": "data", "seed": 0}
    spec = logit_store.Spec(top=0, part_windows=2, **shape, **origin)
    store = logit_store.create(place / "targets", spec)
    for window in store.missing():
        at = np.arange(LENGTH)
        sizes = 1 + (window + at) % 3
        ids = np.concatenate([np.arange(n) for n in sizes])
        store.put(window, {"sizes": sizes, "ids": ids, "shares": np.ones_like(ids)})


def _spool(place: Path) -> None:
    """Hidden states through a file and back. It is scratch: what must come out is right bytes, and
    nothing left.
    """
    spool = Spool(place, 1)
    given = [mx.full((4, 8), float(i)) for i in range(4)]
    spool.extend(given)
    for i in range(4):
        spool[i] = spool[i] + 1.0
    assert all(mx.array_equal(spool[i], given[i] + 1.0).item() for i in range(4))


@dataclass(frozen=True)
class Said:
    """What the program said is safe: a folder or file, its step if it is one, contents, when."""

    path: Path
    step: int | None
    files: Outcome
    at: int = 0


@contextmanager
def acknowledged(say: Callable[[Said], None], now: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """`say` what is safe as soon as the commit protocol, or the logit store, says it."""
    save_step = protocol.save_step
    commit_folder = protocol.commit_folder
    commit_part = logit_store.Targets._commit

    def saving(steps_dir: Path, number: int, *arguments: Any, **more: Any) -> Path:
        path = save_step(steps_dir, number, *arguments, **more)
        say(Said(path, number, contents(path), now()))
        return path

    @contextmanager
    def committing(final: Path, *arguments: Any, **more: Any) -> Iterator[Path]:
        with commit_folder(final, *arguments, **more) as tmp:
            yield tmp
        # replaced, or deleted, on purpose
        passing = final.name == "parts" or final.name.startswith(".tmp-")
        if not (passing or protocol.STEP.fullmatch(final.name)):
            say(Said(final, None, contents(final), now()))

    def keeping(store: logit_store.Targets, number: int, *arguments: Any) -> None:
        commit_part(store, number, *arguments)
        path = store.path(number)
        say(Said(path, None, {path.name: sha256(path.read_bytes())}, now()))

    def set_all(*operations: Any) -> None:
        protocol.save_step, protocol.commit_folder, logit_store.Targets._commit = operations

    set_all(saving, committing, keeping)
    try:
        yield
    finally:
        set_all(save_step, commit_folder, commit_part)


def lost(said: Iterable[Said], then: Path, now: Path) -> list[str]:
    """What was acknowledged below `then` and is not, or not with its bytes, below `now`: there, or
    the same place.
    """
    bad = []
    newest = dict[Path, Said]()
    said = list(said)
    whole = {each.path for each in said if each.step is None}
    for each in said:
        here = now / each.path.relative_to(then)
        if _served(each, whole, here, now):
            continue
        if each.step is not None:
            newest[here.parent] = each
        elif each.files != (contents(here) if here.is_dir() else _file(here)):
            bad.append(here.name)
    for steps_dir, each in newest.items():
        saved = protocol.newest(steps_dir)
        if saved is None or saved.number < (each.step or 0) or saved.notes:
            bad.append(
                f"{steps_dir.name} {each.step}, there is {saved.number if saved else 'none'}"
            )
        elif saved.number == each.step and contents(saved.path) != each.files:
            bad.append(f"{steps_dir.name} {each.step}, other bytes")
    return bad


def _served(each: Said, whole: Collection[Path], here: Path, now: Path) -> bool:
    """Whether the work has gone on, so that this is no longer needed.

    whole: the folders that were said to be safe, each of which is judged for itself. Of `quantize`
    only its model is needed in the end; the journal of a rounding goes once its model is safe.
    """
    if here.is_relative_to(now / "out-unfinished") and (now / "out").is_dir():
        return here.name != "model" or contents(now / "out") == each.files
    if each.path.parts[-3:-1] != (pipeline.ROUNDING, begun_rounding.BLOCKS):
        return False
    work = each.path.parents[2]
    return work / pipeline.ROUNDED in whole or work / "model" in whole


def _file(path: Path) -> Outcome:
    return {path.name: sha256(path.read_bytes())} if path.is_file() else {}


def clean(place: Path) -> Path:
    """`place`, empty."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place
