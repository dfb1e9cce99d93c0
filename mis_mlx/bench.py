"""Time one or more models on this machine: first token, decode, memory, energy, beside what the
hardware allows.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro

from mis_mlx import cli
from mis_mlx.evaluation.speed import rounds
from mis_mlx.hardware import memory, rates
from mis_mlx.hardware.thermal import governor, run_monitor, thermal_monitor
from mis_mlx.models import arch, load, policy, resolve
from mis_mlx.reporting import progress, text
from mis_mlx.types import MOST, MisError, Reading, Row, Seconds, Seed, Within

IDLE_S = 5.0  # of rest, whose power is taken off


@dataclass(frozen=True)
class Settings(cli.Budgeted, policy.Computing, run_monitor.ThermalFlags):
    """The same texts and lengths for every model, in turn (A B A B), so that drift hits all
    alike.
    """

    model: tuple[str, ...] = ()
    """folders or hub ids, `--model A B`; default: SmolLM2-135M-Instruct"""
    prompt_tokens: Annotated[int, Within(1, MOST), tyro.conf.arg(aliases=["-p"])] = 512
    """tokens in the prompt; every trial has a text of its own"""
    generation_tokens: Annotated[int, Within(2, MOST), tyro.conf.arg(aliases=["-g"])] = 128
    """tokens generated, 2 or more"""
    num_trials: Annotated[int, Within(1, MOST), tyro.conf.arg(aliases=["-n"])] = 5
    """trials, after a warm-up (the whole prompt, 4 tokens) that does not count"""
    delay: Seconds = 0.0
    """seconds of rest before each trial; 30 or more for a laptop without a fan"""
    seed: Seed = 0
    """chooses the texts"""


def measure(
    folders: Mapping[str, Path], prompt_tokens: int, tokens: int, count: int, limit_bytes: int = 0
) -> list[Row]:
    """Rows `ttft_ms` and `decode_tps` of each model, medians of `count` trials; in turn if all fit
    in `limit_bytes`.
    """
    r = rounds.Request(prompt_tokens, max(tokens, 2))
    trials = dict[str, list[rounds.Measurement]]()
    together = (
        sum(rounds.need_bytes(load.open_checkpoint(f), r) for f in folders.values()) <= limit_bytes
    )
    for name, done in cli.counted(
        "trial", rounds.rounds(folders, together, count, r), count * len(folders)
    ):
        trials.setdefault(name, []).append(done)
    figures = {name: rounds.figures(every, r) for name, every in trials.items()}
    wanted = "ttft_ms", "decode_tps"
    return [
        Row(name, metric, of[metric]["median"], n=count)
        for name, of in figures.items()
        for metric in wanted
    ]


class Bench:
    """One run: the models by name, and the trials that are finished."""

    def __init__(self, s: Settings):
        cli.check_ranges(s)
        self.s, self.r = s, rounds.Request(s.prompt_tokens, s.generation_tokens)
        folders = [resolve.resolve_model(m).path for m in s.model or [None]]
        if len(set(folders)) < len(folders):
            raise MisError(
                f"{len(folders)} models given, {len(set(folders))} different ones: give each once"
            )
        self.models = dict(
            zip(resolve.labels(folders), map(load.open_checkpoint, folders), strict=True)
        )
        limit = memory.budget(s.budget_bytes)
        needs = {name: rounds.need_bytes(m, self.r) for name, m in self.models.items()}
        for name, nbytes in needs.items():
            limit.need(
                nbytes,
                f"timing {name}",
                "give a larger --budget, a smaller -p, or a model of fewer bits",
            )
        self.together = sum(needs.values()) <= limit.limit_bytes
        if not self.together and len(self.models) > 1:
            cli.say(
                "the models do not fit in memory together: one after the other, so drift does not "
                "hit all alike"
            )
        self.done: dict[str, list[rounds.Measurement]] = {}
        self.stopped = False

    def go(self, monitor: thermal_monitor.Monitor | None) -> None:
        """All trials. Ctrl-C ends them; those that are finished stay."""
        s, total = self.s, self.s.num_trials * len(self.models)
        folders = {name: m.path for name, m in self.models.items()}
        every = rounds.rounds(
            folders, self.together, s.num_trials, self.r, s.seed, s.delay, monitor, peaks=True
        )
        try:
            with progress.bar("trials", total) as show:
                for at, (name, done) in enumerate(every, 1):
                    self.done.setdefault(name, []).append(done)
                    show(at, f"{name}: {1 / done.tpot_s:.1f} tokens/s")
        except KeyboardInterrupt:
            if not self.done:
                raise
            self.stopped = True
            cli.say(
                f"stopped by hand: {sum(map(len, self.done.values()))} of {total} trials are kept"
            )

    def fixed(self) -> dict[str, Any]:
        """What the same command with the same seed gives again: sizes, texts, tokens."""
        flags = ("prompt_tokens", "generation_tokens", "num_trials", "seed")
        models = dict[str, dict[str, Any]]()
        for name, m in self.models.items():
            texts = [(t.asked, t.tokens) for t in self.done.get(name, ())]
            models[name] = {
                "params": arch.params(m.config),
                "weight_bytes": m.nbytes,
                "format": rounds.kind(m, str(policy.compute_dtype(m)).removeprefix("mlx.core.")),
                "m1_best_tps_computed": rounds.m1_tokens_per_s(m, self.r),
                "trials": len(texts),
                "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            }
        return {**{name: getattr(self.s, name) for name in flags}, "models": models}

    def measured(self, at: rates.Roof, idle_w: float | None) -> dict[str, dict[str, Any]]:
        """{model: {metric: summary}} of what was timed, and beside it the roof: `*_best_*`,
        `reached`, `moved_mb`.
        """
        figures: dict[str, dict[str, Any]] = {}
        for name, done in self.done.items():
            values = rounds.figures(done, self.r, idle_w)
            read_bytes = done[0].read_bytes
            beside = rounds.beside(
                self.models[name], read_bytes, self.r, at, values["decode_tps"]["median"]
            )
            figures[name] = {"load_s": done[0].load_s, **values, **beside}
        return figures


def _unfit(reading: Reading) -> str | None:
    """Why times taken now are not the model's own; None where they are."""
    load = psutil.getloadavg()[0]
    busy = (
        f"load average {load:.1f}, more than there are cores"
        if load > (os.cpu_count() or 1)
        else None
    )
    return governor.unfit_for_timing(reading) or busy


