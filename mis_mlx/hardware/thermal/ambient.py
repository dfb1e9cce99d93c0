"""The air around the machine: its temperature with an uncertainty, from sensors and the user, and its altitude.

No laptop has a room thermometer, so this is an estimate: several poor witnesses, weighed by how poor they are. No
witness is no estimate, never a silent 20 °C. The priors are for a fanless M1 Air.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mis_mlx.hardware.thermal.recording import Header
from mis_mlx.hardware.thermal.sensor_rules import Values
from mis_mlx.types import MisError, Reading

GIVEN_SIGMA_C = 0.7  # and no estimate is surer
SOAK_SIGMA_C = 0.8
SOAK_SPREAD_C = 1.5  # after a long rest all sensors agree within this: all have the air's temperature
DRIFT_C2_PER_S = 1.0 / 3600  # how fast a past value loses worth: variance grows by 1 °C² an hour
VIRTUAL_OFFSET_C = 1.0  # TVA0 reads that much low on M1 (20 dumps of laptops)
OUTLIER_SIGMAS = 3.0


@dataclass(frozen=True)
class Estimate:
    """Ambient temperature ± one standard deviation, and the witness or witnesses it is from."""

    celsius: float
    sigma_c: float
    source: str


def _aged(estimate: Estimate, at_s: float, virtual_c: float | None, now_s: float, now_c: float | None) -> Estimate:
    """A value that was good at `at_s`, when TVA0 said `virtual_c`: less sure with time, and by as much as TVA0 has
    moved since, so that a value from before the halny came cannot outvote the sensors that feel it."""
    moved = now_c - virtual_c if now_c is not None and virtual_c is not None else 0.0
    variance = estimate.sigma_c**2 + DRIFT_C2_PER_S * (now_s - at_s) + moved**2
    return replace(estimate, sigma_c=math.sqrt(variance))


class Ambient:
    """The estimate over time. `given_c`: what the user's thermometer says at the first look;
    `virtual_sigma_c`: how far TVA0 may be off, 2.5 °C on M1 and M2, 4 on later chips."""

    def __init__(self, given_c: float | None = None, virtual_sigma_c: float = 2.5):
        self._given_c = given_c
        self._virtual_sigma_c = virtual_sigma_c
        self._anchors: dict[str, tuple[Estimate, float, float | None]] = {}  # by source; value, time, TVA0 then

    def update(self, values: Values, now_s: float, rested: bool) -> Estimate | None:
        """The estimate after one more look, `None` when there is no witness. rested: just booted, or woken from a long
        sleep."""
        virtual = values.virtual_ambient_c
        if rested and (soaked := cold_soak(values)) is not None:
            self._anchors["cold soak"] = soaked, now_s, virtual
        if self._given_c is not None:
            self._anchors.setdefault("given", (Estimate(self._given_c, GIVEN_SIGMA_C, "given"), now_s, virtual))
        witnesses = [_aged(*anchor, now_s, virtual) for anchor in self._anchors.values()]
        if virtual is not None:
            witnesses.append(Estimate(virtual + VIRTUAL_OFFSET_C, self._virtual_sigma_c, "SMC TVA0"))
        return fuse(witnesses)


def fuse(witnesses: list[Estimate]) -> Estimate | None:
    """Mean weighed by inverse variance. From the surest on, a witness more than 3 σ away is not heard."""
    heard: list[Estimate] = []
    celsius = variance = 0.0
    for witness in sorted(witnesses, key=lambda w: w.sigma_c):
        away = abs(witness.celsius - celsius)
        if heard and away > OUTLIER_SIGMAS * math.sqrt(witness.sigma_c**2 + variance):
            continue
        heard.append(witness)
        weights = [w.sigma_c**-2 for w in heard]
        variance = 1 / sum(weights)
        celsius = variance * sum(weight * w.celsius for weight, w in zip(weights, heard, strict=True))
    if len(heard) <= 1:
        return heard[0] if heard else None
    return Estimate(celsius, max(math.sqrt(variance), GIVEN_SIGMA_C), " + ".join(w.source for w in heard))


def t_env_kind(reading: Reading) -> str:
    """What AAIS may call its T_env: "measured", "given" as soon as the user's value is part of it, "none"."""
    source = reading.sources.get("ambient_c")
    return "none" if source is None else "given" if "given" in source.split(" + ") else "measured"


def cold_soak(values: Values) -> Estimate | None:
    """The best free method: after a long rest all parts have the air's temperature, if they agree."""
    parts = [values.battery_c, values.nand_c, values.virtual_ambient_c, values.soc_c]
    known = [part for part in parts if part is not None]
    if len(known) < 3 or max(known) - min(known) > SOAK_SPREAD_C:
        return None
    return Estimate(min(known) - 0.3, SOAK_SIGMA_C, "cold soak")


def find_altitude(given_m: float | None, header: Header, config: Path | None = None) -> tuple[float | None, str]:
    """`(metres above sea level, source)`: by hand, else where the recording was made, else `altitude_m` in `config`
    (~/.config/mis_mlx.toml), else `(None, "")`; no Mac can measure it. MisError for an impossible height."""
    config = config or Path.home() / ".config" / "mis_mlx.toml"
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
    number = isinstance(metres, int | float) and not isinstance(metres, bool)
    if not number or not -430 <= metres <= 9000:  # as NaN is not either
        raise MisError(f"{where} is {metres!r}, not between −430 and 9000 m above sea level: fix it")
    return float(metres)
