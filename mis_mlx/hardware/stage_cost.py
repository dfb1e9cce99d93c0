"""What a stage of work takes: bytes, memory, operations; and how long that takes on a machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mis_mlx.hardware import rates
from mis_mlx.maths import optimizer

# what may stay
WINDOWS = "hidden states of windows"
INTEGERS = "integers of a packed student's blocks"
# fields that add up over stages
WORK = (
    "read_bytes",
    "written_bytes",
    "flops",
    "touched_bytes",
    "updated",
    "host_flops",
    "numbers",
)


@dataclass(frozen=True)
class StageCost:
    """One stage: bytes, memory, operations.

    peak_bytes: of arrays, without the process. stays: of what stays in memory where there is room,
    how many. scratch_bytes: of files that are gone behind the stage, with what found no room.
    parts: stages in a row that this is the sum of (`in_turn`).
    """

    name: str
    read_bytes: int = 0
    written_bytes: int = 0
    peak_bytes: int = 0
    flops: float = 0.0
    # weights fetched from memory; counts where there is little to do with each
    touched_bytes: int = 0
    stays: Mapping[str, int] = field(default_factory=dict)
    scratch_bytes: int = 0
    updated: int = 0  # parameters that the optimizer changes, in all steps together
    host_flops: float = 0.0  # of numpy's solvers, which a GPU waits for
    numbers: float = 0.0  # float32 numbers that a CPU writes one by one, beside its products
    parts: tuple["StageCost", ...] = ()

    def beside(self, nbytes: int) -> "StageCost":
        """This stage while `nbytes` more are held."""
        return replace(self, peak_bytes=self.peak_bytes + nbytes)

    def repeated(self, times: int) -> "StageCost":
        """This stage `times` times in a row, in the memory of one."""
        work = {name: times * getattr(self, name) for name in WORK}
        return replace(self, **work, parts=tuple(part.repeated(times) for part in self.parts))

    def seconds(self, machine: rates.Rates, hot: bool = False) -> float:
        """The time on a machine of these rates: of disk, arithmetic and memory the slowest.

        The three overlap within a stage; stages in a row do not. The optimizer's updates come on
        top of the arithmetic, which ends before one begins. So does, on a GPU, what numpy
        computes meanwhile. hot: computing at the rates of a hot machine.
        """
        if self.parts:
            return sum(part.seconds(machine, hot) for part in self.parts)
        disk = self.read_bytes / machine.read_bytes_per_s
        disk += self.written_bytes / machine.write_bytes_per_s
        slowdown = machine.hot if hot else 1.0
        flops_per_s = machine.training_flops_per_s if self.updated else machine.forward_flops_per_s
        if machine.gpu:  # a CPU's training rate has the updates in it (rates.ELEMENTWISE)
            work = self.flops / (flops_per_s * slowdown)
            work += optimizer.TRAFFIC_BYTES * self.updated / machine.memory_bytes_per_s
            work += self.host_flops / (machine.host_flops_per_s * slowdown)
        else:
            work = (self.flops + self.host_flops) / (flops_per_s * slowdown)
            work += self.numbers / (machine.numbers_per_s * slowdown)
        return max(disk, work, self.touched_bytes / machine.memory_bytes_per_s)


def in_turn(name: str, *stages: StageCost) -> StageCost:
    """Stages one after the other: the work adds up, and the largest peak counts.

    What stays in memory or lies on disk is that of the first one.
    """
    work = {field: sum(getattr(stage, field) for stage in stages) for field in WORK}
    peak_bytes = max(stage.peak_bytes for stage in stages)
    return replace(stages[0], name=name, **work, peak_bytes=peak_bytes, parts=stages)
