"""Estimate the temperature of the air around the machine, and find its altitude.

No laptop has a room thermometer, so this is an estimate with an uncertainty, from sensors and the
user: several poor witnesses, weighed by how poor they are. No witness is no estimate, never a
silent 20 °C. The priors are for a fanless M1 Air.
"""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.hardware.thermal.recording import Header
from mis_mlx.types import MisError, Reading

GIVEN_SIGMA_C = 0.7
SOAK_SIGMA_C = 0.8
# after a long rest all sensors agree within this: all have the air's temperature
SOAK_SPREAD_C = 1.5
DRIFT_C2_PER_S = 1.0 / 3600  # how fast a past value loses worth: variance grows by 1 °C² an hour
VIRTUAL_OFFSET_C = 1.0  # TVA0 reads that much low on M1 (20 dumps of laptops)
INSIDE_FLOOR_C = 1.5  # sensors in one case err together, so their number does not make them surer
OUTLIER_SIGMAS = 3.0


class Estimate(NamedTuple):
    """Ambient temperature ± one standard deviation, and the witness or witnesses behind it."""

    celsius: float
    sigma_c: float
    source: str


class Anchor(NamedTuple):
    """What one witness said last, when, and what TVA0 was then."""

    estimate: Estimate
    time_s: float
    virtual_c: float | None


class Ambient:
    """The estimate over time.

    given_c: the reading of the user's thermometer at the first look. virtual_sigma_c: how far TVA0
    may be off, 2.5 °C on M1 and M2, 4 on later chips.
    """

    def __init__(self, given_c: float | None = None, virtual_sigma_c: float = 2.5):
        self._given_c = given_c
        self._virtual_sigma_c = virtual_sigma_c
        self._node = BatteryNode()
        self._anchors: dict[str, Anchor] = {}  # by source

    def update(self, values: Mapping[str, Any], now_s: float, rested: bool) -> Estimate | None:
        """The estimate after one more look; None: no witness.

        rested: just booted, or woken from a long sleep.
        """
        virtual_c = values.get("virtual_ambient_c")
        new = [cold_soak(values) if rested else None, self._node.update(values, now_s)]
        if self._given_c is not None and "given" not in self._anchors:
            new.append(Estimate(self._given_c, GIVEN_SIGMA_C, "given"))
        for estimate in new:
            if estimate is not None:
                self._anchors[estimate.source] = Anchor(estimate, now_s, virtual_c)
        witnesses = [_aged(anchor, now_s, virtual_c) for anchor in self._anchors.values()]
        if virtual_c is not None:
            celsius = virtual_c + VIRTUAL_OFFSET_C
            witnesses.append(Estimate(celsius, self._virtual_sigma_c, "SMC TVA0"))
        return fuse(witnesses)


def _aged(anchor: Anchor, now_s: float, virtual_c: float | None) -> Estimate:
    """A past estimate with the uncertainty that it has now.

    Less sure with time, and by as much as TVA0 has moved since, so that a value from before the
    halny came cannot outvote the sensors that feel it.
    """
    moved = 0.0
    if virtual_c is not None and anchor.virtual_c is not None:
        moved = virtual_c - anchor.virtual_c
    age_s = now_s - anchor.time_s
    variance = anchor.estimate.sigma_c**2 + DRIFT_C2_PER_S * age_s + moved**2
    return anchor.estimate._replace(sigma_c=math.sqrt(variance))


def fuse(witnesses: list[Estimate]) -> Estimate | None:
    """The mean, weighed by inverse variance.

    From the surest on, a witness more than 3 σ away from the mean so far is not heard.
    """
    heard: list[Estimate] = []
    celsius = variance = 0.0
    for witness in sorted(witnesses, key=lambda w: w.sigma_c):
        sigma_c = math.sqrt(witness.sigma_c**2 + variance)
        if heard and abs(witness.celsius - celsius) > OUTLIER_SIGMAS * sigma_c:
            continue
        heard.append(witness)
        weights = [w.sigma_c**-2 for w in heard]
        variance = 1 / sum(weights)
        weighted = [weight * w.celsius for weight, w in zip(weights, heard, strict=True)]
        celsius = variance * sum(weighted)
    if not heard:
        return None
    if len(heard) == 1:
        return heard[0]
    sources = [w.source for w in heard]
    floor = INSIDE_FLOOR_C
    if "given" in sources or "cold soak" in sources:
        floor = GIVEN_SIGMA_C
    return Estimate(celsius, max(math.sqrt(variance), floor), " + ".join(sources))


def t_env_kind(reading: Reading) -> str:
    """What AAIS may call its T_env: "measured", "given" or "none".

    "given" as soon as the user's value is part of it.
    """
    source = reading.sources.get("ambient_c")
    if source is None:
        return "none"
    return "given" if "given" in source.split(" + ") else "measured"


def cold_soak(values: Mapping[str, Any]) -> Estimate | None:
    """Estimate the air after a long rest: all parts have its temperature, if they agree.

    The best free method. None with fewer than three parts, or where they do not agree.
    """
    parts = map(values.get, ("battery_c", "nand_c", "virtual_ambient_c", "soc_c"))
    known = [part for part in parts if part is not None]
    if len(known) < 3 or max(known) - min(known) > SOAK_SPREAD_C:
        return None
    return Estimate(min(known) - 0.3, SOAK_SIGMA_C, "cold soak")


