"""The few frozen dataclasses that everything passes along. No MLX, files or models here.

Axis letters used in every docstring:
    B sequences in a batch      T tokens in a sequence     V vocabulary
    D hidden size               F FFN neurons              H query heads     K kv heads
    L layers (blocks)           N windows of held-out text
Units are in the names: `_bytes`, `_s` (seconds), `_c` (degrees Celsius), `_m` (metres above sea
level).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

GIB = 2**30
T = TypeVar("T")


class MisError(Exception):
    """Something the user can fix: one sentence with the cause, both numbers, place and remedy."""


@dataclass(frozen=True)
class Within:
    """In a flag's annotation: the numbers that it takes. above: `least` itself is too little."""

    least: float
    most: float
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether the flag takes it; NaN never."""
        if self.above and value == self.least:
            return False
        return self.least <= value <= self.most

    def remedy(self, value: float) -> str:
        """What to give in place of `value`.

        An upper bound that only huge numbers exceed is left out for all others.
        """
        low = _readable(self.least)
        high = _readable(self.most)
        if self.most >= MOST and not value > self.most:
            return f"give more than {low}" if self.above else f"give {low} or more"
        if self.above:
            return f"give a number above {low}, up to {high}"
        return f"give a number from {low} to {high}"


@dataclass(frozen=True)
class Shown:
    """In the annotation of a flag that takes old spellings, too: the words that --help shows."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Also:
    """In the annotation of a setting: names that it takes, too, which no help shows: mlx-lm's."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Off:
    """In the annotation of a switch that is on: what --no-NAME does, for the help."""

    words: str


def _readable(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


MOST = 10**7
# In the annotation of a setting.
FILE_ONLY = "a YAML file and Python may give it, but it is not a flag"
Count = Annotated[int, Within(1, MOST)]
Whole = Annotated[int, Within(0, MOST)]
Tokens = Annotated[int, Within(2, 2**20)]  # in a window: one predicts the next
Seed = Annotated[int, Within(0, 2**32 - 1)]
Bits = Annotated[float, Within(2.2, 9.0)]  # of a weight, scales included
Rate = Annotated[float, Within(0.0, 1.0, above=True)]
Share = Annotated[float, Within(0.0, 1.0)]
Positive = Annotated[float, Within(0.0, 1e7, above=True)]
Seconds = Annotated[float, Within(0.0, 1e7)]
Celsius = Annotated[float, Within(-90.0, 60.0)]
Metres = Annotated[float, Within(-500.0, 9000.0)]


def gib(nbytes: float) -> str:
    """`nbytes` for people: '5.00 GiB', '612 MiB', '3 KiB'."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 0), ("KiB", 2**10, 0)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """For people: '12.3 s', '5.0 min', '2.1 h'."""
    for limit, size, unit in ((100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 3600:,.1f} h"


def evenly(items: Sequence[T], count: int) -> Sequence[T]:
    """`count` of the items at most, the first among them, evenly apart."""
    step = max(1, len(items) // count)
    return items[::step][:count]


def grouped(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """The items in groups with a total size of at most `most`; a larger item is alone."""
    group = list[T]()
    taken = 0
    for item in items:
        if group and taken + size(item) > most:
            yield group
            group = []
            taken = 0
        group.append(item)
        taken += size(item)
    if group:
        yield group


@dataclass(frozen=True)
class TensorAt:
    """Where one tensor lies on disk. `offset` counts from the start of the file, in bytes."""

    file: Path
    dtype: str  # as safetensors spells it: "F32", "BF16", "U32" ...
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    # The name and tensor in the file, if this is some of its rows or has another name.
    stored: "tuple[str, TensorAt] | None" = None


@dataclass(frozen=True)
class Precision:
    """What a model computes in, in --compute-dtype's words; None: nobody has said.

    asked: what the command was asked for, which holds for all of its models. dtype: what this
    model's activations allow (models/opening/compute_type decides it).
    """

    asked: str | None = None
    dtype: str | None = None


UNDECIDED = Precision()


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that passed the gate: its config and where its tensors are. No weights."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorAt]
    precision: Precision = UNDECIDED

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class Budget:
    """The memory the user allows this process to take. why: what decided it, in a few words."""

    limit_bytes: int
    why: str = field(default="", compare=False)

    def need(self, nbytes: int, what: str, remedy: str) -> None:
        """Refuse before work starts when `what` needs more than the budget."""
        if nbytes > self.limit_bytes:
            raise MisError(
                f"{what} needs {gib(nbytes)}, but the budget is {gib(self.limit_bytes)}: {remedy}"
            )


@dataclass(frozen=True)
class Reading:
    """One look at the thermometers. None: not measured. sources: the origin of each value."""

    time_s: float
    die_c: float | None = None
    battery_c: float | None = None
    ambient_c: float | None = None
    ambient_sigma_c: float | None = None
    # Thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping.
    pressure_level: int | None = None
    power_w: float | None = None
    battery_percent: float | None = None
    plugged: bool | None = None
    altitude_m: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Air:
    """T_env of eq. (1) in °C ± one standard deviation, where that is from, and the altitude.

    All that is told of the weather outside `hardware/thermal`. celsius, altitude_m: None: unknown.
    spread_c: standard deviation over the last hour; 0 where it was not measured.
    """

    celsius: float | None = None
    sigma_c: float | None = None
    source: str = "none"
    altitude_m: float | None = None
    altitude_source: str = "none"
    spread_c: float = 0.0


@dataclass(frozen=True)
class KeptUnits:
    """The units that a pruning keeps, and why; saved beside the model as `keep.json`.

    layers: teacher layers, in order. kept[(layer, space)]: sorted indices in that teacher layer;
    kept[(-1, "hidden")]: channels of the residual stream, the same in all layers. basis (D, d): if
    the stream was rotated before the cut, from the teacher's to the student's channels, saved as
    `rotation.npy`.
    """

    layers: tuple[int, ...]
    kept: Mapping[tuple[int, str], tuple[int, ...]]
    why: str
    report: Mapping[str, Any] = field(default_factory=dict)
    basis: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Step:
    """One optimizer step, as the loop yields it.

    loss: in nats per token, before eq. (2)'s factor; in alignment per token, pair or answer. more:
    further means of an alignment's loss.
    """

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    peak_bytes: int
    note: str = ""
    reading: Reading | None = None
    further: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One cell of a table: a value, its 95 % interval [low, high], its n windows or questions."""

    model: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Options:
    """Settings that know which of them were said: by a flag, in a YAML file, or as a keyword.

    A value that equals the default can be said, too. What was not said has its default.
    """

    _said: ClassVar = frozenset[str]()

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Remember the names of the arguments; the dataclass sets the values."""
        made = super().__new__(cls)
        by_place = [setting.name for setting in fields(cls) if not setting.kw_only]
        said = frozenset(named).union(by_place[: len(values)])
        object.__setattr__(made, "_said", said)  # frozen, but still being made
        return made

    @property
    def given(self) -> dict[str, Any]:
        """What was said, by name. None says nothing where it is the default."""
        values = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            says_nothing = value is None and setting.default is None
            if setting.name in self._said and not says_nothing:
                values[setting.name] = value
        return values

    def with_values(self, **values: Any) -> Self:
        """The same but for `values`, which are said with this; `dataclasses.replace` says all."""
        return type(self)(**{**self.given, **values})
