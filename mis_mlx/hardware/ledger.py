"""What a stage of work holds, written down beside the code that allocates it, and added up here.

All bytes are of arrays, without the process around them, which `needed_bytes` adds where a peak is
compared with a budget, and nowhere else.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mis_mlx.hardware.memory import process_bytes


@dataclass(frozen=True)
class Holding:
    """So many bytes `count` times: of a block that stays, of a window under way, of all of it."""

    name: str
    nbytes: int
    count: int = 1


class Ledger:
    """What is alive together.

    `hold` is for what is there from beginning to end, `moment` for a while, `fill` for what is
    welcome where there is room. Moments come one after the other: the largest of them counts.

    limit_bytes: the budget that `fill` fills. gpu: whose process takes its part of that; default:
    this one's.
    """

    def __init__(self, limit_bytes: int = 0, gpu: bool | None = None):
        self.limit_bytes = limit_bytes
        self.gpu = gpu
        self.holdings: list[Holding] = []
        self.moments: dict[str, tuple[Holding, ...]] = {}
        self.filled: dict[str, int] = {}

    def hold(self, name: str, nbytes: int, count: int = 1) -> None:
        """Something that is there all the time."""
        self.holdings.append(Holding(name, nbytes, count))

    def moment(self, name: str, **held: int) -> None:
        """What is there besides during a part of the work, in bytes by name.

        A moment that was there under this name is replaced.
        """
        self.moments[name] = tuple(Holding(part, nbytes) for part, nbytes in held.items())

    def fill(self, name: str, nbytes: int, most: int) -> int:
        """Hold as many of so many bytes as the budget has room for, `most` at the most.

        Returned is their number, which is in `filled`, too.
        """
        count = min(most, self.room_bytes // nbytes)
        self.filled[name] = count
        self.hold(name, nbytes, count)
        return count

    @property
    def room_bytes(self) -> int:
        """What the budget leaves beside the peak."""
        return headroom_bytes(self.limit_bytes, self.peak_bytes, self.gpu)

    @property
    def held_bytes(self) -> int:
        """What is there all the time."""
        return _total(self.holdings)

    @property
    def peak_bytes(self) -> int:
        """The most that is held at a time."""
        moments = [_total(held) for held in self.moments.values()]
        return self.held_bytes + max(moments, default=0)


def needed_bytes(limit_bytes: int, taken_bytes: int, gpu: bool | None = None) -> int:
    """What so many bytes of arrays need of a budget, with the process around them.

    gpu: whose process takes `memory.process_bytes`; default: this one's.
    """
    return taken_bytes + process_bytes(limit_bytes, gpu)


def headroom_bytes(limit_bytes: int, taken_bytes: int, gpu: bool | None = None) -> int:
    """What a budget leaves for things that are welcome but not needed; as of `needed_bytes`."""
    return max(0, limit_bytes - needed_bytes(limit_bytes, taken_bytes, gpu))


def _total(holdings: Iterable[Holding]) -> int:
    return sum(holding.nbytes * holding.count for holding in holdings)
