"""The monitor: one thread looks at the thermometers once a second; anyone may ask for a reading.

Every value has a source; a value that cannot be read is `None` with a reason, never 0 and never
20 °C. Needs no root.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import psutil

from mis_mlx.hardware.clock import Clock
from mis_mlx.hardware.thermal.ambient import Ambient, Estimate, t_env_kind
from mis_mlx.hardware.thermal.apple_sensors import Apple
from mis_mlx.hardware.thermal.recording import Header, Raw, Rows
from mis_mlx.hardware.thermal.sensor_rules import Fact, Frozen, judge
from mis_mlx.types import MisError, Reading

PERIOD_S = 1.0
HISTORY_S = 3600.0
LONG_SLEEP_S = 5400.0  # after which everything in the case has the air's temperature
JUST_BOOTED_S = 600.0
# of TVA0: M1 and M2, later chips
VIRTUAL_SIGMA_C = 2.5
VIRTUAL_SIGMA_LATER_C = 4.0


NO_AIR = "no --temperature-c, no start after a long rest, no SMC TVA0"
NO_ALTITUDE = "no --altitude-m"


class Live:
    """This machine's thermometers: Apple's on a Mac, else psutil's; psutil for the battery."""

    sampled = True  # by a thread; a test's recording gives one look after the other

    def __init__(self, clock: Clock, apple_library: Path | None = None):
        self.clock = clock
        self.apple: Apple | None = None
        self.virtual = False  # a Mac that is a virtual machine has no thermometers at all
        self._missing: dict[str, str] = {}
        self.header = Header()
        try:
            self.apple = Apple(apple_library)
            names = ("hw.model", "machdep.cpu.brand_string", "kern.osversion")
            model, chip, build = (self.apple.system(name) for name in names)
            self.header = Header(model, chip, build)
            hypervisor = self.apple.system("kern.hv_vmm_present") == "\x01"
            self.virtual = hypervisor or (model or "").startswith("VirtualMac")
        except OSError as error:
            if sys.platform == "darwin":
                self._missing["Apple"] = str(error)
        self._asleep_s = clock.asleep()
        self._rested = clock.uptime() < JUST_BOOTED_S

    def look(self) -> Raw:
        """Ask every provider once. One that fails is missing in this look only."""
        rested = self._rested or self.clock.slept(self._asleep_s) >= LONG_SLEEP_S
        self._rested = False
        self._asleep_s = self.clock.asleep()
        mono_s = self.clock.monotonic()
        wall_s = self.clock.wall()
        if self.apple is not None:
            raw = self.apple.look(mono_s, wall_s)
        else:
            rows = temperatures()
            missing = dict(self._missing)
            if not rows and not missing:
                missing["Linux"] = "psutil shows no thermometer"
            raw = Raw(mono_s, wall_s, linux=rows, missing=missing)
        percent, plugged = battery_charge()
        return replace(raw, battery_percent=percent, plugged=plugged, rested=rested)

    def close(self) -> None:
        """Close what was opened."""
        if self.apple is not None:
            self.apple.close()


