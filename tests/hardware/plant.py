"""A simulated fanless laptop: two lumps (die, chassis), firmware that lowers the clock, a virtual clock.

The parameters are engineering priors for an M1 Air, not measurements. `python -m tests.hardware.plant FILE`
writes the recording tests/data/halny.jsonl: the warm wind falls on the Air, 8 to 33 °C in 150 s.
"""

from __future__ import annotations

import random
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.hardware.thermal.recording import Header, Raw, recorder
from mis_mlx.types import Reading

TICK_S = 0.1
LOOK_S = 10.0  # of the recording; the next three count looks
WARMING, SPELL, HARD = 16, 11, 6


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
            self.power_w = self.static_w + busy * (self.gpu_w - self.static_w) * self.clock_share * volts**2
            flow_w = (self.die_c - self.chassis_c) / self.die_to_chassis
            self.die_c += TICK_S * (self.power_w - flow_w) / self.die_capacity
            out_w = (self.chassis_c - self.air_c) / self.chassis_to_air
            self.chassis_c += TICK_S * (flow_w + self.rest_w - out_w) / self.chassis_capacity
            room = self.firmware_c - self.die_c
            change = 0.004 * room if room < 0 else 0.0015 * min(room, 5.0)
            self.clock_share = min(1.0, max(0.35, self.clock_share + TICK_S * change))


class PlantMonitor:
    """What `tea.after_step` wants of a monitor: reading it costs nothing, sleeping lets the plant cool.

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


def halny() -> list[Raw]:
    """A look every 10 s for 18 minutes. Calm first: 16 looks while the air warms from 8 to 33 °C; then six
    spells of hard work that a governor has to answer with a pause; then light work to the end."""
    plant = Plant(air_c=8.0, firmware_c=103.0, gpu_w=14.0)
    plant.die_c, plant.chassis_c, battery_c = 20.0, 16.0, 14.0
    looks = []
    for number in range(WARMING + 6 * SPELL + 26):
        working = WARMING <= number < WARMING + 6 * SPELL
        hard = working and (number - WARMING) % SPELL < HARD
        plant.air_c = 8.0 + 25.0 * min(number / (WARMING - 1), 1.0)
        if number == WARMING:
            plant.chassis_c = 40.0  # the slow warming of half an hour is cut out
        plant.run(LOOK_S, busy=1.0 if hard else 0.2)
        battery_c += LOOK_S / 1500 * (plant.air_c - battery_c + 0.7 * (plant.power_w + plant.rest_w))
        die_c = round(plant.die_c, 2)
        looks.append(
            Raw(
                mono_s=LOOK_S * number,
                wall_s=1_770_000_000 + LOOK_S * number,
                hid=(
                    ("pACC MTR Temp Sensor2", die_c),
                    ("eACC MTR Temp Sensor0", round(die_c - 4.0, 2)),
                    ("GPU MTR Temp Sensor1", round(die_c - 1.5, 2)),
                    ("PMU tcal", 51.85),
                    ("gas gauge battery", round(battery_c, 1)),
                ),
                smc={
                    "TCMz": smc_float(round(die_c + 0.3, 2)),
                    "TVA0": smc_float(round(plant.air_c - 1.0, 3)),
                    "TB0T": smc_float(round(battery_c, 1)),
                    "PSTR": smc_float(round(plant.power_w + plant.rest_w, 2)),
                },
                pressure=0,
                battery_percent=100.0,
                plugged=True,
            )
        )
    return looks


HALNY_HEADER = Header(model="simulated MacBookAir10,1", chip="Apple M1", altitude_m=832.0)


def write_halny(path: Path) -> None:
    """The recording, line for line as it lies in tests/data."""
    with recorder(path, HALNY_HEADER) as add:
        for look in halny():
            add(look)


if __name__ == "__main__":
    write_halny(Path(sys.argv[1]))
