"""A training with checkpoints: the newest one put back on every machine, then steps to the end, the next ones saved.

Does not know what is trained. The protocol on disk is storage/checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.run_loop import OpenRun, run_training
from mis_mlx.hardware.thermal.governor import PauseCounter
from mis_mlx.maths.optimizer import Diverged, GuardedAdamW
from mis_mlx.models import distributed
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import reported
from mis_mlx.types import Step

Arrays = dict[str, dict[str, mx.array]]


@dataclass(frozen=True)
class CheckpointedTraining:
    """arrays(): weights and moments, by checkpoint file and name. memory(): what else the optimizer needs, as JSON.
    restore(arrays, memory) puts both back. remember(number): what a checkpoint keeps beside them, asked for on every
    machine; recall(state) gets that again."""

    run: OpenRun
    arrays: Callable[[], Arrays]
    memory: Callable[[], dict[str, Any]]
    restore: Callable[[Arrays, dict[str, Any]], None]
    remember: Callable[[int], dict[str, Any]]
    recall: Callable[[dict[str, Any]], None]
    steps: str = "steps"  # the folder of its checkpoints

    def start(self, begin: Callable[[], object]) -> int:
        """Steps done: of the newest checkpoint, put back; or 0, after `begin` on the first machine, and that saved."""
        if (number := self.back()) is not None:
            return number
        if distributed.is_main():
            begin()
            with reported(self.run.folder, "the folder of checkpoints"):
                self.run.files.make_folder(self.run.folder / self.steps)
        train_loop.alike(self.arrays, self.memory, self.restore)
        self.save(0)
        return 0

    def back(self) -> int | None:
        """Put the newest checkpoint back on every machine: its number; None when there is none."""
        saved = protocol.newest(self.run.folder / self.steps, self.run.files)
        if saved:
            for note in [*saved.notes, f"continuing from step {saved.number}"]:
                cli.say(note)
            arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
            self.restore({"optimizer": {}, **arrays}, saved.state["optimizer"])
            self.run.weather.breaks = PauseCounter(**saved.state["tea"])
        newest: Any = distributed.broadcast_json(lambda: [saved.number, saved.state] if saved else None)
        if newest is None:
            return None
        train_loop.alike(self.arrays, self.memory, self.restore)
        self.recall(newest[1])
        return newest[0]

    def save(self, number: int) -> None:
        """One checkpoint: all that a resumed run needs."""
        more = self.remember(number)
        if distributed.is_main():
            arrays = {key: named for key, named in self.arrays().items() if named}
            state = {"arrays": list(arrays), "optimizer": self.memory(), "tea": self.run.weather.breaks.saved(), **more}
            protocol.save_step(self.run.folder / self.steps, number, arrays, state, self.run.files)

    def finish(
        self,
        steps: Callable[[int], Iterator[Step]],
        start: int,
        iters: int,
        save_every: int,
        optimizer: Callable[[], GuardedAdamW],
        **shown: Any,
    ) -> None:
        """Run steps(start) to their end, `shown` as of `run_training`. optimizer(): the one in use. Three bad batches
        in a row go back to the last checkpoint, once. On the second way these batches are left out and the learning
        rate is half of what it was; what is bad then raises `Diverged`. A run killed before the second way has a
        checkpoint takes both ways again, with the same bits."""
        try:
            run_training(self.run, steps(start), iters, save_every, self.save, **shown)
        except Diverged as error:
            number = None if optimizer().calm < 1 else self.back()
            if number is None:
                raise
            optimizer().pass_over(error.batches)
            cli.say(
                f"batches {', '.join(map(str, error.batches))} gave no numbers: back to step {number}, and on without "
                "them, at half the learning rate"
            )
            run_training(self.run, steps(number), iters, save_every, self.save, **shown)