class Monitor:
    """Readings of this machine.

    In a `with` statement a daemon thread samples once a second. clock, apple_library: for tests.
    MisError for impossible values. Sample in the parent process only: Apple's libraries do not
    survive a fork.
    """

    def __init__(
        self,
        *,
        given_ambient_c: float | None = None,
        altitude_m: float | None = None,
        clock: Clock | None = None,
        apple_library: Path | None = None,
    ):
        if given_ambient_c is not None and not -60 <= given_ambient_c <= 60:
            raise MisError(
                f"ambient temperature {given_ambient_c} °C is not within −60 and 60: give it in °C"
            )
        self.source = Live(clock or Clock(), apple_library)
        # A Mac, and no virtual one: there a run without a die temperature is not safe.
        mac = sys.platform == "darwin" or self.source.apple is not None
        self.apple = mac and not self.source.virtual
        self.clock: Clock = self.source.clock
        self.reasons: Mapping[str, str] = {}  # field of Reading -> why it is None
        chip = self.source.header.chip or ""
        sigma_c = VIRTUAL_SIGMA_LATER_C
        if chip.startswith(("Apple M1", "Apple M2")):
            sigma_c = VIRTUAL_SIGMA_C
        self._ambient = Ambient(given_ambient_c, sigma_c)
        self._altitude_m = altitude_m
        self._frozen = Frozen()
        self._history: deque[Reading] = deque()
        self._looking = threading.Lock()  # one look at a time
        self._lock = threading.Lock()  # never held during a look, which may hang
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.source.sampled:
            self.look()
            self._thread = threading.Thread(target=self._sample, name="thermometers", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._thread is None or not self._thread.is_alive():
            self.source.close()  # a thread that hangs in a system call still needs the source

    def _sample(self) -> None:
        """Look once a second until the monitor is closed."""
        while not self._done.wait(PERIOD_S):
            self.look()

    def reading(self) -> Reading:
        """The latest reading."""
        last = self.last() if self._thread else None
        return last or self.look()

    def history(self) -> list[Reading]:
        """Readings of the last hour, oldest first."""
        with self._lock:
            return list(self._history)

    def last(self) -> Reading | None:
        """The reading that was given last, without asking for a new one."""
        with self._lock:
            return self._history[-1] if self._history else None

    def look(self) -> Reading:
        """Look now: read, judge, estimate the air, remember."""
        with self._looking:
            raw = self.source.look()
            judged = judge(raw)
            seen = {name: fact.value for name, fact in judged.items()}
            air = self._ambient.update(seen, raw.mono_s, raw.rested)
            stuck = self._frozen.stuck(raw.mono_s, seen["die_c"], seen["power_w"])
            facts = self._facts(raw, judged, air, stuck=stuck)
            known = {name: fact for name, fact in facts.items() if fact.value is not None}
            values: dict[str, Any] = {name: fact.value for name, fact in facts.items()}
            reading = Reading(
                raw.mono_s,
                ambient_sigma_c=air.sigma_c if air else None,
                sources={name: fact.source for name, fact in known.items()},
                **values,
            )
            reasons = {name: fact.reason for name, fact in facts.items() if name not in known}
            with self._lock:
                self.reasons = reasons
                self._history.append(reading)
                while self._history[0].time_s < reading.time_s - HISTORY_S:
                    self._history.popleft()
        return reading

    def _facts(
        self, raw: Raw, judged: dict[str, Fact], air: Estimate | None, stuck: bool
    ) -> dict[str, Fact]:
        """The fact behind every field of a reading. stuck: whether the die's sensor is."""
        die = judged["die_c"]
        if stuck:
            die = Fact(None, "", f"stuck at {die.value} °C for {Frozen.HOLD_S:.0f} s")
        ambient = Fact(None, "", NO_AIR)
        if air:
            ambient = Fact(air.celsius, air.source, "")
        no_pressure = raw.missing.get("pressure", "not a Mac")
        return {
            "die_c": die,
            "battery_c": judged["battery_c"],
            "power_w": judged["power_w"],
            "ambient_c": ambient,
            "pressure_level": Fact(raw.pressure, "notify(3)", no_pressure),
            "battery_percent": Fact(raw.battery_percent, "psutil", "no battery"),
            "plugged": Fact(raw.plugged, "psutil", "no battery"),
            "altitude_m": Fact(self._altitude_m, "given", NO_ALTITUDE),
        }


def temperatures() -> Rows:
    """("psutil CHIP LABEL", °C) of every thermometer that psutil knows.

    hwmon, else thermal_zone; none on macOS.
    """
    try:
        chips: dict[str, Any] = getattr(psutil, "sensors_temperatures", dict)()
    except (OSError, ValueError):
        return ()
    rows = []
    for chip, sensors in chips.items():
        for sensor in sensors:
            name = f"psutil {chip} {sensor.label}".strip()
            rows.append((name, float(sensor.current)))
    return tuple(rows)


def battery_charge() -> tuple[float | None, bool | None]:
    """`(percent, plugged in)`; `None` where there is no battery or psutil cannot tell."""
    ask = getattr(psutil, "sensors_battery", None)
    try:
        battery = ask() if ask else None
    except (OSError, ValueError, psutil.Error):
        battery = None
    if battery is None:
        return None, None
    return float(battery.percent), battery.power_plugged


def examined(monitor: Monitor) -> dict[str, Any]:
    """What one look finds, as JSON allows it.

    reporting/templates/sensors.md has a sentence for each fact.
    """
    began = time.perf_counter()
    reading = monitor.look()
    look_ms = round(1000 * (time.perf_counter() - began), 1)
    header = monitor.source.header
    return {
        "model": header.model,
        "chip": header.chip,
        "build": header.build,
        "look_ms": look_ms,
        "t_env": t_env_kind(reading),
        "reading": asdict(reading),
        "reasons": dict(monitor.reasons),
    }
