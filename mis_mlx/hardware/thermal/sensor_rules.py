"""Decide which raw values are temperatures.

Parked, frozen and nonsense values, all seen on real machines, are rejected.
"""

import math
import re
from collections.abc import Iterator
from statistics import mean, median
from typing import NamedTuple

from mis_mlx.hardware.thermal.apple_sensors import decode
from mis_mlx.hardware.thermal.recording import Raw

DIE = re.compile(r"([pe]ACC|SOC|GPU) MTR Temp Sensor\d+|PMGR SOC Die Temp Sensor\d+|PMU\d* tdie\d+")
LINUX_DIE = re.compile(
    r"\S+ (coretemp|k10temp|zenpower|x86_pkg_temp|macsmc\w*|(cpu|soc)[\w-]*)\b", re.I
)
LINUX_BATTERY = re.compile(r"\S+ BAT\w*\b")
PARKED_C = 30.0  # what a GPU's sensors say while it has no power; public dumps are rounded
Named = list[tuple[str, float]]  # (name of a sensor, °C)
Smc = dict[str, float | None]  # key -> number
Judged = tuple[float | None, str]  # (value, source)


class Fact(NamedTuple):
    """What is believed, where it came from, and why it is None if it was not measured."""

    value: float | int | bool | None
    source: str
    reason: str


def judge(raw: Raw) -> dict[str, Fact]:
    """Judge all values of one look, by name.

    die_c: the hottest spot. virtual_ambient_c: the firmware's own guess.
    """
    hid = [(name, value) for name, value in raw.hid if _believed(name, value)]
    smc = {key: decode(text) for key, text in raw.smc.items()}
    judged: dict[str, Judged] = {
        "die_c": _die(hid, smc, raw),
        "soc_c": _average(hid, "PMGR SOC Die"),
        "battery_c": _battery(hid, smc, raw),
        "nand_c": _average(hid, "NAND"),
        "virtual_ambient_c": (_within(smc.get("TVA0"), -30, 60), "SMC TVA0"),
        "power_w": (_within(smc.get("PSTR"), 0, 200), "SMC PSTR"),
        "battery_percent": (raw.battery_percent, "psutil"),
    }
    reason = _reason(raw)
    return {name: Fact(value, source, reason) for name, (value, source) in judged.items()}


def _reason(raw: Raw) -> str:
    """Why a value of this look is missing, if it is."""
    reason = "no sensor answered"
    answers = len(raw.hid) + len(raw.smc) + len(raw.linux)
    if answers:
        reason = f"none of {answers} sensors gives a plausible value"
    providers = "; ".join(f"{name}: {why}" for name, why in sorted(raw.missing.items()))
    if providers:
        reason += f" ({providers})"
    return reason


def _believed(name: str, value: float) -> bool:
    """Whether this can be the temperature of a named part.

    It cannot: calibration constants (`tcal`, `TR0Z`, always near 51.85), `tdev` (−21.7, −9202.86
    seen), parts without a name, and a parked GPU.
    """
    if DIE.fullmatch(name):
        parked = name.startswith("GPU") and abs(value - PARKED_C) < 0.05
        return 5 < value < 130 and not parked
    if not name.startswith(("gas gauge battery", "NAND")):
        return False
    return _within(value, -20, 90) is not None


def _die(hid: Named, smc: Smc, raw: Raw) -> Judged:
    """The hottest spot: a mean over a varying set of sensors makes saw-teeth and hides it."""
    spots = [(value, f"IOHID {name}") for name, value in hid if DIE.fullmatch(name)]
    hottest = _within(smc.get("TCMz"), 15, 130)  # below 15 °C a die key is parked (seen: −4 to 9.8)
    if hottest is not None:
        spots.append((hottest, "SMC TCMz"))
    spots += _linux(raw, LINUX_DIE, 5, 130)
    return max(spots, default=(None, ""))


def _linux(
    raw: Raw, pattern: re.Pattern[str], low: float, high: float
) -> Iterator[tuple[float, str]]:
    """(°C, name) of psutil's thermometers whose names match, if they lie between the bounds."""
    for name, value in raw.linux:
        if pattern.match(name) and _within(value, low, high) is not None:
            yield value, name


def _average(hid: Named, prefix: str) -> Judged:
    """The mean of all sensors whose names begin like this."""
    values = _values(hid, prefix)
    average = mean(values) if values else None
    return average, f"IOHID {prefix}"


def _values(hid: Named, prefix: str) -> list[float]:
    """The temperatures of all sensors whose names begin like this."""
    return [value for name, value in hid if name.startswith(prefix)]


def _battery(hid: Named, smc: Smc, raw: Raw) -> Judged:
    """The gas gauge, else the first of three keys with a value, else psutil's hottest battery."""
    gauge = _values(hid, "gas gauge battery")
    if gauge:
        return median(gauge), "IOHID gas gauge battery"  # the same gauge six times
    for key in ("TB0T", "TB1T", "TB2T"):
        value = _within(smc.get(key), -20, 90)
        if value is not None:
            return value, f"SMC {key}"
    return max(_linux(raw, LINUX_BATTERY, -20, 90), default=(None, ""))


def _within(value: float | None, low: float, high: float) -> float | None:
    """`value` if it is a number strictly between the bounds; None for an empty register's 0.0."""
    if value is None or not math.isfinite(value) or value == 0.0:
        return None
    return value if low < value < high else None


class Frozen:
    """Recognizes a stuck sensor (80 °C for hours was seen).

    It gives equal bits for 120 s while power changes by more than 3 W.
    """

    HOLD_S = 120.0
    POWER_W = 3.0

    def __init__(self) -> None:
        self._value: float | None = None
        self._since_s = 0.0
        self._powers = list[float]()  # lowest and highest since then; empty: unknown

    def stuck(self, time_s: float, value: float | None, power_w: float | None) -> bool:
        """Feed one look; returns whether the value counts as missing."""
        if value is None or value != self._value:
            self._value = value
            self._since_s = time_s
            self._powers = []
        if power_w is not None:
            powers = [*self._powers, power_w]
            self._powers = [min(powers), max(powers)]
        if value is None or not self._powers:
            return False
        low, high = self._powers
        return time_s - self._since_s >= self.HOLD_S and high - low > self.POWER_W
