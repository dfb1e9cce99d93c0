"""Time models on this machine: first token, decoding, memory."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Annotated, Any

import psutil
import tyro

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.hardware import memory, rates
from mis_mlx.hardware.thermal import governor
from mis_mlx.hardware.thermal.thermal_monitor import Monitor
from mis_mlx.judge.speed import rounds
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, resolve
from mis_mlx.reporting import progress, text
from mis_mlx.types import MOST, Checkpoint, MisError, Reading, Seconds, Seed, Within


@dataclass(frozen=True)
class Settings(cli.Budgeted):
    """Every model gets the same texts and lengths, in turns (A B A B), so drift affects all
    equally.
    """

    model: tuple[str, ...] = ()
    """folders or hub ids, `--model A B`; default: SmolLM2-135M-Instruct"""
    prompt_tokens: Annotated[int, Within(1, MOST), tyro.conf.arg(aliases=["-p"])] = 512
    """tokens per prompt; each trial uses its own text"""
    generation_tokens: Annotated[int, Within(2, MOST), tyro.conf.arg(aliases=["-g"])] = 128
    """tokens to generate, 2 or more"""
    num_trials: Annotated[int, Within(1, MOST), tyro.conf.arg(aliases=["-n"])] = 5
    """timed trials, after an untimed warm-up (the whole prompt, 4 tokens)"""
    delay: Seconds = 0.0
    """seconds of rest before each trial; use 30 or more on a laptop without a fan"""
    seed: Seed = 0
    """selects the texts"""


class Bench:
    """One run: the models by name, and the trials that are finished."""

    def __init__(self, s: Settings):
        """Open the models. MisError where one is given twice, or does not fit the budget."""
        cli.check_ranges(s)
        self.s = s
        self.r = rounds.Request(s.prompt_tokens, s.generation_tokens)
        folders = [resolve.resolve_model(name).path for name in s.model or [None]]
        if len(set(folders)) < len(folders):
            raise MisError(
                f"{len(folders)} models given, but only {len(set(folders))} different ones: "
                f"give each once"
            )
        self.models = dict[str, Checkpoint]()
        for name, folder in zip(resolve.labels(folders), folders, strict=True):
            self.models[name] = compute_type.open_to_compute(folder)
        limit = memory.budget(s.budget_bytes)
        all_bytes = 0
        for name, model in self.models.items():
            nbytes = rounds.need_bytes(model, self.r)
            all_bytes += nbytes
            limit.need(
                memory.needed_bytes(nbytes),
                f"timing {name}",
                "give a larger --budget, a smaller -p, or a model with fewer bits",
            )
        self.together = memory.needed_bytes(all_bytes) <= limit.limit_bytes
        if not self.together and len(self.models) > 1:
            cli.say(
                "the models do not fit in memory together: they are timed one after the other, so "
                "drift may affect some more than others"
            )
        self.done: dict[str, list[rounds.Measurement]] = {}
        self.stopped = False

    def go(self) -> None:
        """All trials. Ctrl-C ends them after the one under way; a second one at once."""
        total = self.s.num_trials * len(self.models)
        trials = rounds.rounds(
            models=self.models,
            together=self.together,
            count=self.s.num_trials,
            r=self.r,
            seed=self.s.seed,
            delay=self.s.delay,
            peaks=True,
        )
        with cli.stop_asked() as asked, progress.bar("trials", total) as show:
            for number, (name, trial) in enumerate(trials, 1):
                self.done.setdefault(name, []).append(trial)
                show(number, f"{name}: {1 / trial.tpot_s:.1f} tokens/s")
                if asked and number < total:
                    self.stopped = True
                    cli.say(f"stopped by hand: {number} of {total} trials are kept")
                    break

    def fixed(self) -> dict[str, Any]:
        """The part of the result that the same command with the same seed gives again: sizes,
        texts, tokens.
        """
        models = dict[str, dict[str, Any]]()
        for name, model in self.models.items():
            dtype = precision.name_of(precision.dtype_of(model))
            texts = [(trial.asked, trial.tokens) for trial in self.done.get(name, ())]
            models[name] = {
                "params": arch.params(model.config),
                "weight_bytes": model.nbytes,
                "format": rounds.format_name(model, dtype),
                "m1_best_tps_computed": rounds.m1_tokens_per_s(model, self.r),
                "trials": len(texts),
                "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            }
        return {
            "prompt_tokens": self.s.prompt_tokens,
            "generation_tokens": self.s.generation_tokens,
            "num_trials": self.s.num_trials,
            "seed": self.s.seed,
            "models": models,
        }

    def measured(self) -> dict[str, dict[str, Any]]:
        """{model: {metric: summary}} of everything timed."""
        return {
            name: {"load_s": trials[0].load_s, **rounds.figures(trials, self.r)}
            for name, trials in self.done.items()
        }


def _unfit(reading: Reading) -> str | None:
    """Why times taken now are not the model's own; None where they are."""
    reason = governor.unfit_for_timing(reading)
    if reason:
        return reason
    load, _, _ = psutil.getloadavg()
    if load > (os.cpu_count() or 1):
        return f"the load average is {load:.1f}, more than the number of cores"
    return None


def run(settings: Settings) -> dict[str, Any]:
    """The command. A machine that is hot at the start or the end, or slows down, is reported, in
    the JSON, too.
    """
    bench = Bench(settings)
    with Monitor() as monitor:
        unfit = {"before": _unfit(monitor.reading())}
        bench.go()
        unfit["after"] = _unfit(monitor.reading())
    hot = [f"{when}: {why}" for when, why in unfit.items() if why]
    for name, trials in bench.done.items():
        slowed = rounds.slowdown_note(name, trials)
        if slowed:
            hot.append(slowed)
    fixed = bench.fixed()
    measured = bench.measured()
    rows = rounds.rows(fixed["models"], measured)
    print(text.aligned(text.table(rows, list(measured), text.TABLES["bench"])))
    for flag in hot:
        cli.say(
            f"other causes affected these times ({flag}): let the machine cool, close other "
            f"programs, use --delay 30"
        )
    result = {**fixed, "machine": rates.about(), "hot": hot, "stopped": bench.stopped}
    return {**result, "measured": {"models": measured}}


if __name__ == "__main__":
    cli.main(Settings, run)