class BatteryNode:
    """Air temperature from the battery, a slow lump that the machine's power heats:

        tau dT/dt = −(T − T_air) + r P     so     T + tau dT/dt = T_air + r P

    One straight line is fitted to 10 minutes of battery temperature; a Kalman filter of two states,
    T_air and r, takes the left side as its measurement. tau and r are first-principle priors of an
    M1 Air (0.95 kJ/K × 1.5 K/W), wrong by a third on a given one, hence the floors under σ.
    """

    WINDOW_S = 600.0
    TAU_S = 1500.0
    # °C, K/W, K/W
    START_SIGMA_C = 6.0
    START_R = 0.7
    START_SIGMA_R = 0.35
    R_DRIFT = 0.02 / 3600  # K/W a second
    NOISE_C = 0.15
    TAU_ERROR = 0.15
    MODEL_ERROR_C = 0.3
    LOAD_FLOOR_C = 2.0
    IDLE_FLOOR_C = 1.5
    IDLE_W = 6.0
    # windows in which the battery moves more are not used, nor those in which its charge rose
    STEEPEST_C = 0.5

    def __init__(self) -> None:
        self._window: list[tuple[float, float, float, float]] = []  # seconds, °C, W, % of charge
        self._state: np.ndarray | None = None  # (T_air, r)
        self._covariance = np.diag([self.START_SIGMA_C**2, self.START_SIGMA_R**2])

    def update(self, values: Mapping[str, Any], now_s: float) -> Estimate | None:
        """A new estimate at the end of each usable window of 10 minutes, else None."""
        battery_c = values.get("battery_c")
        power_w = values.get("power_w")
        if battery_c is None or power_w is None:
            return None
        charge = values.get("battery_percent") or 0.0
        recent = [look for look in self._window if now_s - look[0] <= self.WINDOW_S]
        self._window = [*recent, (now_s, battery_c, power_w, charge)]
        seconds = now_s - self._window[0][0]
        if seconds < 0.9 * self.WINDOW_S or len(self._window) < 10:
            return None
        times, temperatures, powers, charges = np.array(self._window).T
        self._window = []
        away = times - times.mean()
        spread = float(away @ away)
        slope = float(away @ temperatures) / spread
        # charging heats from inside
        if abs(slope) * self.WINDOW_S > self.STEEPEST_C or charges[-1] > charges[0]:
            return None
        noise = self.NOISE_C**2 * (1 / len(times) + self.TAU_S**2 / spread)
        tau_error = (self.TAU_ERROR * self.TAU_S * slope) ** 2
        variance = noise + tau_error + self.MODEL_ERROR_C**2
        measured = float(temperatures.mean()) + self.TAU_S * slope
        return self._filtered(measured, variance, float(powers.mean()))

    def _filtered(self, measured: float, variance: float, power_w: float) -> Estimate:
        """One Kalman step with the measurement T_air + r power_w, in °C; the new T_air."""
        if self._state is None:
            self._state = np.array([measured - self.START_R * power_w, self.START_R])
        weights = np.array([1.0, power_w])
        self._covariance += self.WINDOW_S * np.diag([DRIFT_C2_PER_S, self.R_DRIFT**2])
        shared = self._covariance @ weights
        gain = shared / (weights @ shared + variance)
        self._state += gain * (measured - weights @ self._state)
        self._covariance -= np.outer(gain, shared)
        floor = self.LOAD_FLOOR_C if power_w > self.IDLE_W else self.IDLE_FLOOR_C
        sigma_c = max(math.sqrt(self._covariance[0, 0]), floor)
        return Estimate(float(self._state[0]), sigma_c, "battery model")


def find_altitude(
    given_m: float | None, header: Header, config: Path | None = None
) -> tuple[float | None, str]:
    """(metres above sea level, source); no Mac can measure it.

    By hand, else where the recording was made, else `altitude_m` in `config`
    (~/.config/mis_mlx.toml), else (None, ""). MisError for an impossible height.
    """
    if config is None:
        config = Path.home() / ".config" / "mis_mlx.toml"
    if given_m is not None:
        return _height(given_m, "--altitude-m"), "given"
    if header.altitude_m is not None:
        return _height(header.altitude_m, "the recording's altitude_m"), "replay header"
    try:
        settings = tomllib.loads(config.read_text(encoding="utf8"))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        raise MisError(f"{config} cannot be read ({error}): fix it or delete it") from None
    if "altitude_m" not in settings:
        return None, ""
    return _height(settings["altitude_m"], f"altitude_m in {config}"), f"given in {config.name}"


def _height(metres: Any, where: str) -> float:
    """The height as a number. MisError, with `where` it stands, when it is impossible."""
    number = isinstance(metres, int | float) and not isinstance(metres, bool)
    if not number or not -430 <= metres <= 9000:  # nor is NaN
        raise MisError(
            f"{where} is {metres!r}, not between −430 and 9000 m above sea level: fix it"
        )
    return float(metres)
