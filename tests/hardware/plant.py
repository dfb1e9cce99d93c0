"""A simulated fanless laptop: two lumps (die, chassis), firmware that lowers the clock, a virtual
clock.

The parameters are engineering priors for an M1 Air, not measurements. The recording
tests/data/halny.jsonl was made with it: the warm wind falls on the Air, 8 to 33 °C in 150 s, then
six spells of hard work.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from mis_mlx.types import Reading
from tests.hardware.recorded import VirtualClock

TICK_S = 0.1


@dataclass
class Plant:
    """Temperatures in °C, resistances in K/W, capacities in J/K, powers in W."""

    air_c: float = 24.0
    die_to_chassis: float = 5.5
    chassis_to_air: float = 1.5
    die_capacity: float = 2.0
    chassis_capacity: float = 900.0
    gpu_w: float = 13.0
    static_w: float = 1.2
    rest_w: float = 3.0  # display, memory, disk
    firmware_c: float = 100.0  # the firmware lowers the clock above this
    die_c: float = field(init=False)
    chassis_c: float = field(init=False)
    clock_share: float = field(init=False, default=1.0)
    power_w: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.die_c = self.chassis_c = self.air_c

    def run(self, seconds: float, busy: float) -> None:
        """`seconds` of time with the GPU busy (1) or not (0)."""
        for _ in range(round(seconds / TICK_S)):
            volts = 0.70 + 0.30 * self.clock_share
            self.power_w = (
                self.static_w + busy * (self.gpu_w - self.static_w) * self.clock_share * volts**2
            )
            flow_w = (self.die_c - self.chassis_c) / self.die_to_chassis
            self.die_c += TICK_S * (self.power_w - flow_w) / self.die_capacity
            out_w = (self.chassis_c - self.air_c) / self.chassis_to_air
            self.chassis_c += TICK_S * (flow_w + self.rest_w - out_w) / self.chassis_capacity
            room = self.firmware_c - self.die_c
            change = 0.004 * room if room < 0 else 0.0015 * min(room, 5.0)
            self.clock_share = min(1.0, max(0.35, self.clock_share + TICK_S * change))


class PlantMonitor:
    """What `tea.after_step` wants of a monitor: reading it costs nothing, sleeping lets the plant
    cool.

    `spoil(now, reading)` may return a spoilt reading, as a broken sensor would.
    """

    def __init__(self, plant: Plant, seed: int = 0, spoil=lambda now_s, reading: reading):
        self.plant = plant
        self.clock = PlantClock(plant)
        self.noise = random.Random(seed)
        self.spoil = spoil
        self.past: list[tuple[float, float]] = []  # (seconds, true die °C) at each reading

    def reading(self) -> Reading:
        now_s = self.clock.monotonic()
        self.past.append((now_s, self.plant.die_c))
        seen = Reading(now_s, die_c=self.plant.die_c + self.noise.gauss(0, 0.3), pressure_level=0)
        return self.spoil(now_s, seen)

    def hottest(self, since_s: float = 0.0) -> float:
        """The highest true die temperature since then."""
        return max(die_c for now_s, die_c in self.past if now_s >= since_s)

    def work(self, seconds: float) -> None:
        """One optimizer step."""
        self.plant.run(seconds, busy=1.0)
        self.clock.pass_by(seconds)


class LidClock(VirtualClock):
    """A virtual clock of a machine whose lid can be closed."""

    def __init__(self) -> None:
        super().__init__()
        self._asleep = 0.0

    def suspend(self, seconds: float) -> None:
        """Close the lid for `seconds`: the wall clock goes on, `monotonic` does not."""
        self._asleep += seconds
        self.wall_s += seconds

    def uptime(self) -> float:
        return 1e6 + self._awake + self._asleep  # booted long ago

    def asleep(self) -> float:
        return self._asleep


class PlantClock(VirtualClock):
    """A sleep on this clock is idle time of the plant."""

    def __init__(self, plant: Plant):
        super().__init__()
        self._plant = plant

    def sleep(self, seconds: float) -> None:
        self._plant.run(seconds, busy=0.0)
        super().sleep(seconds)

    def pass_by(self, seconds: float) -> None:
        super().sleep(seconds)


def smc_float(value: float) -> str:
    """A `flt ` key as a recording holds it."""
    return "flt :" + struct.pack("<f", value).hex()