def run(settings: Settings) -> dict[str, Any]:
    """The command. A machine that is hot at the start or the end, or slows down, is said to be, in
    the JSON too.
    """
    policy.use(settings.compute_dtype)
    bench = Bench(settings)
    with run_monitor.ThermalMonitor(settings) as weather:
        at = rates.measure_roof()
        first = weather.latest()
        idle_w = None  # what this machine takes at rest, where something measures power
        if first.power_w is not None:
            time.sleep(IDLE_S)
            idle_w = rounds.mean_watts(weather, IDLE_S)
        unfit = {"before": _unfit(first)}
        bench.go(weather if idle_w is not None else None)
        unfit["after"] = _unfit(weather.latest())
    hot = [f"{when}: {why}" for when, why in unfit.items() if why]
    hot += [why for name, done in bench.done.items() if (why := rounds.slowed(name, done))]
    fixed = bench.fixed()
    measured = bench.measured(at, idle_w)
    print(text.table(rounds.rows(fixed["models"], measured), list(measured), text.TABLES["bench"]))
    for flag in hot:
        cli.say(
            f"these times measure more than the model ({flag}): let it cool, close other programs, "
            f"use --delay 30"
        )
    result = {**fixed, "machine": rates.about(), "hot": hot, "stopped": bench.stopped}
    return {**result, "measured": {"models": measured, "roof": asdict(at)}}


if __name__ == "__main__":
    cli.main(Settings, run)
