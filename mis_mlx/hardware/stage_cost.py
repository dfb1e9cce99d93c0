"""What a stage of work takes: bytes, memory, operations; and how long that takes on a machine."""

from dataclasses import dataclass, replace

from mis_mlx.hardware import rates
from mis_mlx.maths import optimizer

# fields that add up over stages
WORK = (
    "read_bytes",
    "written_bytes",
    "flops",
    "touched_bytes",
    "updated",
    "waits",
    "host_flops",
)


@dataclass(frozen=True)
class StageCost:
    """One stage: bytes, memory, operations.

    peak_bytes: of arrays, without the process, as of a `Ledger`. `pinned` blocks stay in memory
    between passes; `spooled_bytes` of hidden states lie on disk. later: stages behind the first one
    (`then`), whose work is a part of what is counted here.
    """

    name: str
    read_bytes: int = 0
    written_bytes: int = 0
    peak_bytes: int = 0
    flops: float = 0.0
    # weights fetched from memory; counts where there is little to do with each
    touched_bytes: int = 0
    pinned: int = 0
    kept: int = 0  # blocks of a packed student whose integers stay in memory
    # of scales that learn and their moments, in files meanwhile; 0: they are in memory
    state_bytes: int = 0
    held_gradients: int = 0  # blocks whose gradients are in memory all the same
    spooled_bytes: int = 0
    held_tokens: int = 0  # whose hidden states stay in memory
    updated: int = 0  # parameters that the optimizer changes, in all steps together
    waits: int = 0  # how often the host waits for the device
    host_flops: float = 0.0  # of numpy's solvers, which a GPU waits for
    later: tuple["StageCost", ...] = ()

    @property
    def operations(self) -> float:
        """Float operations of device and host together."""
        return self.flops + self.host_flops

    def then(self, other: "StageCost") -> "StageCost":
        """This stage, then `other`: the work adds up, and the larger peak counts.

        Name, pinned blocks and places of hidden states are those of this stage.
        """
        work = {}
        for name in WORK:
            work[name] = getattr(self, name) + getattr(other, name)
        peak_bytes = max(self.peak_bytes, other.peak_bytes)
        return replace(self, **work, peak_bytes=peak_bytes, later=(*self.later, other))

    def repeated(self, times: int) -> "StageCost":
        """This stage `times` times in a row, in the memory of one."""
        work = {}
        for name in WORK:
            work[name] = times * getattr(self, name)
        later = tuple(stage.repeated(times) for stage in self.later)
        return replace(self, **work, later=later)

    @property
    def first(self) -> "StageCost":
        """The work of the first stage alone: what is counted, less that of the later ones."""
        work = {}
        for name in WORK:
            work[name] = getattr(self, name)
            for stage in self.later:
                work[name] -= getattr(stage, name)
        return replace(self, **work, later=())

    def seconds(self, machine: rates.Rates, hot: bool = False) -> float:
        """The time on a machine of these rates: of disk, arithmetic and memory the slowest.

        The three overlap within a stage; stages in a row do not. The optimizer's updates come on
        top of the arithmetic, which ends before one begins. So do, on a GPU, waits and
        what numpy computes meanwhile. hot: computing at the rates of a hot machine.
        """
        if self.later:
            stages = (self.first, *self.later)
            return sum(stage.seconds(machine, hot) for stage in stages)
        disk = self.read_bytes / machine.read_bytes_per_s
        disk += self.written_bytes / machine.write_bytes_per_s
        slowdown = machine.hot if hot else 1.0
        flops_per_s = machine.training_flops_per_s if self.updated else machine.forward_flops_per_s
        if machine.gpu:  # a CPU's training rate has the updates in it (rates.ELEMENTWISE)
            work = self.flops / (flops_per_s * slowdown)
            work += optimizer.TRAFFIC_BYTES * self.updated / machine.memory_bytes_per_s
            host = self.host_flops / (machine.host_flops_per_s * slowdown)
            work += self.waits * machine.wait_s + host
        else:
            work = self.operations / (flops_per_s * slowdown)
        return max(disk, work, self.touched_bytes / machine.memory_bytes_per_s)
