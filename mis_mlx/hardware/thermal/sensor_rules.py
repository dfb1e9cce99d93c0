"""Which raw values are temperatures: parked, frozen and nonsense ones, all seen on real machines,
are told apart.
"""

import math
import re
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


class Fact(NamedTuple):
    """What is believed, where it came from, and why it is None if it was not measured."""

    value: float | int | bool | None
    source: str
    reason: str


def judge(raw: Raw) -> dict[str, Fact]:
    """All values of one look by name. die_c: the hottest spot; virtual_ambient_c: the firmware's
    own guess.
    """
    hid = [(name, value) for name, value in raw.hid if _believed(name, value)]
    smc = {key: decode(text) for key, text in raw.smc.items()}
    judged: dict[str, tuple[float | None, str]] = {
        "die_c": _die(hid, smc, raw),
        "soc_c": _average(hid, "PMGR SOC Die"),
        "battery_c": _battery(hid, smc, raw),
        "nand_c": _average(hid, "NAND"),
        "virtual_ambient_c": (_within(smc.get("TVA0"), -30, 60), "SMC TVA0"),
        "power_w": (_within(smc.get("PSTR"), 0, 200), "SMC PSTR"),
        "battery_percent": (raw.battery_percent, "psutil"),
    }
    providers = "; ".join(f"{name}: {why}" for name, why in sorted(raw.missing.items()))
    looked_at = len(raw.hid) + len(raw.smc) + len(raw.linux)
    reason = (
        f"none of {looked_at} sensors gives a believable value"
        if looked_at
        else "no sensor answered"
    )
    reason += f" ({providers})" if providers else ""
    return {name: Fact(*found, reason) for name, found in judged.items()}


def _believed(name: str, value: float) -> bool:
    """Whether this can be the temperature of a named part. It cannot: calibration constants
    (`tcal`, `TR0Z`, always near 51.85), `tdev` (−21.7, −9202.86 seen), parts without a name, and a
    parked GPU.
    """
    if DIE.fullmatch(name):
        return 5 < value < 130 and not (name.startswith("GPU") and abs(value - PARKED_C) < 0.05)
    return name.startswith(("gas gauge battery", "NAND")) and _within(value, -20, 90) is not None


def _die(
    hid: list[tuple[str, float]], smc: dict[str, float | None], raw: Raw
) -> tuple[float | None, str]:
    """The hottest spot, as a mean over a varying set of sensors makes saw-teeth and hides it."""
    spots = [(value, f"IOHID {name}") for name, value in hid if DIE.fullmatch(name)]
    hottest = _within(smc.get("TCMz"), 15, 130)  # below 15 °C a die key is parked (seen: −4 to 9.8)
    if hottest is not None:
        spots.append((hottest, "SMC TCMz"))
    spots += [(v, n) for n, v in raw.linux if LINUX_DIE.match(n) and _within(v, 5, 130) is not None]
    return max(spots, default=(None, ""))


def _average(hid: list[tuple[str, float]], prefix: str) -> tuple[float | None, str]:
    values = [value for name, value in hid if name.startswith(prefix)]
    return (mean(values) if values else None), f"IOHID {prefix}"


def _battery(
    hid: list[tuple[str, float]], smc: dict[str, float | None], raw: Raw
) -> tuple[float | None, str]:
    if gauge := [value for name, value in hid if name.startswith("gas gauge battery")]:
        return median(gauge), "IOHID gas gauge battery"  # the same gauge six times
    for key in ("TB0T", "TB1T", "TB2T"):
        if (value := _within(smc.get(key), -20, 90)) is not None:
            return value, f"SMC {key}"
    pack = [
        (v, n) for n, v in raw.linux if LINUX_BATTERY.match(n) and _within(v, -20, 90) is not None
    ]
    return max(pack, default=(None, ""))


def _within(value: float | None, low: float, high: float) -> float | None:
    """`value` when it is a number strictly between the bounds and not the 0.0 of an empty
    register.
    """
    return (
        value
        if value is not None and math.isfinite(value) and value != 0.0 and low < value < high
        else None
    )


class Frozen:
    """Tells a stuck sensor (80 °C for hours was seen): equal bits for 120 s while power changed by
    more than 3 W.
    """

    HOLD_S = 120.0
    POWER_W = 3.0

    def __init__(self) -> None:
        self._value: float | None = None
        self._since_s = 0.0
        self._powers: tuple[float, float] | None = None

    def stuck(self, time_s: float, value: float | None, power_w: float | None) -> bool:
        """Feed one look; whether the value is to be taken as missing."""
        if value is None or value != self._value:
            self._value = value
            self._since_s = time_s
            self._powers = None
        if power_w is not None:
            low, high = self._powers or (power_w, power_w)
            self._powers = (min(low, power_w), max(high, power_w))
        low, high = self._powers or (0.0, 0.0)
        return (
            value is not None
            and time_s - self._since_s >= self.HOLD_S
            and high - low > self.POWER_W
        )
